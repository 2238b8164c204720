"""MagMax (Marczak et al., arXiv:2407.06322): entry by entry the change of the largest magnitude, the later of equals.

Meant for adapters that were trained one after the other, each from the last. In the space of ΔW; the result is cut.
"""

from __future__ import annotations

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

    def merge_rows(_start: int, blocks: list[Floats]) -> Floats:
        largest = blocks[0]
        for block in blocks[1:]:
            np.copyto(largest, block, where=np.abs(block) >= np.abs(largest))
        return largest * np.float32(plan.scale)

    return merge_blocks(pairs, merge_rows)
