"""One AdamW update of bfloat16 weights: float32 arithmetic, 8- or 32-bit state, stochastic rounding.

bfloat16 has 8 significant bits, so a change of less than 1/512 of a weight is rounded away, and AdamW's changes are
about the learning rate: at 2e-5 every weight above 0.01 would stay where it is. A change that is rounded up as often as
its size demands is right on average (stochastic rounding: Gupta et al., arXiv:1502.02551; for bfloat16 weights: Zamirai
et al., arXiv:2010.06192).

The formula exists twice: in torch here, and as one Triton kernel in adamw_triton.py for GPUs. Both do the same IEEE
operations in the same order and draw by place, so they give the same bits on every device.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import torch
from torch import Tensor

BLOCK = 256
"""Weights that share a scale in 8-bit state."""
CHUNK = 2**22
"""Weights that the torch form updates at a time, a multiple of `BLOCK`: about 200 MiB of scratch."""
DRAW_BITS = 16
"""What float32 has more than bfloat16, whose bits are its upper half."""
NAN = 0x7FC0_0000
BUCKET_SHIFT = 16
"""Bits of a float32 that a bucket of `Codes` leaves out: it keeps the exponent and 7 bits of the mantissa."""
FIRST_BUCKET = (127 - 23) << (23 - BUCKET_SHIFT)
"""The bucket of 2**-23, below every midpoint."""
LAST_BUCKET = 127 << (23 - BUCKET_SHIFT)
"""The bucket of 1."""


@dataclass(frozen=True, slots=True)
class Numbers:
    """One step's numbers for one weight."""

    beta1: float
    beta2: float
    eps: float
    """Times the root of the second correction, as the formula adds it."""
    rate: float
    """Minus the learning rate, times the corrections of both averages."""
    keep: float
    """What decay leaves of a weight."""
    key: tuple[int, int]
    """Two signed 32-bit keys of the draws."""


def read_numbers(
    *, betas: tuple[float, float], eps: float, lr: float, weight_decay: float, step: int, key: tuple[int, int]
) -> Numbers:
    """The numbers of step ``step``, the first being 1 (Loshchilov and Hutter, arXiv:1711.05101, algorithm 2)."""
    beta1, beta2 = betas
    root = math.sqrt(1 - beta2**step)
    return Numbers(beta1, beta2, eps * root, -lr * root / (1 - beta1**step), 1 - lr * weight_decay, key)


