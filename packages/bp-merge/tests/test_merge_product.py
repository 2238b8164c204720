"""The product with a fixed order: against torch, against itself in pieces, and without a helpful BLAS."""

import numpy as np
import pytest

from bp_merge import decode, encode, product, round_to, tensors
from bp_merge.product import add_in_order, multiply_in_order


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
    monkeypatch.setattr(product, "ROWS", None)
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


TARGETS = product.ROWS.TARGETS if product.ROWS else ()
SHAPES = [(1, 1, 1), (5, 3, 70), (97, 16, 1536), (33, 255, 200), (12, 200, 576), (9, 512, 130), (7, 384, 100)]


@pytest.mark.parametrize("target", range(len(TARGETS)), ids=TARGETS)
@pytest.mark.parametrize(("m", "r", "n"), SHAPES)
def test_the_compiled_rows_are_numpys_bit_for_bit(monkeypatch, m, r, n, target):
    b, a = build(m, r, n)
    base = np.random.default_rng(1).standard_normal((m, n), np.float32)
    monkeypatch.setattr(product, "BEST", target)
    found = multiply_in_order(b, a)
    added = {
        dtype: add_in_order(np.frombuffer(encode(base, dtype), np.uint8), dtype, b, a, -1.5)
        for dtype in ("BF16", "F32")
    }
    monkeypatch.setattr(product, "ROWS", None)
    expected = multiply_in_order(b, a)
    assert np.array_equal(found.view(np.uint32), expected.view(np.uint32))
    for dtype, values in added.items():
        sums = round_to(expected * np.float32(-1.5) + round_to(base, dtype), dtype)
        assert np.array_equal(values.view(np.uint32), sums.view(np.uint32)), dtype
    assert add_in_order(np.empty(0, np.uint8), "BF16", b, a, 1.0) is None


@pytest.mark.parametrize("target", range(len(TARGETS)), ids=TARGETS)
def test_every_bfloat16_and_its_neighbours_round_alike(monkeypatch, target):
    halves = np.arange(2**16, dtype=np.uint32) << 16
    ends = [0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF]
    values = np.concatenate([halves + np.uint32(end) for end in ends] + [halves[:5] + 0x8000]).view(np.float32)
    monkeypatch.setattr(tensors, "BEST", target)
    found, wide = bytes(encode(values, "BF16")), decode(encode(values, "BF16"), "BF16")
    monkeypatch.setattr(tensors, "ROWS", None)
    assert found == bytes(encode(values, "BF16"))
    assert np.array_equal(wide.view(np.uint32), decode(found, "BF16").view(np.uint32))


@pytest.mark.skipif(not TARGETS, reason="not compiled, or no fused multiply-adds here")
@pytest.mark.parametrize(
    "wrong",
    [
        *({"dtype": 3}, {"step": 0}, {"parts": 5}, {"target": 9}, {"out": 5}, {"base": 3}),
        *({"rank": 2**62}, {"step": 2**62, "parts": 5}),
    ],
)
def test_the_compiled_rows_refuse_what_does_not_fit(wrong):
    right = {
        "base": 6,
        "dtype": 1,
        "b": 4,
        "a": 12,
        "scale": 1.0,
        "rank": 1,
        "step": 1,
        "parts": 1,
        "out": 12,
        "target": 0,
    }
    values = right | wrong
    for name in ("base", "b", "a", "out"):
        values[name] = bytearray(values[name])
    with pytest.raises(ValueError, match="no such dtype"):
        product.ROWS.add(*values.values())
