"""Log-probabilities of trained tokens, in tiles: the logits of a batch never exist as a whole."""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from bp_data.loop.examples import Batch
from bp_train_cuda.model.head import Head, find_decoder, find_head, unwrap_model

TILE = 2**26
"""Logits that exist at a time: 256 MiB in float32."""
_ALIGNED = 128
_TOKENS = 4096
"""Tokens of a tile where the head is trained, so that a tile of its gradient sums over many of them."""


class LogProbModel(torch.nn.Module):  # type: ignore[misc]  # torch is not typed for a strict check
    """A causal language model that returns log-probabilities of the trained tokens instead of logits.

    It runs the decoder and multiplies with the head itself. A model whose head is not known to be a plain product, as
    `find_head` says, computes its own logits.

    Args:
        model: A transformers causal language model, or a PEFT model around one.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model
        head = find_head(model)
        self.has_head = head is not None
        # In tuples, so that they are no second submodules.
        self._parts: tuple[Any, ...] = ()
        if head is not None:
            self._parts = (find_decoder(model), unwrap_model(model).get_output_embeddings())
        self._numbers = (1.0, None, 1.0) if head is None else (head.scale, head.softcap, head.pre_scale)

    def forward(self, batch: Mapping[str, Any]) -> torch.Tensor:
        """(N,) log-probabilities in nats, float32, of the batch's trained tokens.

        Args:
            batch: ``input_ids`` (B, T); ``positions`` (N,), flat places b * T + t of the tokens that predict;
                ``targets`` (N,), the predicted ids; anything else goes to the model as it is.
        """
        inputs = {name: value for name, value in batch.items() if name not in _OURS}
        if not self.has_head:
            logits = self.model(**inputs, use_cache=False).logits.flatten(0, 1).index_select(0, batch["positions"])
            return logits.float().log_softmax(-1).gather(1, batch["targets"][:, None])[:, 0]
        decoder, output = self._parts
        hidden = decoder(**inputs, use_cache=False).last_hidden_state.flatten(0, 1)  # (B * T, H)
        # Read each time: FSDP2 swaps the parameter objects around every forward pass.
        head = Head(output.weight, output.bias, *self._numbers)
        return head_log_probs(hidden.index_select(0, batch["positions"]), head, batch["targets"])

    def generate(self, **arguments: Any) -> torch.Tensor:
        """The model's own ``generate``; through this module, so that FSDP2 gathers what lies outside the layers."""
        found: torch.Tensor = self.model.generate(**arguments)
        return found


_OURS = ("positions", "targets")


def to_tensors(batch: Batch) -> dict[str, torch.Tensor]:
    """What `LogProbModel` reads, int64 on the CPU; of a flat batch ``position_ids`` that begin at 0 with each example.

    There is no attention mask: padding comes after a row's own tokens, which never look ahead, and its outputs carry no
    loss.
    """
    tensors = {
        "input_ids": _read_array(batch.ids).view(batch.rows, batch.width),
        "positions": _read_array(batch.positions),
        "targets": _read_array(batch.targets),
    }
    if batch.is_flat:
        tensors["position_ids"] = torch.cat([torch.arange(length) for length in batch.lengths[0]])[None]
    return tensors


def _read_array(numbers: array[int]) -> torch.Tensor:
    return torch.frombuffer(numbers, dtype=torch.int32).long() if numbers else torch.zeros(0, dtype=torch.long)