@dataclass(frozen=True, slots=True)
class Moments:
    """A weight's state: both averages, flat, and of 8-bit ones their scales and codes."""

    first: Tensor
    second: Tensor
    scales: tuple[Tensor, Tensor] | None = None
    """The largest magnitude of each `BLOCK`, float32."""
    maps: tuple[Tensor, Tensor] | None = None
    """bitsandbytes' 256 values of each average, ascending."""

    def slice(self, here: slice) -> Moments:
        """The state of some weights; ``here`` starts at a block's start."""
        blocks = slice(here.start // BLOCK, -(-here.stop // BLOCK))
        scales = None if self.scales is None else (self.scales[0][blocks], self.scales[1][blocks])
        return Moments(self.first[here], self.second[here], scales, self.maps)


def update(weights: Tensor, gradients: Tensor, moments: Moments, numbers: Numbers, place: int) -> None:
    """The torch form, on any device. Writes only after everything is computed, so it can be called again.

    Where a gradient is not finite, the averages become 0 and the weight stays.
    """
    device, slope = weights.device, gradients.float()
    is_finite = slope.isfinite()
    slope = slope.where(is_finite, 0)
    first = _widen(moments, 0, device).mul_(numbers.beta1).add_(slope * (1 - numbers.beta1))
    second = _widen(moments, 1, device).mul_(numbers.beta2).add_(slope * (1 - numbers.beta2) * slope)
    first, second = first.where(is_finite, 0), second.where(is_finite, 0)
    wide = weights.float()
    step = first / (second.sqrt() + numbers.eps) * numbers.rate
    wide = (wide * numbers.keep + step).where(is_finite, wide)
    rounded = round_stochastically(wide, numbers.key, place)
    stored = [_narrow(moments, index, value) for index, value in enumerate((first, second))]
    weights.copy_(rounded)
    for index, (codes, scales) in enumerate(stored):
        (moments.first, moments.second)[index].copy_(codes)
        if moments.scales is not None:
            moments.scales[index].copy_(scales)


def round_stochastically(wide: Tensor, key: tuple[int, int], place: int) -> Tensor:
    """(n,) bfloat16 of float32 ``wide``: rounded up as often as what 16 bits cut off demands. NaN stays NaN."""
    bits = wide.view(torch.int32) + draw(len(wide), key, place, wide.device)
    bits = torch.where(wide.isnan(), NAN, bits)
    return (bits >> DRAW_BITS).to(torch.int16).view(torch.bfloat16)


def draw(count: int, key: tuple[int, int], place: int, device: torch.device) -> Tensor:
    """(count,) int32 below 2**16, of each place its own; a hash of place and key, so no state and no order."""
    # uint32 arithmetic in int64, whose products wrap but keep the lower 32 bits.
    found = torch.arange(place, place + count, device=device)
    for one in key:
        found = (found + one) & 0xFFFF_FFFF
        found = ((found ^ (found >> 16)) * 0x85EB_CA6B) & 0xFFFF_FFFF  # MurmurHash3's finalizer
        found = ((found ^ (found >> 13)) * 0xC2B2_AE35) & 0xFFFF_FFFF
        found ^= found >> 16
    return (found & 0xFFFF).to(torch.int32)


@dataclass(frozen=True, slots=True)
class Codes:
    """To find the nearest of a map's values for a magnitude from 0 to 1, by its upper bits and one comparison."""

    middles: Tensor
    """(count,) float32: between neighboring values that are not negative, ascending; the last is infinite."""
    starts: Tensor
    """(buckets,) uint8: how many middles lie below a bucket; none holds more than one."""
    zero: int
    """The index of the value 0: the negative values before it mirror those behind it, but for the last."""


@functools.cache
def read_codes(*, is_signed: bool, device: torch.device) -> Codes:
    """Of bitsandbytes' dynamic maps (Dettmers, arXiv:1511.04561), by which it quantizes both averages."""
    from bitsandbytes import functional

    values = functional.create_dynamic_map(signed=is_signed)
    zero = int((values == 0).nonzero())
    values = values[zero:]
    middles = (values[:-1] + values[1:]) / 2
    edges = torch.arange(FIRST_BUCKET, LAST_BUCKET + 2) << BUCKET_SHIFT
    counts = torch.searchsorted(middles, edges.to(torch.int32).view(torch.float32))
    middles = torch.cat([middles, torch.tensor([math.inf])])
    return Codes(middles.to(device), counts[:-1].to(torch.uint8).to(device), zero)


def _widen(moments: Moments, index: int, device: torch.device) -> Tensor:
    """An average in float32, a copy."""
    stored = (moments.first, moments.second)[index].to(device)
    if moments.scales is None or moments.maps is None:
        return stored.clone()
    scales = moments.scales[index].repeat_interleave(BLOCK)[: len(stored)]
    return moments.maps[index][stored.int()] * scales


def _narrow(moments: Moments, index: int, values: Tensor) -> tuple[Tensor, Tensor]:
    """What is stored of an average: codes and scales, or the average itself."""
    if moments.scales is None:
        return values, values
    padded = torch.nn.functional.pad(values, (0, -len(values) % BLOCK)).view(-1, BLOCK)
    scales = padded.abs().amax(1)
    ratios = (padded / scales.clamp_min(torch.finfo(torch.float32).tiny)[:, None]).view(-1)[: len(values)]
    codes = read_codes(is_signed=index == 0, device=values.device)
    sizes = torch.searchsorted(codes.middles, ratios.abs()).clamp_max(len(codes.middles) - 1)
    found = torch.where(ratios < 0, (codes.zero - sizes).clamp_min(0), codes.zero + sizes)
    return found.to(torch.uint8), scales
