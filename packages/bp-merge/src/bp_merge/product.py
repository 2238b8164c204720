"""B @ A in one fixed order of summation, whatever BLAS NumPy came with.

A float32 product depends on the order in which its terms are added. torch's CPU product adds them in order of k, each
with one fused multiply-add; so does the main loop of OpenBLAS, but its Haswell and Zen kernels sum the first and last
eight columns of a panel, and rows beyond a multiple of twelve, in another order (measured; about 2 % of a product's
values then differ in the last bits). So BLAS only gets blocks whose edges are thrown away, and only where a trial
shows that it sums in order; elsewhere the fused steps are reproduced in float64, which is slow and gives the same bits.

Ranks above 192 are summed in parts, as torch's library (MKL) was seen to do: two halves below 384, else parts of 192.
"""

from __future__ import annotations

from functools import cache

import numpy as np
from numpy.typing import NDArray

try:
    from bp_merge import _rows
except ImportError:  # no compiler when the package was installed
    _rows = None  # type: ignore[assignment]

ROWS = _rows if _rows is not None and _rows.TARGETS else None
"""The compiled arithmetic of rows (``native/``); None if built without a compiler, or without fused multiply-adds."""

BEST = len(_rows.TARGETS) - 1 if ROWS else -1
"""Its fastest target here."""

_ROWS = 96
_FEW_ROWS = 12
_EDGE = 8
_COLUMNS = 256 - 2 * _EDGE
_SLOW_ROWS = 16
_LONGEST_SUM = 192
# How the compiled rows know dtypes.
_DTYPES = {"BF16": 1, "F32": 2}


def multiply_in_order(b: NDArray[np.float32], a: NDArray[np.float32]) -> NDArray[np.float32]:
    """``b @ a`` with the r terms of each value added in order, by fused multiply-add: (m, r) @ (r, n) -> (m, n).

    Any subset of rows gives the same bits as the whole product.
    """
    if ROWS is not None:
        return _add_compiled(np.empty(0, np.uint8), 0, b, a, 1.0)
    total = np.zeros((b.shape[0], a.shape[1]), np.float32)
    for start, stop in _cut_rank(int(b.shape[1])):
        total += _multiply_part(np.ascontiguousarray(b[:, start:stop]), a[start:stop])
    return total


def add_in_order(
    base: NDArray[np.uint8], dtype: str, b: NDArray[np.float32], a: NDArray[np.float32], scale: float
) -> NDArray[np.float32] | None:
    """Rows of a base, as bytes of a dtype, plus ``scale * (b @ a)``, rounded once to the dtype: (m, n), float32.

    The product is `multiply_in_order`'s. None where it was not compiled, or not for this dtype.
    """
    if ROWS is None or dtype not in _DTYPES:
        return None
    return _add_compiled(base, _DTYPES[dtype], b, a, scale)


def _add_compiled(
    base: NDArray[np.uint8], dtype: int, b: NDArray[np.float32], a: NDArray[np.float32], scale: float
) -> NDArray[np.float32]:
    if ROWS is None:
        raise RuntimeError("the rows are not compiled")
    b, a = np.ascontiguousarray(b), np.ascontiguousarray(a)
    out = np.empty((b.shape[0], a.shape[1]), np.float32)
    parts = _cut_rank(int(b.shape[1]))
    ROWS.add(base, dtype, b, a, scale, int(b.shape[1]), parts[0][1], len(parts), out, BEST)
    return out


def _cut_rank(r: int) -> list[tuple[int, int]]:
    """Parts of the sum over r, which are added one to the next."""
    step = r if r <= _LONGEST_SUM else r // 2 if r < 2 * _LONGEST_SUM else _LONGEST_SUM
    starts = list(range(0, r, step)) if r % step == 0 or step == _LONGEST_SUM else [0, step]
    return list(zip(starts, [*starts[1:], r], strict=True))


def _multiply_part(b: NDArray[np.float32], a: NDArray[np.float32]) -> NDArray[np.float32]:
    r = int(b.shape[1])
    if not (_sums_in_order(r, _ROWS) and _sums_in_order(r, _FEW_ROWS)):
        return _multiply_slowly(b, a)
    (m, n), padded = (b.shape[0], a.shape[1]), _pad_columns(a)
    out = np.empty((m, n), np.float32)
    for top in _cut_rows(m):
        height = _ROWS if top + _ROWS <= m else _FEW_ROWS
        rows = _pad_rows(b[top : top + height], height)
        for left in range(0, n, _COLUMNS):
            block = _multiply_block(rows, padded[:, left : left + _COLUMNS + 2 * _EDGE])
            out[top : top + height, left : left + _COLUMNS] = block[: m - top, : n - left]
    return out


def _cut_rows(m: int) -> list[int]:
    """First rows of blocks: as many of 96 as fit, then blocks of 12."""
    whole = m - m % _ROWS
    return [*range(0, whole, _ROWS), *range(whole, m, _FEW_ROWS)]


def _pad_columns(a: NDArray[np.float32]) -> NDArray[np.float32]:
    """``a`` with eight columns before it and enough after it for whole blocks."""
    after = -a.shape[1] % _COLUMNS + _EDGE
    return np.pad(a, ((0, 0), (_EDGE, after)))


def _pad_rows(b: NDArray[np.float32], height: int) -> NDArray[np.float32]:
    return b if b.shape[0] == height else np.pad(b, ((0, height - b.shape[0]), (0, 0)))


def _multiply_block(rows: NDArray[np.float32], columns: NDArray[np.float32]) -> NDArray[np.float32]:
    """A block's product without its edge columns: (h, r) @ (r, 256) -> (h, 240)."""
    block: NDArray[np.float32] = rows @ columns
    return block[:, _EDGE:-_EDGE]


@cache
def _sums_in_order(r: int, height: int) -> bool:
    """Whether this machine's BLAS adds the r terms in order in blocks of this height; a trial, once for each r."""
    random = np.random.default_rng(r)
    b = random.standard_normal((height, r), np.float32)
    a = random.standard_normal((r, _COLUMNS + 2 * _EDGE), np.float32)
    return bool(np.array_equal(_multiply_block(b, a), _multiply_slowly(b, a[:, _EDGE:-_EDGE])))


def _multiply_slowly(b: NDArray[np.float32], a: NDArray[np.float32]) -> NDArray[np.float32]:
    """Fused multiply-adds by way of float64: the product of two float32 is exact there, and the sum all but exact."""
    wide = a.astype(np.float64)
    out = np.zeros((b.shape[0], a.shape[1]), np.float32)
    for top in range(0, b.shape[0], _SLOW_ROWS):
        rows = b[top : top + _SLOW_ROWS].astype(np.float64)
        total = out[top : top + _SLOW_ROWS]
        for k in range(b.shape[1]):
            total[:] = rows[:, k : k + 1] * wide[k] + total
    return out