def to_device(batch: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    """The batch with its CPU tensors on ``device``; copies to a GPU run while the host continues."""
    if device.type == "cpu":
        return dict(batch)
    return {
        name: value.pin_memory().to(device, non_blocking=True)
        if isinstance(value, torch.Tensor) and value.device.type == "cpu"
        else value
        for name, value in batch.items()
    }


def head_log_probs(hidden: torch.Tensor, head: Head, targets: torch.Tensor) -> torch.Tensor:
    """(N,) log-probabilities of ``targets`` (N,) under the head's logits of ``hidden`` (N, H), float32."""
    scaled = hidden if head.pre_scale == 1.0 else hidden * head.pre_scale
    found: torch.Tensor = _LogProbs.apply(scaled, head.weight, head.bias, targets, head.scale, head.softcap)
    return found


class _LogProbs(torch.autograd.Function):  # type: ignore[misc]
    """log softmax(cap(scale * (hidden @ weight.T + bias)))[target].

    With a frozen head, which is the rule for adapters, forward also computes each token's gradient
    d log p / d hidden = weight[target] - softmax @ weight; backward scales it by what comes from above. That takes two
    products with the weight instead of three. With a trained head, backward computes the logits again, in tiles of the
    vocabulary.
    """

    @staticmethod
    def forward(  # noqa: PLR0917  # autograd passes arguments by position
        ctx: Any,
        hidden: torch.Tensor,  # (N, H)
        weight: torch.Tensor,  # (V, H)
        bias: torch.Tensor | None,  # (V,)
        targets: torch.Tensor,  # (N,)
        scale: float,
        softcap: float | None,
    ) -> torch.Tensor:
        kind = hidden.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden.dtype
        needs_hidden, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        trains_head = needs_weight or needs_bias
        # Dtypes are chosen here by hand: autocast would round the logits to 16 bits before the softmax.
        with torch.autocast(kind, enabled=False):
            weight_low, hidden_low = weight.to(dtype), hidden.to(dtype)
            normalizer = torch.empty(len(hidden), device=hidden.device)
            found = torch.empty_like(normalizer)
            slopes = torch.empty_like(hidden) if needs_hidden and not trains_head else None
            for rows in _tiles(len(hidden), _tile_rows(len(weight))):
                logits = _logits(hidden_low[rows], weight_low, bias, scale, softcap)
                at = targets[rows, None]
                if trains_head:
                    normalizer[rows] = logits.logsumexp(dim=1)
                    found[rows] = logits.gather(1, at)[:, 0] - normalizer[rows]
                    continue
                log_probs = logits.log_softmax(dim=1)
                found[rows] = log_probs.gather(1, at)[:, 0]
                if slopes is not None:
                    slopes[rows] = _probabilities(log_probs, logits, at, softcap, dtype) @ weight_low
                del logits, log_probs  # before the next tile needs the memory
        ctx.scale, ctx.softcap, ctx.dtype = scale, softcap, dtype
        if trains_head:
            ctx.save_for_backward(hidden, weight, bias, targets, normalizer)
        else:
            ctx.save_for_backward(slopes)
        ctx.trains_head = trains_head
        return found

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (above,) = gradients
        if not ctx.trains_head:
            (slopes,) = ctx.saved_tensors
            return (slopes * (-ctx.scale * above[:, None]).to(slopes.dtype), None, None, None, None, None)
        hidden, weight, bias, targets, normalizer = ctx.saved_tensors
        needs_hidden, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        d_hidden = torch.zeros_like(hidden, dtype=torch.float32) if needs_hidden else None
        d_weight = torch.empty_like(weight) if needs_weight else None
        d_bias = torch.empty_like(bias) if needs_bias else None
        with torch.autocast(hidden.device.type, enabled=False):
            # Vocabulary outside, tokens inside: each tile of the weight's gradient is summed over all tokens in float32
            # and rounded once.
            for words in _tiles(len(weight), max(1, TILE // _TOKENS)):
                part = weight[words].to(ctx.dtype)
                sums = torch.zeros(part.shape, device=weight.device)
                bias_sums = torch.zeros(len(part), device=weight.device)
                for rows in _tiles(len(hidden), _TOKENS):
                    low = hidden[rows].to(ctx.dtype)
                    logits = _logits(low, part, None if bias is None else bias[words], ctx.scale, ctx.softcap)
                    local = targets[rows] - words.start
                    # A target in another tile of the vocabulary is clamped to a word of this one, and adds 0 there.
                    inside = (local >= 0) & (local < len(part))
                    at = local.clamp(0, len(part) - 1)[:, None]
                    own = torch.where(inside, ctx.scale, 0.0)[:, None] * _cap_slope(logits.gather(1, at), ctx.softcap)
                    slope = _slope(logits, normalizer[rows], ctx.scale, ctx.softcap).scatter_add_(1, at, own)
                    slope *= above[rows, None]
                    low_slope = slope.to(ctx.dtype)
                    sums += low_slope.T @ low
                    bias_sums += slope.sum(dim=0)
                    if d_hidden is not None:
                        d_hidden[rows] += low_slope @ part
                if d_weight is not None:
                    d_weight[words] = sums
                if d_bias is not None:
                    d_bias[words] = bias_sums
        return (None if d_hidden is None else d_hidden.to(hidden.dtype), d_weight, d_bias, None, None, None)


def _logits(
    hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, scale: float, softcap: float | None
) -> torch.Tensor:
    """(rows, words) in float32; a GPU sums 16-bit products in float32 and need not round them."""
    if hidden.is_cuda and hidden.dtype != torch.float32:
        logits = torch.mm(hidden, weight.T, out_dtype=torch.float32)
    else:
        logits = (hidden @ weight.T).float()
    if bias is not None:
        logits += bias
    if scale != 1.0:
        logits *= scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    return logits


def _cap_slope(logits: torch.Tensor, softcap: float | None) -> torch.Tensor | float:
    """How capped logits change with those before the cap."""
    return 1.0 if softcap is None else 1 - (logits / softcap) ** 2


def _slope(logits: torch.Tensor, normalizer: torch.Tensor, scale: float, softcap: float | None) -> torch.Tensor:
    """Minus the probabilities, times the slopes of cap and scale; reuses the memory of ``logits`` without a cap."""
    if softcap is None:
        return logits.sub_(normalizer[:, None]).exp_().mul_(-scale)
    return (logits - normalizer[:, None]).exp() * (-scale * _cap_slope(logits, softcap))


def _probabilities(
    log_probs: torch.Tensor, logits: torch.Tensor, targets: torch.Tensor, softcap: float | None, dtype: torch.dtype
) -> torch.Tensor:
    """-d log p / d logit without scale, in ``dtype``: probabilities, less 1 for the target; times the slope of the cap.

    The target's difference is taken before it is rounded. Without a cap the rest is written in one pass.
    """
    if softcap is None:
        found = torch.exp(log_probs, out=torch.empty_like(log_probs, dtype=dtype))
    else:
        found = (log_probs.exp() * _cap_slope(logits, softcap)).to(dtype)
    own = log_probs.gather(1, targets).expm1() * _cap_slope(logits.gather(1, targets), softcap)
    return found.scatter_(1, targets, own.to(dtype))


def _tile_rows(words: int) -> int:
    """Tokens of a tile whose logits go over the whole vocabulary; a multiple of what a GPU multiplies at once."""
    rows = max(1, TILE // words)
    return rows if rows < _ALIGNED else rows // _ALIGNED * _ALIGNED


def _tiles(count: int, size: int) -> Iterator[slice]:
    for start in range(0, count, size):
        yield slice(start, min(start + size, count))
