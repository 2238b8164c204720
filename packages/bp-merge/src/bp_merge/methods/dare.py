"""DARE (Yu et al., arXiv:2311.03099): drop entries at random, scale the rest up, add.

Of each change of a weight every entry stays with probability ``density`` and is divided by it; then the weighted sum is
taken. In the space of ΔW. The draws depend on the seed, the module and the adapter's place alone. The result has full
rank and is cut.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence

import numpy as np

from bp_merge.adapter import LoraPair
from bp_merge.lowrank import Product, cut_matrix
from bp_merge.methods.deltas import merge_blocks
from bp_merge.methods.options import ModulePlan
from bp_merge.tensors import Floats


def merge(pairs: Sequence[LoraPair], plan: ModulePlan) -> Product:
    """The merged change, cut to the plan's rank."""
    return cut_matrix(merge_change(pairs, plan), plan.rank)


def merge_change(pairs: Sequence[LoraPair], plan: ModulePlan) -> Floats:
    """The merged change before the cut: (d_out, d_in)."""
    name = zlib.crc32(plan.module.encode())
    draws = [np.random.default_rng((plan.seed, name, place)) for place in range(len(pairs))]

    def merge_rows(_start: int, blocks: list[Floats]) -> Floats:
        total = np.zeros_like(blocks[0])
        for block, weight, draw in zip(blocks, plan.weights, draws, strict=True):
            stays = draw.random(block.shape, np.float32) < plan.density
            total += np.where(stays, block * np.float32(weight / plan.density), 0)
        return total

    return merge_blocks(pairs, merge_rows)
