"""Packed examples stay apart: what a model must be given for it, and the proof that it works on this device.

In attention layers ``position_ids`` that begin again at 0 are enough: transformers (`masking_utils`, 5.x) then masks
across examples, for eager, sdpa and flex attention, with sliding windows and chunks, whatever the batch size, as long
as neither an attention mask nor a cache is passed. Flash attention takes the same from one sequence (1, T) alone, so
packs are always joined to one. Layers with a state or a convolution (Mamba, gated delta rule, LFM2) know nothing of
positions: their GPU kernels take ``seq_idx`` or ``cu_seq_lens_q``, their plain torch versions ignore both, or raise.
Some attention models (gpt-oss, AFMoE) make their masks without positions; for them the masks are made here.

Which of these holds is not read from a list of names. A small model of the config's class, then the loaded model, runs
two packs that differ in their first example only: the other examples must give the same logits in both, to the last
bit but for the noise between the rows of a batch, and those that they give alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from transformers.masking_utils import create_masks_for_generate

from bp_runs.errors import PackingError, first_line
from bp_train_cuda.model.head import evaluating, unwrap_model
from bp_train_cuda.model.pico import build_pico

_LENGTHS = (21, 19, 1, 7)
"""Tokens of a proof's examples: below the 64 of a chunk of linear attention, above a small model's window of 8."""
_EXACT = 1e-6
"""Of the largest logit: packs of the same lengths run through the same kernels, so that not even rounding differs."""
_TOLERANCE = 1e-4
"""Packed against alone, in float32 on a CPU."""
_TOLERANCE_GPU = 2e-3
"""The same on a GPU, where Triton multiplies in TF32."""
_RUN_ERRORS = (TypeError, ValueError, RuntimeError, AttributeError, KeyError, IndexError, NotImplementedError)


@dataclass(frozen=True, slots=True)
class Packing:
    """What a model is given with packed examples besides ``input_ids`` and ``position_ids``."""

    seq_idx: bool = False
    """The number of each token's example: for Mamba and for convolutions."""
    cu_seq_lens: bool = False
    """Where examples begin, as flash attention's kernels take it: for the gated delta rule."""
    masked: Any = None
    """The model whose attention masks are made here, since it makes its own without positions; None for others."""

    def arguments(self, position_ids: torch.Tensor) -> dict[str, Any]:
        """Keyword arguments of the forward pass.

        Call it while the batch is on the CPU: on a GPU it would wait for the device.

        Args:
            position_ids: (1, T), beginning again at 0 with each example.

        Returns:
            ``seq_idx`` (1, T) int32; ``cu_seq_lens_q`` and ``cu_seq_lens_k`` (examples + 1) int32 with ``max_length_q``
            and ``max_length_k`` in tokens; ``attention_mask`` on the model's device; or nothing.
        """
        starts = position_ids[0] == 0
        found: dict[str, Any] = {}
        if self.seq_idx:
            found["seq_idx"] = (starts.cumsum(0) - 1).to(torch.int32)[None]
        if self.cu_seq_lens:
            first = starts.nonzero()[:, 0]
            bounds = torch.cat([first, first.new_tensor([position_ids.shape[1]])]).to(torch.int32)
            longest = int(bounds.diff().max())
            found |= {
                "cu_seq_lens_q": bounds,
                "cu_seq_lens_k": bounds,
                "max_length_q": longest,
                "max_length_k": longest,
            }
        if self.masked is not None:
            found["attention_mask"] = _make_masks(self.masked, position_ids)
        return found


def _make_masks(model: Any, position_ids: torch.Tensor) -> Any:
    """A mask (1, 1, T, T), or one by kind of layer, as transformers makes it of positions that begin again."""
    shape_only = torch.empty((*position_ids.shape, 1), dtype=model.dtype, device=model.device)
    return create_masks_for_generate(model.config, shape_only, None, None, position_ids=position_ids.to(model.device))


def _candidates(model: Any) -> tuple[Packing, ...]:
    """What a model may take, the cheapest first."""
    states = (Packing(), Packing(seq_idx=True), Packing(cu_seq_lens=True), Packing(seq_idx=True, cu_seq_lens=True))
    return (*states, Packing(masked=model))


def check_packing(config: Any, device: str) -> Packing | None:
    """How a model of ``config``'s class keeps packed examples apart on ``device``, tried on a small random one.

    Args:
        config: The model's transformers config.
        device: ``cpu`` or ``cuda``: where training will run, since its kernels decide.

    Returns:
        None if no small model can be built of this config; `require_packable` then decides on the loaded one.

    Raises:
        PackingError: It mixes examples.
    """
    model = build_pico(config)
    return None if model is None else require_packable(model.to(device))


