"""Q4_K, Q5_K, Q6_K and Q8_0 in NumPy: the same bits as the compiled kernels and as ggml, on any machine, more slowly.

The formats and the rounding, step by step, are ggml's (``make_qkx2_quants``, ``make_qx_quants``,
``quantize_row_*_ref`` in ggml-quants.c, MIT license, by the ggml authors). Sub-blocks stand side by side, (weights of
one, sub-blocks), so that a sum over one runs down a column, in order, as a scalar loop would.
"""

from __future__ import annotations

from typing import NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from bp_merge import Floats

Bytes: TypeAlias = NDArray[np.uint8]
Levels: TypeAlias = NDArray[np.int32]

BLOCK = 256
_TILE = 128 * BLOCK
_EIGHT = 32
_ROUNDER = np.float32(12582912)  # 1.5 * 2^23
_LEAST = np.float32(1e-15)  # a block below this is empty
_ONE, _ZERO = np.float32(1), np.float32(0)


class _Search(NamedTuple):
    top: int
    first: float
    steps: int


_SEARCHES = {4: _Search(15, -1.0, 21), 5: _Search(31, -0.5, 16)}


def quantize_blocks(weights: Floats, bits: int) -> Bytes:
    """Weights as super-blocks of Q4_K, Q5_K or Q6_K, or with 8 bits as blocks of Q8_0.

    Args:
        weights: (n,) float32, finite; n a multiple of 256, or of 32 for 8 bits.
        bits: 4, 5, 6 or 8.

    Returns:
        The blocks' bytes, one after the other.
    """
    with np.errstate(all="ignore"):
        parts = [_quantize_tile(weights[i : i + _TILE], bits) for i in range(0, weights.size, _TILE)]
    return np.concatenate(parts) if parts else np.empty(0, np.uint8)


def _quantize_tile(weights: Floats, bits: int) -> Bytes:
    if bits == 8:
        return _quantize_eight(weights)
    return _quantize_symmetric(weights) if bits == 6 else _quantize_offset(weights, bits)


def _quantize_offset(weights: Floats, bits: int) -> Bytes:
    """A super-block: scale and offset as halves, 8 scales and offsets of 6 bits, then levels (Q4_K, Q5_K)."""
    search = _SEARCHES[bits]
    x = np.ascontiguousarray(weights.reshape(-1, 32).T)  # (32, sub-blocks)
    scale, offset, inverse, lowest = _fit_offset(x, search)
    unit, scales = _scale_scales(scale.reshape(-1, 8))
    shift, offsets = _scale_scales(offset.reshape(-1, 8))
    d = (unit.astype(np.float32)[:, None] * scales).reshape(-1)
    found = _round((x + (shift.astype(np.float32)[:, None] * offsets).reshape(-1)) / d)
    # Where the scale is zero, the levels of the search stay.
    found = np.where(d == 0, _round(inverse * (x - lowest)), found)
    levels = np.clip(found, 0, search.top).T.reshape(-1, 8, 32).astype(np.uint8)
    out = [unit.view(np.uint8).reshape(-1, 2), shift.view(np.uint8).reshape(-1, 2), _pack_scales(scales, offsets)]
    if bits == 5:
        out.append(np.packbits(levels.swapaxes(1, 2) >> 4, axis=2, bitorder="little").reshape(-1, 32))
        levels &= 15
    out.append((levels[:, 0::2] | levels[:, 1::2] << np.uint8(4)).reshape(-1, 128))
    return np.concatenate(out, axis=1).reshape(-1)


def _fit_offset(x: Floats, search: _Search) -> tuple[Floats, Floats, Floats, Floats]:
    """Scale and offset of each sub-block, and the factor and lowest weight that found the levels.

    A first guess from the extremes, then tries near it with the least squares of each; the first with the least error
    stays. A try starts from the best offset so far.
    """
    average = np.sqrt(_sum(x * x) / _EIGHT)
    w = average + np.abs(x)
    sum_w, sum_x = np.add.reduce(w), np.add.reduce(w * x)
    low, high = np.minimum(np.min(x, axis=0), _ZERO), np.max(x, axis=0)
    flat = high == low
    high = np.where(flat, low + _ONE, high)
    top = np.float32(search.top)
    inverse = top / (high - low)
    scale, lowest = _ONE / inverse, low
    error = _weigh_errors(x, w, _find_levels(x, inverse, low, search.top), scale, low)
    inverse = np.where(flat, _ZERO, inverse)
    for step in range(search.steps):
        tried = (np.float32(search.first) + np.float32(0.1) * np.float32(step) + top) / (high - low)
        levels = _find_levels(x, tried, low, search.top)
        weighted = w * levels
        l1, l2, xl = _sum(weighted), _sum(weighted * levels), _sum(weighted * x)
        determinant = sum_w * l2 - l1 * l1
        slope, start = (sum_w * xl - sum_x * l1) / determinant, (l2 * sum_x - l1 * xl) / determinant
        above = start > 0
        slope, start = np.where(above, xl / l2, slope), np.where(above, _ZERO, start)
        found = _weigh_errors(x, w, levels, slope, start)
        better = (determinant > 0) & (found < error) & ~flat
        inverse, lowest = np.where(better, tried, inverse), np.where(better, low, lowest)
        error, scale, low = (
            np.where(better, found, error),
            np.where(better, slope, scale),
            np.where(better, start, low),
        )
    return np.where(flat, _ZERO, scale), -low, inverse, lowest


def _find_levels(x: Floats, inverse: Floats, low: Floats, top: int) -> Floats:
    return np.clip(_round(inverse * (x - low)), 0, top).astype(np.float32)


