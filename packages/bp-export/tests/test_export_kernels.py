"""The three engines against each other, bit for bit: ggml's own quantizer, the compiled kernels, and NumPy.

A share of the blocks by default; `just kernels` runs the campaign of ten million.
"""

import sys
from itertools import islice

import numpy as np
import pytest

from bp_export.errors import GgmlMissingError
from bp_export.quant import describe_kernels
from bp_export.quant import kernels as engines
from bp_export.quant.kernels import TensorType, choose_engine, compute_row_bytes, quantize_rows

KINDS = (TensorType.Q4_K, TensorType.Q5_K, TensorType.Q6_K, TensorType.Q8_0)
TARGETS = engines.TARGETS
BLOCKS, CAMPAIGN = 90, 10_000_000


class Drawn:
    """Weights (blocks, 256) of one family after the other, without end."""

    def __init__(self, seed, blocks):
        self.random, self.shape = np.random.default_rng(seed), (blocks, 256)

    def __iter__(self):
        while True:
            for name, build in self.families().items():
                with np.errstate(all="ignore"):
                    yield name, np.ascontiguousarray(build(), np.float32)

    def plain(self):
        return self.random.standard_normal(self.shape, np.float32)

    def power(self, *size):
        return np.float32(10) ** self.random.integers(-44, 38, size or self.shape).astype(np.float32)

    def bits(self, high):
        return finite(self.random.integers(0, high, self.shape, dtype=np.uint32).view(np.float32))

    def alike(self, size):
        return np.repeat(self.plain().reshape(-1, size)[:, :1], size, axis=1).reshape(self.shape)

    def is_rare(self, share):
        return self.random.random(self.shape) < share

    def one(self, value, others):
        return np.where(np.arange(256) == self.random.integers(0, 256, (self.shape[0], 1)), np.float32(value), others)

    def families(self):
        plain = self.plain
        return {
            "ordinary": lambda: plain() * np.float32(0.02),
            "bf16": lambda: ((plain() * np.float32(0.02)).view(np.uint32) & np.uint32(0xFFFF0000)).view(np.float32),
            "a power for each block": lambda: finite(plain() * self.power(self.shape[0], 1)),
            "a power for each weight": lambda: finite(plain() * self.power()),
            "any bits": lambda: self.bits(2**32),
            "mostly zero": lambda: np.where(self.is_rare(0.9), 0, plain()),
            "zeros of both signs": lambda: np.copysign(np.float32(0), plain()),
            "16 alike": lambda: self.alike(16),
            "32 alike": lambda: self.alike(32),
            "256 alike": lambda: self.alike(256),
            "negative": lambda: -np.abs(plain()),
            "positive": lambda: np.abs(plain()),
            "far from zero": lambda: plain() * np.float32(0.01) - np.float32(1),
            "hardly apart": lambda: plain() * np.float32(1e-7) + np.float32(1),
            "one far out": lambda: self.one(-1e3, plain()),
            "one beyond": lambda: self.one(1e30, plain() * np.float32(1e-3)),
            "whole numbers": lambda: self.random.integers(-3, 4, self.shape),
            "halves": lambda: self.random.integers(-40, 41, self.shape) / 2,
            "subnormal": lambda: self.bits(2**23) * np.sign(plain()),
            "near the least": lambda: plain() * np.float32(1e-15),
            "the largest": lambda: np.copysign(np.float32(3.4e38), plain()),
            "infinities": lambda: np.where(self.is_rare(0.01), np.copysign(np.float32(np.inf), plain()), plain()),
        }


def finite(x):
    return np.nan_to_num(x, posinf=3e38, neginf=-3e38)


FAMILIES = len(Drawn(0, 1).families())


