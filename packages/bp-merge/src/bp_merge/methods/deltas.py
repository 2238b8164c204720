"""Changes of full weight matrices, formed a few rows at a time from their factors."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np

from bp_merge.adapter import LoraPair
from bp_merge.lowrank import sum_products
from bp_merge.tensors import Floats

_BLOCK = 8 * 2**20  # weights


def iter_blocks(shape: tuple[int, int]) -> Iterator[tuple[int, int]]:
    """First and last row (exclusive) of blocks of about 8 million weights."""
    rows = max(1, _BLOCK // max(1, shape[1]))
    for start in range(0, shape[0], rows):
        yield start, min(start + rows, shape[0])


def read_block(pair: LoraPair, start: int, stop: int) -> Floats:
    """Rows of ``scale * b @ a``: (stop - start, d_in)."""
    return sum_products([(np.multiply(pair.b[start:stop], np.float32(pair.scale)), pair.a)])


def merge_blocks(pairs: Sequence[LoraPair], merge: Callable[[int, list[Floats]], Floats]) -> Floats:
    """A merged change (d_out, d_in) from ``merge(start, blocks)``, which is given the same rows of every change."""
    merged = np.empty(pairs[0].shape, np.float32)
    for start, stop in iter_blocks(pairs[0].shape):
        merged[start:stop] = merge(start, [read_block(pair, start, stop) for pair in pairs])
    return merged


def find_threshold(pair: LoraPair, density: float) -> float:
    """The magnitude that the largest ``density`` of a change's entries reach; 0 where all are kept."""
    kept = int(density * pair.shape[0] * pair.shape[1])
    if density >= 1:
        return 0.0
    if kept == 0:
        return float("inf")
    sizes = np.empty(pair.shape, np.float32)
    for start, stop in iter_blocks(pair.shape):
        np.abs(read_block(pair, start, stop), out=sizes[start:stop])
    flat = sizes.reshape(-1)
    place = flat.size - kept
    flat.partition(place)
    return float(flat[place])