def _weigh_errors(x: Floats, w: Floats, levels: Floats, scale: Floats, low: Floats) -> Floats:
    difference = scale * levels
    difference += low
    difference -= x
    difference *= difference
    difference *= w
    return _sum(difference)


def _scale_scales(values: Floats) -> tuple[NDArray[np.float16], Bytes]:
    """Eight values of a super-block as 6 bits each, and the half that they are multiples of."""
    largest = np.max(np.where(values > 0, values, _ZERO), axis=1)
    factor = np.where(largest > 0, np.float32(63) / largest, _ZERO)
    rounded = (_round(factor[:, None] * values) & 0xFF).astype(np.uint8)
    return (largest / np.float32(63)).astype(np.float16), np.minimum(rounded, np.uint8(63))


def _pack_scales(scales: Bytes, offsets: Bytes) -> Bytes:
    first, last = slice(0, 4), slice(4, 8)
    parts = [
        scales[:, first] | scales[:, last] >> 4 << 6,
        offsets[:, first] | offsets[:, last] >> 4 << 6,
        (scales[:, last] & 15) | (offsets[:, last] & 15) << 4,
    ]
    return np.concatenate(parts, axis=1)


def _quantize_symmetric(weights: Floats) -> Bytes:
    """A super-block: low and high bits of the levels, 16 scales of 8 bits, and their half (Q6_K)."""
    x = np.ascontiguousarray(weights.reshape(-1, 16).T)  # (16, sub-blocks)
    scale, inverse, empty = _fit_symmetric(x)
    scales = scale.reshape(-1, 16)
    sizes = np.where(np.isnan(scales), _ZERO, np.abs(scales))
    largest = scales[np.arange(len(scales)), np.argmax(sizes, axis=1)]
    is_empty = np.max(sizes, axis=1) < _LEAST
    factor = np.float32(-128) / largest
    half = (_ONE / factor).astype(np.float16)
    steps = np.minimum(_round(factor[:, None] * scales), 127).astype(np.int8)
    d = (half.astype(np.float32)[:, None] * steps).reshape(-1)
    # Where the scale is zero, the levels of the search stay.
    found = np.where(d == 0, np.where(empty, -32, _round(inverse * x)), _round(x / d))
    levels = (np.clip(found, -32, 31) + 32).T.reshape(-1, 2, 4, 32).astype(np.uint8)  # (blocks, half, quarter, weight)
    low, high = levels & 15, levels >> 4
    lows = low[:, :, 0:2] | low[:, :, 2:4] << 4
    highs = high[:, :, 0] | high[:, :, 1] << 2 | high[:, :, 2] << 4 | high[:, :, 3] << 6
    parts = [lows.reshape(-1, 128), highs.reshape(-1, 64), steps.view(np.uint8), half.view(np.uint8).reshape(-1, 2)]
    out: Bytes = np.concatenate(parts, axis=1)
    out[is_empty] = 0
    return out.reshape(-1)


def _fit_symmetric(x: Floats) -> tuple[Floats, Floats, NDArray[np.bool_]]:
    """Scale of each sub-block, the factor that found its levels, and whether it is empty.

    19 tries around -32 / (the weight of largest size), errors weighed by the square of the weight.
    """
    largest = x[np.argmax(np.abs(x), axis=0), np.arange(x.shape[1])]
    empty = np.abs(largest) < _LEAST
    largest = np.where(empty, _ONE, largest)
    square = x * x
    cube = square * x
    scale = best = inverse = np.zeros_like(largest)
    for shift in (0, *range(-9, 0), *range(1, 10)):
        tried = np.negative(np.float32(32) + np.float32(0.1) * np.float32(shift)) / largest
        levels = np.clip(_round(tried * x), -32, 31).astype(np.float32)
        xl, l2 = _sum(cube * levels), _sum(square * levels * levels)
        fitted = xl / l2
        if shift == 0:
            scale = np.where(l2 == 0, _ZERO, fitted)
            best, inverse = scale * xl, tried
            continue
        better = (l2 > 0) & (xl * xl > best * l2)
        best = np.where(better, fitted * xl, best)
        scale, inverse = np.where(better, fitted, scale), np.where(better, tried, inverse)
    return np.where(empty, _ZERO, scale), inverse, empty


def _quantize_eight(weights: Floats) -> Bytes:
    """A block of 32: a half and 32 levels, rounded half away from zero (Q8_0)."""
    x = weights.reshape(-1, 32)
    d = np.max(np.abs(x), axis=1) / np.float32(127)
    scaled = x * np.where(d != 0, _ONE / d, _ZERO)[:, None]
    # A scale too small to divide by leaves no levels.
    scaled = np.where(np.isfinite(scaled), scaled, _ZERO)
    whole = np.trunc(scaled)
    levels = (whole + np.copysign(np.abs(scaled - whole) >= np.float32(0.5), scaled)).astype(np.int8)
    parts = [d.astype(np.float16).view(np.uint8).reshape(-1, 2), levels.view(np.uint8)]
    return np.concatenate(parts, axis=1).reshape(-1)


def _round(values: Floats) -> Levels:
    """To nearest, ties to even: the low bits of a sum that has no room for a fraction, whatever is beyond 22 bits."""
    rounded: Levels = ((values + _ROUNDER).view(np.int32) & 0x7FFFFF) - 0x400000
    return rounded


def _sum(values: Floats) -> Floats:
    """Down each column, in order, from zero."""
    total: Floats = np.add.reduce(values, axis=0, initial=_ZERO)
    return total
