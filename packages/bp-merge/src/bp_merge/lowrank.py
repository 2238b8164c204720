"""The nearest product of a given rank, in the Frobenius norm (Eckart and Young, 1936).

Of a product B @ A the factors are enough: with A = L Q, Q having orthonormal rows, the singular values of B @ A are
those of B L, which is small on one side. L comes from a Cholesky decomposition of A Aᵀ instead of a QR of Aᵀ, and the
singular vectors from the eigenvectors of Lᵀ Bᵀ B L, both in float64: two (R, R) matrices instead of a factorisation of
a (d, R) one, some ten times faster with the BLAS that NumPy brings. The result is B P @ A with an oblique projection
P, so what rounding does to the Gram matrices moves the choice of directions a little and loses nothing of what is kept.

Products of factors are compiled where that was measured to be faster than the BLAS that NumPy brings
(docs/log/2026-11-25-merge.md): Gram matrices on x86, which cost half of a product that sees no symmetry; other products
where vectors have 512 bits, which OpenBLAS does not use on every processor that has them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from bp_merge.product import BEST, ROWS
from bp_merge.tensors import Floats

Doubles: TypeAlias = NDArray[np.float64]

_TARGET = ROWS.TARGETS[BEST] if ROWS is not None else ""
_HAS_GRAM, _HAS_PRODUCT = _TARGET in ("avx2", "avx512"), _TARGET == "avx512"
_BLOCK = 2048
_NO_BASE, _F32_BASE = 0, 2
# What the compiled Gram matrix takes: factors at once, and the sum of their ranks.
_MOST_PARTS, _MOST_RANKS = 64, 2**14

_EXACT = 1024
"""Shorter side up to which a whole matrix gets an exact SVD."""
_OVERSAMPLE = 32
_POWERS = 4
_ILL = 1e-10
_WELL = 3e-2
"""Share of the largest pivot that the smallest must reach where Gram matrices are summed in float32."""
_LARGE = 2**18
"""Values of a factor from which speed counts."""
_CLEAR = 1e-8
"""Share of the largest eigenvalue from which one is no rounding error."""


@dataclass(frozen=True, slots=True)
class Product:
    """A merged module: ``b @ a`` is its change of the weight, with no further factor."""

    a: Floats
    """(r, d_in)"""
    b: Floats
    """(d_out, r)"""
    kept: float = 1.0
    """Share of the change's squared norm that the cut to rank r kept."""
    squared: float = 0.0
    """The squared norm that it kept; known of what was cut."""


@dataclass(frozen=True, slots=True)
class Term:
    """One of several products to be added: ``weight * b @ a``."""

    weight: float
    b: Floats
    """(d_out, r)"""
    a: Floats
    """(r, d_in)"""


def cut_product(b: Floats, a: Floats, rank: int) -> Product:
    """The nearest product of ``rank`` to ``b @ a``, which is never formed: (d_out, R), (R, d_in), R ≥ rank.

    A of the result has orthonormal rows (zero ones where ``b @ a`` has a lower rank).
    """
    return cut_sum([Term(1.0, b, a)], rank)


def cut_sum(terms: Sequence[Term], rank: int) -> Product:
    """As `cut_product` of the terms' sum, whose factors need not be put side by side; R is the sum of their ranks."""
    bs, ranks = [term.b for term in terms], [term.a.shape[0] for term in terms]
    weights = np.repeat([term.weight for term in terms], ranks)[:, None]
    gram = weights * compute_gram(bs, is_tall=True, quick=sum(b.size for b in bs) > _LARGE) * weights.T
    factor, inverse = _factor_rows([term.a for term in terms])
    core = factor.T @ gram @ factor if inverse is not None else _wrap_triangle(factor, gram)
    values, vectors = np.linalg.eigh(core)  # ascending; of the lower triangle
    values = np.maximum(values, 0.0)
    total = float(values.sum())
    values, top = values[::-1][:rank], vectors[:, ::-1][:, :rank]
    into_b = factor @ top
    # Of an eigenvector L⁻ᵀ v = G L v / value, which saves the inverse where the value is no rounding error.
    is_clear = inverse is None and values[-1] > _CLEAR * values[0]
    into_a = (gram @ into_b / values).T if is_clear else top.T @ (np.linalg.inv(factor) if inverse is None else inverse)
    cuts = np.cumsum(ranks)[:-1]
    parts_b = np.split((weights * into_b).astype(np.float32), cuts)
    parts_a = np.split(into_a.astype(np.float32), cuts, axis=1)
    cut_b = sum_products([(b, part) for b, part in zip(bs, parts_b, strict=True)])
    cut_a = sum_products([(part, term.a) for part, term in zip(parts_a, terms, strict=True)])
    squared = float(values.sum())
    return Product(_pad(cut_a, rank, 0), _pad(cut_b, rank, 1), squared / total if total else 1.0, squared)


def _wrap_triangle(factor: Any, gram: Doubles) -> Doubles:
    """The lower blocks of ``factor.T @ gram @ factor`` for a lower triangular factor: 10 of 16 parts of the work."""
    half = factor.shape[1] // 2
    upper, lower, last = factor[:half, :half], factor[half:, :half], factor[half:, half:]
    left = gram[:, :half] @ upper + gram[:, half:] @ lower
    out = np.zeros_like(gram)
    out[:half, :half] = upper.T @ left[:half] + lower.T @ left[half:]
    out[half:, :half] = last.T @ left[half:]
    out[half:, half:] = last.T @ (gram[half:, half:] @ last)
    return out


def _factor_rows(parts: Sequence[Floats]) -> tuple[Any, Any]:
    """As `_factor_gram` of the stacked rows' Gram matrix; of the quick one, without the inverse, where that will do."""
    if sum(part.size for part in parts) > _LARGE:
        with contextlib.suppress(np.linalg.LinAlgError):
            factor = np.linalg.cholesky(compute_gram(parts, is_tall=False, quick=True))
            diagonal = np.diagonal(factor)
            if diagonal.min() > _WELL * diagonal.max():
                return factor, None
    return _factor_gram(compute_gram(parts, is_tall=False, quick=False))


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
    Tropp, arXiv:0909.4061, algorithm 4.4: 32 directions more than requested, four powers), which for matrices without a
    gap in their singular values loses some per mille of the norm that the exact cut would keep.
    """
    if min(delta.shape) <= _EXACT:
        left, values, right = np.linalg.svd(delta, full_matrices=False)
    else:
        basis = _find_range(delta, rank + _OVERSAMPLE)
        small, values, right = np.linalg.svd(basis.T @ delta, full_matrices=False)
        left = basis @ small
    total = float(np.square(delta, dtype=np.float64).sum())
    squared = float(np.square(values[:rank], dtype=np.float64).sum())
    kept = min(1.0, squared / total) if total else 1.0
    return Product(_pad(right[:rank], rank, 0), _pad(left[:, :rank] * values[:rank], rank, 1), kept, squared)


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
        _, inverse = _factor_gram(compute_gram([columns], is_tall=True, quick=False))
        columns = columns @ inverse.T.astype(np.float32)
    return columns


def _pad(values: Any, rank: int, axis: int) -> Floats:
    """Zeros up to ``rank`` along an axis, in memory row by row."""
    width = [(0, 0), (0, 0)]
    width[axis] = (0, rank - values.shape[axis])
    return np.ascontiguousarray(np.pad(values, width) if width[axis][1] else values)


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
