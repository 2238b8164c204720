"""The product with a fixed order: against torch, against itself in pieces, and without a helpful BLAS."""

import numpy as np
import pytest

from bp_merge import product
from bp_merge.product import multiply_in_order


def build(m, r, n, seed=0):
    random = np.random.default_rng(seed)
    return random.standard_normal((m, r), np.float32) * np.float32(0.02), random.standard_normal((r, n), np.float32)


@pytest.mark.parametrize(
    ("m", "r", "n"), [(1, 1, 1), (97, 16, 241), (192, 16, 576), (576, 8, 1536), (110, 33, 720)]
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