def compare(x, kind, name, others=("numpy", *TARGETS)):
    """Each engine's bytes with ggml's."""
    expected = quantize_rows(x, kind, engine="ggml").reshape(len(x), -1)
    for other in others:
        if other == "numpy":
            found = quantize_rows(x, kind, engine="numpy")
        elif kind in engines._COMPILED:
            found = engines.quantize_compiled(x, kind, TARGETS.index(other))
        else:
            continue
        wrong = np.flatnonzero((found.reshape(expected.shape) != expected).any(axis=1))
        assert not wrong.size, f"{kind.name}, {other}, {name}: {wrong.size} blocks, first {x[wrong[0]].tolist()}"


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_all_engines_give_ggmls_bytes(kind):
    for name, x in islice(Drawn(int(kind), BLOCKS), FAMILIES):
        compare(x, kind, name)


@pytest.mark.parametrize("kind", engines._GGUF_PY, ids=lambda kind: kind.name)
def test_without_ggml_the_fallback_types_are_ggmls_too(kind):
    """q4_k_m of a row that is no multiple of 256 is Q5_0; it needs no library of one maintainer."""
    for name, x in islice(Drawn(int(kind), BLOCKS), FAMILIES):
        expected, found = (quantize_rows(x, kind, engine=engine) for engine in ("ggml", "numpy"))
        assert np.array_equal(found, expected), name


@pytest.mark.slow
@pytest.mark.timeout(0)
@pytest.mark.parametrize("kind", KINDS[:3], ids=lambda kind: kind.name)
def test_all_engines_give_ggmls_bytes_on_ten_million_blocks(kind):
    done = 0
    for name, x in Drawn([2026, int(kind)], 4093):
        compare(x, kind, name)
        done += len(x)
        if done * 3 >= CAMPAIGN:
            return


@pytest.mark.parametrize("count", range(1, 6))
@pytest.mark.parametrize("kind", KINDS[:3], ids=lambda kind: kind.name)
def test_any_number_of_blocks_will_do(kind, count):
    x = np.random.default_rng(count).standard_normal((count, 256), np.float32)
    compare(x, kind, count)
    assert quantize_rows(x[:0], kind).size == 0


def test_rows_are_independent():
    x = np.random.default_rng(0).standard_normal((7, 768), np.float32)
    for kind in KINDS:
        parts = [quantize_rows(x[i : i + 1], kind) for i in range(7)]
        assert np.array_equal(np.concatenate(parts), quantize_rows(x, kind))
        assert len(parts[0]) == compute_row_bytes(kind, 768)


def test_the_engine_is_told_and_falls_back(monkeypatch):
    assert (describe_kernels() == f"compiled ({TARGETS[-1]})") == bool(TARGETS)
    monkeypatch.setattr(engines, "TARGETS", ())
    assert choose_engine(TensorType.Q4_K) == describe_kernels() == "ggml"
    monkeypatch.setattr(engines, "_find_library", fail_to_find)
    engines.load_ggml.cache_clear()
    assert choose_engine(TensorType.Q4_K) == describe_kernels() == "numpy"
    assert choose_engine(TensorType.BF16) == "numpy"
    for kind, is_weighted in ((TensorType.IQ4_XS, False), (TensorType.Q4_K, True)):
        with pytest.raises(GgmlMissingError):
            choose_engine(kind, is_weighted=is_weighted)
    monkeypatch.undo()
    engines.load_ggml.cache_clear()


def fail_to_find():
    raise GgmlMissingError("hidden")


@pytest.mark.skipif(not TARGETS, reason="the package was built without a compiler")
@pytest.mark.parametrize("wrong", [(7, 1024, 144, 0), (4, 1000, 144, 0), (4, 1024, 143, 0), (4, 1024, 144, 9)])
def test_the_compiled_kernels_refuse_what_does_not_fit(wrong):
    bits, rows, out, target = wrong
    with pytest.raises(ValueError, match="no such type"):
        engines._kernels.quantize(bits, bytes(rows), bytearray(out), target)


def test_the_module_is_compiled_where_this_machine_has_a_compiler():
    """The optional build must not fail unseen: with a compiler and Python's headers the kernels are there."""
    import shutil
    import sysconfig
    from pathlib import Path

    if shutil.which("cc") is None or not (Path(sysconfig.get_path("include")) / "Python.h").is_file():
        pytest.skip("no compiler, or no headers")
    assert sys.platform == "win32" or TARGETS
