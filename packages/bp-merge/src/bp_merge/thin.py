"""Products of factors that are long on one side, on one core.

Compiled where that was measured to be faster than the BLAS that NumPy brings (docs/log/2026-11-25-merge.md): Gram
matrices on x86, which cost half of a product that sees no symmetry; other products where vectors have 512 bits, which
OpenBLAS does not use on every processor that has them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from bp_merge.compiled import BEST, ROWS
from bp_merge.tensors import Floats

Doubles: TypeAlias = NDArray[np.float64]

_TARGET = ROWS.TARGETS[BEST] if ROWS is not None else ""
_HAS_GRAM, _HAS_PRODUCT = _TARGET in ("avx2", "avx512"), _TARGET == "avx512"
_BLOCK = 2048
_NO_BASE, _F32_BASE = 0, 2
# What the compiled Gram matrix takes: factors at once, and the sum of their ranks.
_MOST_PARTS, _MOST_RANKS = 64, 2**14


def compute_gram(parts: Sequence[Floats], *, is_tall: bool, quick: bool) -> Doubles:
    """The Gram matrix of factors side by side: ``X.T @ X`` of (d, r_i) tall ones, ``X @ X.T`` of (r_i, d) others.

    In float64, (Σr, Σr); quick: products and their sums over blocks of 2048 in float32, and only the rest in float64.
    """
    size = sum(part.shape[1 if is_tall else 0] for part in parts)
    if quick and ROWS is not None and _HAS_GRAM and size <= _MOST_RANKS:
        if len(parts) > _MOST_PARTS:
            parts = [np.concatenate(parts, axis=1 if is_tall else 0)]
        out = np.zeros((size, size))
        ROWS.gram(tuple(map(np.ascontiguousarray, parts)), parts[0].shape[0 if is_tall else 1], is_tall, out, BEST)
        return out
    rows: Any = np.concatenate([part.T if is_tall else part for part in parts])
    total = np.zeros((rows.shape[0], rows.shape[0]))
    for start in range(0, rows.shape[1], _BLOCK):
        block = rows[:, start : start + _BLOCK]
        block = block if quick else block.astype(np.float64)
        total += block @ block.T  # NumPy sees the symmetry and computes one half
    return total


def sum_products(products: Sequence[tuple[Floats, Floats]]) -> Floats:
    """``Σ b @ a`` in float32: (m, r_i) and (r_i, n) -> (m, n)."""
    if ROWS is None or not _HAS_PRODUCT:
        total: Floats = products[0][0] @ products[0][1]
        for b, a in products[1:]:
            total += b @ a
        return total
    out = np.empty((products[0][0].shape[0], products[0][1].shape[1]), np.float32)
    base, dtype = np.empty(0, np.uint8), _NO_BASE
    for b, a in products:
        rank = int(a.shape[0])
        ROWS.add(base, dtype, np.ascontiguousarray(b), np.ascontiguousarray(a), 1.0, rank, rank, 1, out, BEST)
        base, dtype = out.reshape(-1).view(np.uint8), _F32_BASE
    return out
