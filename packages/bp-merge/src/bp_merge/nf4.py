"""A base as QLoRA training saw it: its linear layers through 4 bits and back, in NumPy.

QLoRA (arXiv:2305.14314) packs weights while it loads them, and the adapter learns on what is left. Folded into the
16-bit weights, the adapter may undo rounding that is not there; folded into these, the merge is the model that was
trained. The steps are those of bitsandbytes' ``quantize_4bit``: blocks of 64 weights share a factor, each weight takes
the nearest of 16 values, and factors themselves may take 8 bits (double quantization). Values are bitsandbytes' bit for
bit, but that a mean in another order may move a factor by one of its 256 steps.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from functools import cache
from threading import Lock
from types import MappingProxyType
from typing import Final

import numpy as np

from bp_merge.experts import parse_expert
from bp_merge.tensors import Floats, Raw, StoredTensor, TensorInfo, TensorReader, decode, encode

BLOCK: Final = 64
_GROUP: Final = 256
"""Factors that share a factor of their own."""
_ROWS_WEIGHTS = 2**22

# Quantiles of a normal distribution, scaled to [-1, 1] with an exact zero (QLoRA, appendix E).
VALUES: Final = np.array(
    [
        -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
        -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
        0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
    ],
    np.float32,
)  # fmt: skip
_BOUNDS: Final = (VALUES[:-1] + VALUES[1:]) / np.float32(2)


class Nf4Reader(TensorReader):
    """Reads some weights as what nf4 leaves of them, and all others as they are.

    Args:
        tensors: What can be read, by name.
        packed: Names of the weights that training packed; None for those of all linear layers.
        stored: As `TensorReader`.
        double_quantized: Whether training quantized the blocks' factors too, as `backprop` does.
    """

    def __init__(
        self,
        tensors: Mapping[str, TensorInfo],
        packed: Collection[str] | None = None,
        *,
        stored: Mapping[str, StoredTensor] = MappingProxyType({}),
        double_quantized: bool = True,
    ) -> None:
        super().__init__(tensors, stored)
        names = [name for name, info in tensors.items() if _is_linear(name, info)] if packed is None else packed
        self.packed = frozenset(name for name in names if name in tensors)
        """Names of the weights that are read so."""
        self._double = double_quantized
        self._factors: tuple[str, Floats] | None = None
        self._factors_lock = Lock()

    def read_raw(self, name: str, start: int, stop: int) -> Raw:
        """As `TensorReader.read_raw`: the bytes after 4 bits, in the tensor's dtype."""
        if name not in self.packed:
            return super().read_raw(name, start, stop)
        info = self.tensors[name]
        first, last = _align(start, stop, info)
        weights = decode(super().read_raw(name, first, last), info.dtype).reshape(-1)
        factors = self._find_factors(name)
        at = first * info.columns // BLOCK
        values = round_trip(weights, factors[0, at:], factors[1, at:]).reshape(-1, info.columns)
        return np.frombuffer(bytearray(encode(values[start - first : stop - first], info.dtype)), np.uint8)

    def _find_factors(self, name: str) -> Floats:
        """The factor of each block as it is divided by, and as it is multiplied with: (2, blocks).

        Those of the last weight are kept, since its rows come in several reads.
        """
        with self._factors_lock:
            if self._factors is None or self._factors[0] != name:
                exact = self._read_factors(name)
                used = round_factors(exact) if self._double else exact
                self._factors = (name, np.stack([exact, used]))
            return self._factors[1]

    def _read_factors(self, name: str) -> Floats:
        info = self.tensors[name]
        step = max(BLOCK, _ROWS_WEIGHTS // info.columns // BLOCK * BLOCK)
        parts = []
        for start in range(0, info.rows, step):
            raw = super().read_raw(name, start, min(info.rows, start + step))
            parts.append(find_factors(decode(raw, info.dtype).reshape(-1)))
        return np.concatenate(parts)


def find_factors(weights: Floats) -> Floats:
    """The largest magnitude of each block of 64: (blocks,)."""
    padded = np.pad(np.abs(weights), (0, -weights.size % BLOCK))
    found: Floats = padded.reshape(-1, BLOCK).max(axis=1)
    return found


def round_trip(weights: Floats, factors: Floats, used: Floats) -> Floats:
    """Weights (n,) by way of the nearest of 16 values.

    Args:
        weights: A whole number of blocks, or the tensor's end.
        factors: What each block is divided by.
        used: What its values are multiplied with afterwards.
    """
    blocks = -(-weights.size // BLOCK)
    padded = np.pad(weights, (0, -weights.size % BLOCK)).reshape(blocks, BLOCK)
    scaled = padded * (np.float32(1) / np.maximum(factors[:blocks], np.float32(1e-38)))[:, None]
    codes = np.searchsorted(_BOUNDS, np.clip(scaled, -1, 1))
    rounded: Floats = (VALUES[codes] * used[:blocks, None]).reshape(-1)[: weights.size]
    return rounded


def round_factors(factors: Floats) -> Floats:
    """Double quantization: factors less their mean, in 8 bits by groups of 256, and the mean again."""
    offset = np.float32(factors.mean(dtype=np.float64))
    rest = factors - offset
    padded = np.pad(rest, (0, -rest.size % _GROUP)).reshape(-1, _GROUP)
    largest = np.maximum(np.abs(padded).max(axis=1, keepdims=True), np.float32(1e-38))
    values, bounds = _build_dynamic_map()
    codes = np.searchsorted(bounds, np.clip(padded * (np.float32(1) / largest), -1, 1))
    rounded: Floats = (values[codes] * largest).reshape(-1)[: factors.size] + offset
    return rounded


@cache
def _build_dynamic_map() -> tuple[Floats, Floats]:
    """The 256 values of bitsandbytes' dynamic 8-bit type (arXiv:1511.04561), ascending, and what lies between them."""
    found = [0.0, 1.0]
    for exponent in range(7):
        edges = _space_evenly(2**exponent + 1)
        means = (edges[:-1] + edges[1:]) / np.float32(2)
        scaled = [float(np.float32(10.0 ** (exponent - 6)) * mean) for mean in means]
        found += [*scaled, *(-value for value in scaled)]
    values = np.sort(np.array(found, np.float32))
    return values, (values[:-1] + values[1:]) / np.float32(2)


def _space_evenly(count: int) -> Floats:
    """From 0.1 to 1, counted from both ends with a fused multiply-add, as torch's ``linspace`` in float32 does."""
    first, last, places = np.float32(0.1), np.float32(1), np.arange(count, dtype=np.float64)
    step = np.float64((last - first) / np.float32(count - 1))
    found: Floats = np.where(places < count // 2, first + step * places, last - step * (count - 1 - places))
    return found.astype(np.float32)


def _is_linear(name: str, info: TensorInfo) -> bool:
    """Not experts: transformers 5 has them as parameters, which bitsandbytes leaves as they are."""
    if parse_expert(name) is not None:
        return False
    return len(info.shape) == 2 and ".layers." in f".{name}" and name.endswith("_proj.weight")


def _align(start: int, stop: int, info: TensorInfo) -> tuple[int, int]:
    """Rows around some rows that begin and end between blocks, which run on over rows."""
    while start * info.columns % BLOCK:
        start -= 1
    while stop < info.rows and stop * info.columns % BLOCK:
        stop += 1
    return start, stop
