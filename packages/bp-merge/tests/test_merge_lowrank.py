"""Products of thin factors, compiled and not, against float64; and the cut that is built of them."""

import numpy as np
import pytest

from bp_merge import Term, cut_sum, lowrank

TARGETS = lowrank.ROWS.TARGETS if lowrank.ROWS else ()
WAYS = [*range(len(TARGETS)), None]
"""Places of compiled targets, and NumPy alone."""


def use(monkeypatch, way):
    if way is None:
        monkeypatch.setattr(lowrank, "ROWS", None)
    else:
        monkeypatch.setattr(lowrank, "BEST", way)
        monkeypatch.setattr(lowrank, "_HAS_GRAM", True)
        monkeypatch.setattr(lowrank, "_HAS_PRODUCT", True)


def draw(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("is_tall", [True, False])
@pytest.mark.parametrize(
    ("ranks", "length"), [((1,), 1), ((3, 5), 7), ((70, 2, 1), 129), ((64, 64), 2049), ((1,) * 70, 50)]
)
def test_gram_matrices_are_float64s(monkeypatch, ranks, length, is_tall, way):
    use(monkeypatch, way)
    parts = [draw(i, length, r) if is_tall else draw(i, r, length) for i, r in enumerate(ranks)]
    whole = np.concatenate([part if is_tall else part.T for part in parts], axis=1).astype(np.float64)
    expected = whole.T @ whole
    for quick, tolerance in ((True, 2e-6), (False, 1e-12)):
        found = lowrank.compute_gram(parts, is_tall=is_tall, quick=quick)
        assert np.array_equal(found, found.T)
        assert np.abs(found - expected).max() <= tolerance * np.abs(expected).max()


@pytest.mark.parametrize("way", WAYS)
def test_sums_of_products_are_float64s(monkeypatch, way):
    use(monkeypatch, way)
    products = [(draw(i, 37, r), draw(9 + i, r, 130)) for i, r in enumerate((4, 33, 1))]
    expected = sum(b.astype(np.float64) @ a for b, a in products)
    for some in (products, [(np.asfortranarray(b), np.asfortranarray(a)) for b, a in products]):
        assert np.abs(lowrank.sum_products(some) - expected).max() < 1e-5
    first = products[0][0].astype(np.float64) @ products[0][1]
    assert np.abs(lowrank.sum_products(products[:1]) - first).max() < 1e-5


def draw_terms(*, d_out=200, d_in=260, r=24, fall=0.8, alike=0.0):
    """Two products whose sum has falling singular values; ``alike``: how much of the first A is the second's."""
    rng = np.random.default_rng(3)
    sizes = fall ** np.arange(r)
    terms = []
    for weight in (0.7, -1.5):
        b = np.linalg.qr(rng.standard_normal((d_out, r)))[0] * sizes
        a = np.linalg.qr(rng.standard_normal((d_in, r)))[0].T
        if terms and alike:
            a = alike * terms[0].a + (1 - alike) * a
        terms.append(Term(weight, b.astype(np.float32), a.astype(np.float32)))
    return terms


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("alike", [0.0, 0.5, 0.999, 1.0])
def test_a_large_cut_is_the_best_one(monkeypatch, alike, way):
    """The quick way of large factors, by whichever code, against an SVD in float64, to 1e-5 of the largest value."""
    use(monkeypatch, way)
    monkeypatch.setattr(lowrank, "_LARGE", 0)
    terms = draw_terms(alike=alike)
    whole = sum(term.weight * term.b.astype(np.float64) @ term.a for term in terms)
    left, values, right = np.linalg.svd(whole, full_matrices=False)
    for rank in (3, 16, 30):
        found = cut_sum(terms, rank)
        expected = (left[:, :rank] * values[:rank]) @ right[:rank]
        assert np.abs(found.b @ found.a - expected).max() < 1e-5 * values[0]
        assert found.kept == pytest.approx((values[:rank] ** 2).sum() / (values**2).sum(), abs=1e-6)
        kept = found.a[np.abs(found.a).any(axis=1)]
        assert np.abs(kept @ kept.T - np.eye(len(kept))).max() < 1e-3


@pytest.mark.skipif(not TARGETS, reason="not compiled, or no fused multiply-adds here")
@pytest.mark.parametrize(
    "wrong",
    [{"parts": ()}, {"parts": (bytes(10),)}, {"parts": (bytes(8),) * 65}, {"length": 0}, {"length": 2**62},
     {"out": 16}, {"target": 9}, {"parts": (b"",)}],
)  # fmt: skip
def test_the_compiled_gram_refuses_what_does_not_fit(wrong):
    right = {"parts": (bytes(8), bytes(8)), "length": 2, "is_tall": True, "out": 32, "target": 0}
    values = right | wrong
    with pytest.raises(ValueError, match="no such dtype"):
        lowrank.ROWS.gram(*{**values, "out": bytearray(values["out"])}.values())
    for parts, error in (([], TypeError), ((3,), TypeError)):
        with pytest.raises(error):
            lowrank.ROWS.gram(parts, 2, True, bytearray(32), 0)
