"""bitsandbytes' nf4 weights as dense ones, both levels of scales in one launch.

A weight is a 4-bit index into 16 levels times the scale of its 64; with double quantization that scale is an 8-bit
index into 256 levels times the scale of its 256, plus an offset (Dettmers et al., arXiv:2305.14314). bitsandbytes reads
these in three launches; the kernel here in one. Elsewhere (CPU, no Triton, other block sizes) it is bitsandbytes' own
function, and both give the same bits.
"""

from __future__ import annotations

import functools
from importlib.util import find_spec
from typing import Any

import torch

_BLOCK, _BLOCK_2 = 64, 256


def dequantize(weight: torch.Tensor, state: Any) -> torch.Tensor:
    """(N, K) in the state's dtype.

    Args:
        weight: Packed nf4, two weights a byte, the first in the upper half.
        state: bitsandbytes' ``QuantState``.
    """
    kernel = _load_kernel() if weight.is_cuda and _is_covered(state) else None
    if kernel is None:
        from bitsandbytes.functional import dequantize_4bit

        kernel = dequantize_4bit
    found: torch.Tensor = kernel(weight, state)
    return found


def _is_covered(state: Any) -> bool:
    return bool(
        state.nested
        and state.quant_type == "nf4"
        and state.blocksize == _BLOCK
        and state.state2.blocksize == _BLOCK_2
        and state.dtype in (torch.bfloat16, torch.float16, torch.float32)
    )


@functools.cache
def _load_kernel() -> Any:
    """The Triton kernel's launcher, or None where there is no Triton."""
    if find_spec("triton") is None:
        return None
    from bp_train_cuda.model import nf4_triton

    return nf4_triton.dequantize
