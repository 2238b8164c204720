"""The product with a fixed order: against torch, against itself in pieces, and without a helpful BLAS."""

import numpy as np
import pytest

from bp_merge import product
from bp_merge.product import multiply_in_order


def build(m, r, n, seed=0):
    random = np.random.default_rng(seed)
    return random.standard_normal((m, r), np.float32) * np.float32(0.02), random.standard_normal((r, n), np.float32)


@pytest.mark.parametrize(
    ("m", "r", "n"),
    [(1, 1, 1), (97, 16, 241), (192, 16, 576), (576, 8, 1536), (110, 33, 720), (192, 128, 576), (192, 192, 576)],
)
def test_it_is_torchs_product_bit_for_bit(m, r, n):
    torch = pytest.importorskip("torch")
    b, a = build(m, r, n)
    assert np.array_equal(multiply_in_order(b, a), (torch.from_numpy(b) @ torch.from_numpy(a)).numpy())


def test_the_slow_way_gives_the_same_bits(monkeypatch):
    b, a = build(110, 16, 500)
    fast = multiply_in_order(b, a)
    monkeypatch.setattr(product, "_sums_in_order", lambda r, height: False)
    assert np.array_equal(multiply_in_order(b, a), fast)


def test_rows_can_be_cut_anywhere():
    b, a = build(200, 16, 300)
    whole = multiply_in_order(b, a)
    for size in (1, 37, 100):
        pieces = [multiply_in_order(b[i : i + size], a) for i in range(0, 200, size)]
        assert np.array_equal(np.concatenate(pieces), whole)


@pytest.mark.parametrize("r", [200, 256, 384, 512])
def test_large_ranks_are_cut_as_torchs_library_cuts_them(r):
    torch = pytest.importorskip("torch")
    b, a = build(192, r, 576)
    theirs = (torch.from_numpy(b) @ torch.from_numpy(a)).numpy()
    # Seen on one CPU; another may cut otherwise, and then the last bits differ, no more.
    assert np.allclose(multiply_in_order(b, a), theirs, rtol=1e-3, atol=1e-5)


def test_the_parts_of_a_rank_cover_it():
    for r in range(1, 800):
        parts = product._cut_rank(r)
        assert [k for start, stop in parts for k in range(start, stop)] == list(range(r))
