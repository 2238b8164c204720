"""The nearest product of a given rank, in the Frobenius norm (Eckart and Young, 1936).

Of a product B @ A the factors are enough: with A = L Q, Q having orthonormal rows, the singular values of B @ A are
those of B L, which is small on one side. L comes from a Cholesky decomposition of A Aᵀ instead of a QR of Aᵀ, and the
singular vectors from the eigenvectors of Lᵀ Bᵀ B L, both in float64: two (R, R) matrices instead of a factorisation of
a (d, R) one, some ten times faster with the BLAS that NumPy brings. The result is B P @ A with an oblique projection
P, so what rounding does to the Gram matrices moves the choice of directions a little and loses nothing of what is kept.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from bp_merge.tensors import Floats

Doubles: TypeAlias = NDArray[np.float64]

_EXACT = 1024
"""Shorter side up to which a whole matrix gets an exact SVD."""
_OVERSAMPLE = 32
_POWERS = 4
_ILL = 1e-10
_WELL = 3e-2
"""Share of the largest pivot that the smallest must reach where Gram matrices are summed in float32."""
_LARGE = 2**18
"""Values of a factor from which speed counts."""
_BLOCK = 2048


@dataclass(frozen=True, slots=True)
class Product:
    """A merged module: ``b @ a`` is its change of the weight, with no further factor."""

    a: Floats
    """(r, d_in)"""
    b: Floats
    """(d_out, r)"""
    kept: float = 1.0
    """Share of the change's squared norm that the cut to rank r kept."""


def cut_product(b: Floats, a: Floats, rank: int) -> Product:
    """The nearest product of ``rank`` to ``b @ a``, which is never formed: (d_out, R), (R, d_in), R ≥ rank.

    A of the result has orthonormal rows (zero ones where ``b @ a`` has a lower rank).
    """
    factor, inverse = _factor_rows(a)
    core = factor.T @ _gram(b.T, quick=b.size > _LARGE) @ factor
    values, vectors = np.linalg.eigh((core + core.T) / 2)  # ascending
    values = np.maximum(values, 0.0)
    top = vectors[:, ::-1][:, :rank]
    total = float(values.sum())
    kept = float(values[::-1][:rank].sum()) / total if total else 1.0
    cut_b = b @ (factor @ top).astype(np.float32)
    cut_a = (top.T @ inverse).astype(np.float32) @ a
    return Product(_pad(cut_a, rank, 0), _pad(cut_b, rank, 1), kept)


def _gram(rows: Floats, *, quick: bool = False) -> Doubles:
    """``rows @ rows.T`` in float64; quick: products in float32, and only their sums over blocks in float64."""
    total = np.zeros((rows.shape[0], rows.shape[0]))
    for start in range(0, rows.shape[1], _BLOCK):
        part: Any = rows[:, start : start + _BLOCK]
        part = part if quick else part.astype(np.float64)
        total += part @ part.T  # NumPy sees the symmetry and computes one half
    return total


def _factor_rows(a: Floats) -> tuple[Any, Any]:
    """As `_factor_gram` of ``a``'s Gram matrix; the quick one where that is good enough for it."""
    if a.size > _LARGE:
        with contextlib.suppress(np.linalg.LinAlgError):
            factor = np.linalg.cholesky(_gram(a, quick=True))
            diagonal = np.diagonal(factor)
            if diagonal.min() > _WELL * diagonal.max():
                return factor, np.linalg.inv(factor)
    return _factor_gram(_gram(a))


def _factor_gram(gram: Doubles) -> tuple[Any, Any]:
    """L (R, k) with L Lᵀ the Gram matrix, and the inverse from the left (k, R); k < R where rows depend on others."""
    try:
        factor = np.linalg.cholesky(gram)
        diagonal = np.diagonal(factor)
        if diagonal.min() > _ILL**0.5 * diagonal.max():
            return factor, np.linalg.inv(factor)
    except np.linalg.LinAlgError:
        pass
    values, vectors = np.linalg.eigh(gram)
    is_kept = values > _ILL * max(float(values[-1]), np.finfo(np.float64).tiny)
    roots = np.sqrt(values[is_kept])
    return vectors[:, is_kept] * roots, (vectors[:, is_kept] / roots).T


def cut_matrix(delta: Floats, rank: int) -> Product:
    """The nearest product of ``rank`` to a whole (d_out, d_in) matrix.

    By SVD where the shorter side is at most 1024; else by subspace iteration with a fixed start (Halko, Martinsson and
    Tropp, arXiv:0909.4061, algorithm 4.4: 32 directions more than asked for, four powers), which for matrices without a
    gap in their singular values loses some per mille of the norm that the exact cut would keep.
    """
    if min(delta.shape) <= _EXACT:
        left, values, right = np.linalg.svd(delta, full_matrices=False)
    else:
        basis = _find_range(delta, rank + _OVERSAMPLE)
        small, values, right = np.linalg.svd(basis.T @ delta, full_matrices=False)
        left = basis @ small
    total = float(np.square(delta, dtype=np.float64).sum())
    kept = float(np.square(values[:rank], dtype=np.float64).sum()) / total if total else 1.0
    return Product(_pad(right[:rank], rank, 0), _pad(left[:, :rank] * values[:rank], rank, 1), min(1.0, kept))


def _find_range(delta: Floats, width: int) -> Floats:
    """Orthonormal columns (d_out, width) that span nearly what the largest singular vectors span."""
    start = np.random.default_rng(0).standard_normal((delta.shape[1], width), np.float32)
    basis = _orthonormal(delta @ start)
    for _ in range(_POWERS):
        basis = _orthonormal(delta @ _orthonormal(delta.T @ basis))
    return basis


def _orthonormal(columns: Floats) -> Floats:
    """Orthonormal columns that span the same: Cholesky twice, which is as good as QR."""
    for _ in range(2):
        _, inverse = _factor_gram(_gram(np.ascontiguousarray(columns.T)))
        columns = columns @ inverse.T.astype(np.float32)
    return columns


def _pad(values: Any, rank: int, axis: int) -> Floats:
    """Zeros up to ``rank`` along an axis, in memory row by row."""
    width = [(0, 0), (0, 0)]
    width[axis] = (0, rank - values.shape[axis])
    return np.ascontiguousarray(np.pad(values, width))
