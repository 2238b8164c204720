"""The Triton kernel of `bp_train_cuda.optim.adamw_update`: one pass over weight, gradient and state."""
# mypy: disable-error-code="import-untyped,import-not-found,no-untyped-def,untyped-decorator"
# ruff: noqa: ANN001, ANN202, N803  # pointers have no types, and Triton writes constants in capitals

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from bp_train_cuda.optim.adamw_update import (
    BLOCK,
    BUCKET_SHIFT,
    FIRST_BUCKET,
    LAST_BUCKET,
    NAN,
    Moments,
    Numbers,
    read_codes,
)

_BLOCKS = 4
"""Blocks of a program: 1,024 weights."""
_LEAST = tl.constexpr(torch.finfo(torch.float32).tiny)
_SHIFT, _BUCKET, _NAN = tl.constexpr(BUCKET_SHIFT), tl.constexpr(FIRST_BUCKET), tl.constexpr(NAN)
_LAST = tl.constexpr(LAST_BUCKET - FIRST_BUCKET)


@triton.jit
def _mix(found):  # pragma: no cover  # compiled for the GPU
    found = (found ^ (found >> 16)) * 0x85EBCA6B
    found = (found ^ (found >> 13)) * 0xC2B2AE35
    return found ^ (found >> 16)


@triton.jit
def _quantize(value, scale, middles, starts, ZERO: tl.constexpr):  # pragma: no cover
    ratio = tl.div_rn(value, tl.maximum(scale, _LEAST))
    size = tl.abs(ratio)
    # Of a float's bits the upper ones say where among the middles it lies, but for one comparison.
    bucket = (size.to(tl.int32, bitcast=True) >> _SHIFT) - _BUCKET
    start = tl.load(starts + tl.minimum(tl.maximum(bucket, 0), _LAST)).to(tl.int32)
    start += (size > tl.load(middles + start)).to(tl.int32)
    return tl.where(ratio < 0, tl.maximum(ZERO - start, 0), ZERO + start)


@triton.jit(do_not_specialize=["place", "key_1", "key_2"])
def _update(  # noqa: PLR0917
    weights, gradients, firsts, seconds, scales_1, scales_2, map_1, map_2, middles_1, starts_1, middles_2, starts_2,
    count, place, beta1, rest1, beta2, rest2, eps, rate, keep, key_1, key_2,
    ZERO_1: tl.constexpr, ZERO_2: tl.constexpr, IS_8BIT: tl.constexpr, BLOCK: tl.constexpr, BLOCKS: tl.constexpr,
) -> None:  # pragma: no cover  # fmt: skip
    block = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)
    at = block[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    inside = at < count
    wide = tl.load(weights + at, mask=inside, other=0).to(tl.float32)
    slope = tl.load(gradients + at, mask=inside, other=0).to(tl.float32)
    finite = tl.abs(slope) < float("inf")
    slope = tl.where(finite, slope, 0.0)
    if IS_8BIT:
        live = block * BLOCK < count
        scale_1 = tl.load(scales_1 + block, mask=live, other=0.0)
        scale_2 = tl.load(scales_2 + block, mask=live, other=0.0)
        first = tl.load(map_1 + tl.load(firsts + at, mask=inside, other=0).to(tl.int32)) * scale_1[:, None]
        second = tl.load(map_2 + tl.load(seconds + at, mask=inside, other=0).to(tl.int32)) * scale_2[:, None]
    else:
        first = tl.load(firsts + at, mask=inside, other=0.0)
        second = tl.load(seconds + at, mask=inside, other=0.0)
    first = tl.where(finite, first * beta1 + slope * rest1, 0.0)
    second = tl.where(finite, second * beta2 + slope * rest2 * slope, 0.0)
    step = tl.div_rn(first, tl.sqrt_rn(second) + eps) * rate
    wide = tl.where(finite, wide * keep + step, wide)
    # Stochastic rounding: the draw carries into the upper half as often as the lower half's size demands.
    found = _mix((at + place).to(tl.uint32) + key_1.to(tl.uint32))
    found = _mix(found + key_2.to(tl.uint32)) & 0xFFFF
    bits = wide.to(tl.int32, bitcast=True) + found.to(tl.int32)
    bits = tl.where(wide == wide, bits, _NAN) >> 16  # noqa: PLR0124  # a NaN equals nothing
    tl.store(weights + at, bits.to(tl.int16).to(tl.bfloat16, bitcast=True), mask=inside)
    if IS_8BIT:
        first, second = tl.where(inside, first, 0.0), tl.where(inside, second, 0.0)
        scale_1, scale_2 = tl.max(tl.abs(first), 1), tl.max(second, 1)
        tl.store(scales_1 + block, scale_1, mask=live)
        tl.store(scales_2 + block, scale_2, mask=live)
        code_1 = _quantize(first, scale_1[:, None], middles_1, starts_1, ZERO_1)
        code_2 = _quantize(second, scale_2[:, None], middles_2, starts_2, ZERO_2)
        tl.store(firsts + at, code_1.to(tl.uint8), mask=inside)
        tl.store(seconds + at, code_2.to(tl.uint8), mask=inside)
    else:
        tl.store(firsts + at, first, mask=inside)
        tl.store(seconds + at, second, mask=inside)


def update(weights: torch.Tensor, gradients: torch.Tensor, moments: Moments, numbers: Numbers, place: int) -> None:
    """As `bp_train_cuda.optim.adamw_update.update`, to the same bits."""
    device, count = weights.device, len(weights)
    codes = [read_codes(is_signed=is_signed, device=device) for is_signed in (True, False)]
    tables = [table for one in codes for table in (one.middles, one.starts)]
    nothing: Any = (tables[0], tables[0])
    # No fused multiply-add: the torch form rounds every product.
    _update[(triton.cdiv(count, _BLOCKS * BLOCK),)](
        weights, gradients, moments.first, moments.second, *(moments.scales or nothing), *(moments.maps or nothing),
        *tables, count, place, numbers.beta1, 1 - numbers.beta1, numbers.beta2, 1 - numbers.beta2, numbers.eps,
        numbers.rate, numbers.keep, *numbers.key, ZERO_1=codes[0].zero, ZERO_2=codes[1].zero,
        IS_8BIT=moments.scales is not None, BLOCK=BLOCK, BLOCKS=_BLOCKS, enable_fp_fusion=False,
    )  # fmt: skip
