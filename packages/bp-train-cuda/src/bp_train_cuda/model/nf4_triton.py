"""The Triton kernel of `bp_train_cuda.model.nf4`."""
# mypy: disable-error-code="import-untyped,import-not-found,no-untyped-def,untyped-decorator"
# ruff: noqa: ANN001, N803  # pointers have no types, and Triton writes constants in capitals

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

_BYTES = 1024
"""Packed bytes of a program: 2,048 weights."""


@triton.jit
def _dequantize(  # noqa: PLR0917
    packed, scales, levels_2, scales_2, offset, levels, out, count, BYTES: tl.constexpr
) -> None:  # pragma: no cover  # compiled for the GPU
    # One byte holds two weights, so a block of 64 weights is 32 bytes, and 256 such blocks share a second scale.
    at = tl.program_id(0).to(tl.int64) * BYTES + tl.arange(0, BYTES)
    inside = at < count
    both = tl.load(packed + at, mask=inside, other=0).to(tl.int32)
    block = at // 32
    index = tl.load(scales + block, mask=inside, other=0).to(tl.int32)
    scale = tl.load(levels_2 + index) * tl.load(scales_2 + block // 256, mask=inside, other=0.0)
    scale = scale + tl.load(offset)
    high = tl.load(levels + (both >> 4)) * scale
    low = tl.load(levels + (both & 15)) * scale
    place = tl.program_id(0).to(tl.int64) * (2 * BYTES) + tl.arange(0, 2 * BYTES)
    tl.store(out + place, tl.interleave(high, low), mask=place < 2 * count)


def dequantize(weight: torch.Tensor, state: Any) -> torch.Tensor:
    """(N, K) in the state's dtype, of a doubly quantized nf4 weight with an even number of elements."""
    out = torch.empty(state.shape, dtype=state.dtype, device=weight.device)
    count = out.numel() // 2
    # No fused multiply-add: bitsandbytes rounds the product before it adds the offset.
    _dequantize[(triton.cdiv(count, _BYTES),)](
        weight, state.absmax, state.state2.code, state.state2.absmax, state.offset, state.code, out, count,
        BYTES=_BYTES, enable_fp_fusion=False,
    )  # fmt: skip
    return out
