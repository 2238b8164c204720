"""Log-probabilities of tokens from hidden states, tile by tile in plain torch: the logits never exist whole.

TRL 1.15 takes its loss in a Triton kernel and nowhere else, so that on a CPU, and on Windows without Triton, it trains
nothing; from 1.16 on it does without. Where it cannot, its head gets this way, with equal results.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch
from trl.trainer import utils as trl_head

from bp_train_cuda.probe import Device

TOKENS = 4096
"""Tokens of a tile; its words are the caller's affair."""
HAS_OWN_WAY = hasattr(trl_head, "_use_triton")
"""Whether this TRL computes without Triton too."""


def mend_head(device: Device) -> None:
    """Give TRL's head a way without Triton, where it has none and ``device`` has no Triton."""
    has_triton = device.kind == "cuda" and find_spec("triton") is not None
    if not (has_triton or HAS_OWN_WAY):
        trl_head._ChunkedLogProbFunction = TiledLogProbs  # noqa: SLF001  # TRL has no other place for it


@dataclass(frozen=True, slots=True)
class _Head:
    """How hidden states become logits, and how many words at a time."""

    words: int
    temperature: float
    softcap: float | None
    scale: float
    dtype: torch.dtype
    """Of the matrix product."""

    def tiles(
        self, hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
    ) -> Iterator[tuple[slice, int, torch.Tensor]]:
        """Rows of a tile, its first word, and its logits (rows, words) in float32."""
        for start in range(0, len(hidden), TOKENS):
            rows = slice(start, start + TOKENS)
            for at in range(0, len(weight), self.words):
                tile = hidden[rows].to(self.dtype) @ weight[at : at + self.words].to(self.dtype).T
                if bias is not None:
                    tile += bias[at : at + self.words].to(self.dtype)
                logits = tile.float() * self.scale
                if self.softcap is not None:
                    logits = self.softcap * torch.tanh(logits / self.softcap)
                yield rows, at, logits / self.temperature

    def slope(self, logits: torch.Tensor) -> torch.Tensor | float:
        """Of a tile: how its logits change with hidden @ weight.T."""
        cap = 1.0 if self.softcap is None else 1 - (logits * (self.temperature / self.softcap)) ** 2
        return cap * (self.scale / self.temperature)


class TiledLogProbs(torch.autograd.Function):  # type: ignore[misc]  # torch is not typed for a strict check
    """Log-probabilities of targets under softmax(hidden @ weight.T + bias), by an online normalizer.

    The running maximum and sum are Milakov and Gimelshein's (arXiv:1805.02867); backward computes each tile anew.
    Arguments and results are those of TRL's function of the same place. Entropy and whether the target is the likeliest
    token carry no gradient here: they are only reported.
    """

    @staticmethod
    def forward(  # noqa: PLR0917  # TRL's order
        ctx: Any,
        hidden: torch.Tensor,  # (N, H)
        weight: torch.Tensor,  # (V, H)
        bias: torch.Tensor | None,  # (V,)
        targets: torch.Tensor,  # (N,)
        temperature: float,
        words: int,
        softcap: float | None = None,
        scale: float = 1.0,
        outputs: tuple[str, ...] = (),
    ) -> tuple[torch.Tensor | None, ...]:
        """(N,) log-probabilities in nats; entropy, two that are not computed, and top-1, or None."""
        kind = hidden.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden.dtype
        ctx.head = _Head(words, temperature, softcap, scale, dtype)
        peak = hidden.new_full((len(hidden),), -torch.inf, dtype=torch.float32)
        total, weighted, wanted = torch.zeros_like(peak), torch.zeros_like(peak), torch.zeros_like(peak)
        best = torch.full_like(targets, -1)
        for rows, at, logits in ctx.head.tiles(hidden, weight, bias):
            before = peak[rows].clone()
            highest, place = logits.max(dim=1)
            best[rows] = torch.where(highest > before, place + at, best[rows])
            peak[rows] = torch.maximum(before, highest)
            shrink, odds = (before - peak[rows]).exp(), (logits - peak[rows, None]).exp()
            total[rows] = total[rows] * shrink + odds.sum(dim=1)
            weighted[rows] = weighted[rows] * shrink + (odds * logits).sum(dim=1)
            inside, local = _find_targets(targets[rows], at, logits)
            wanted[rows][inside] = logits[inside, local]
        normalizer = peak + total.log()
        ctx.save_for_backward(hidden, weight, bias, targets, normalizer)
        entropy = normalizer - weighted / total if "entropy" in outputs else None
        top = best == targets if "is_top1" in outputs else None
        ctx.mark_non_differentiable(*(found for found in (entropy, top) if found is not None))
        return wanted - normalizer, entropy, None, None, top

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Gradients of hidden states, weight and bias, summed in float32."""
        hidden, weight, bias, targets, normalizer = ctx.saved_tensors
        inputs = (hidden, weight, bias)
        sums = [
            torch.zeros_like(value, dtype=torch.float32) if value is not None and needed else None
            for value, needed in zip(inputs, ctx.needs_input_grad[:3], strict=True)
        ]
        for rows, at, logits in ctx.head.tiles(hidden, weight, bias):
            slope = -(logits - normalizer[rows, None]).exp()
            inside, local = _find_targets(targets[rows], at, logits)
            slope[inside, local] += 1  # d log p(target) / d logits: 1 for the target, less each one's probability
            slope *= gradients[0][rows, None] * ctx.head.slope(logits)
            words = slice(at, at + logits.shape[1])
            if sums[0] is not None:
                sums[0][rows] += slope @ weight[words].float()
            if sums[1] is not None:
                sums[1][words] += slope.T @ hidden[rows].float()
            if sums[2] is not None:
                sums[2][words] += slope.sum(dim=0)
        found = (None if total is None else total.to(value.dtype) for total, value in zip(sums, inputs, strict=True))
        return (*found, None, None, None, None, None, None)


def _find_targets(targets: torch.Tensor, at: int, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows whose target lies in a tile, and where in it."""
    local = targets - at
    inside = ((local >= 0) & (local < logits.shape[1])).nonzero()[:, 0]
    return inside, local[inside]