def require_packable(model: Any) -> Packing:
    """How ``model`` keeps packed examples apart, proved on its own device and in its own dtype.

    The model's modes and the random state stay as they are; no more than 48 tokens run at once, a few times.

    Args:
        model: A transformers causal language model, or a PEFT model of one.

    Raises:
        PackingError: It mixes examples, or takes no positions, with what it said.
    """
    reasons: list[str] = []
    device = next(unwrap_model(model).parameters()).device
    with evaluating(model, device):
        proof = _Proof(unwrap_model(model), device)
        for packing in _candidates(unwrap_model(model)):
            reason = proof.find_leak(packing)
            if reason is None:
                return packing
            reasons.append(reason)
    kind = unwrap_model(model).config.model_type
    raise PackingError(
        f"packed examples of a {kind} model can't be kept apart on {device.type}", cause=_best_reason(reasons)
    )


def find_leak(model: Any, packing: Packing) -> str | None:
    """Why ``packing`` does not keep examples of ``model`` apart, or not give what they give alone; None if it does."""
    base = unwrap_model(model)
    device = next(base.parameters()).device
    with evaluating(model, device):
        return _Proof(base, device).find_leak(packing)


def _best_reason(reasons: list[str]) -> str:
    """What transformers says itself, if anything: it names the package to install."""
    return next((reason for reason in reasons if "nstall" in reason), reasons[0])


class _Proof:
    """Logits of packs and of their examples alone, and how far they are apart."""

    def __init__(self, model: Any, device: torch.device) -> None:
        self.model, self.device = model, device
        size = int(self.model.config.get_text_config(decoder=True).vocab_size)
        draw = torch.Generator().manual_seed(0)
        ids = torch.randint(0, size, (2 * _LENGTHS[0] + sum(_LENGTHS[1:]),), generator=draw).to(self.device)
        self.first, self.other, *self.rest = ids.split([_LENGTHS[0], *_LENGTHS])
        self.alone: torch.Tensor | None = None

    def find_leak(self, packing: Packing) -> str | None:
        """Why ``packing`` does not keep examples apart; None if it does."""
        try:
            self._run_pack(self.first, packing)  # Triton may choose other kernels at the first call
            one, two = self._run_pack(self.first, packing), self._run_pack(self.other, packing)
            if self.alone is None:
                self.alone = torch.cat([self._run(row[None])[0] for row in self.rest])
        except torch.OutOfMemoryError:
            raise
        except _RUN_ERRORS as error:
            return first_line(error)
        moved, off = _difference(one, two), _difference(one, self.alone)
        if moved <= _EXACT and off <= self._tolerance():
            return None
        moved_apart, off_apart = self._noise()
        if moved <= max(_EXACT, 4 * moved_apart) and off <= max(self._tolerance(), 4 * off_apart):
            return None
        return f"another first example moves the next ones' logits by {moved:.1e}; packed and alone differ by {off:.1e}"

    def _run_pack(self, first: torch.Tensor, packing: Packing) -> torch.Tensor:
        """Logits (tokens, V) of all examples but the first."""
        rows = [first, *self.rest]
        positions = torch.cat([torch.arange(len(row)) for row in rows])[None]
        more = {
            name: value.to(self.device) if isinstance(value, torch.Tensor) else value
            for name, value in packing.arguments(positions).items()
        }
        ids = torch.cat(rows)[None]
        return self._run(ids, position_ids=positions.to(self.device), **more)[0, len(first) :]

    def _run(self, ids: torch.Tensor, **more: Any) -> torch.Tensor:
        logits: torch.Tensor = self.model(input_ids=ids, use_cache=False, **more).logits
        return logits.float()

    def _tolerance(self) -> float:
        """What rounding may change between packed and alone, as a share of the largest logit."""
        eps: float = torch.finfo(self.model.dtype).eps
        return max(_TOLERANCE if self.device.type == "cpu" else _TOLERANCE_GPU, eps)

    def _noise(self) -> tuple[float, float]:
        """The same two differences where nothing can leak, between the rows of a batch: what rounding alone makes.

        Experts and kernels may sum in another order when other rows are in the batch.
        """
        moved, off = 0.0, 0.0
        for row in self.rest:
            width = min(len(row), len(self.first))
            part = row[:width]
            batches = [torch.stack([first[:width], part]) for first in (self.first, self.other)]
            one, two = (self._run(batch)[1] for batch in batches)
            moved = max(moved, _difference(one, two))
            off = max(off, _difference(one, self._run(part[None])[0]))
        return moved, off


def _difference(one: torch.Tensor, other: torch.Tensor) -> float:
    """The largest difference of two tensors, as a share of the largest value; infinite if a value is not finite."""
    if not bool(torch.isfinite(one).all() & torch.isfinite(other).all()):
        return float("inf")
    return float((one - other).abs().max() / one.abs().max().clamp_min(1e-6))
