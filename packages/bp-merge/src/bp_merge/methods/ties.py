"""TIES (Yadav et al., arXiv:2306.01708): trim, elect signs, mean of those that agree; over all adapters at once.

Of each change of a weight the largest entries stay (``density``, 0.2 in the paper), the sign of the weighted sum is
elected entry by entry (0 counts as +), and the weighted mean of the entries of that sign is taken, divided by the
weights of those alone. In the space of ΔW; the paper trims over a whole model, here each weight for itself, as PEFT and
mergekit do. The result has full rank and is cut.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from bp_merge.adapter import LoraPair
from bp_merge.lowrank import Product, cut_matrix
from bp_merge.methods.deltas import find_threshold, merge_blocks
from bp_merge.methods.options import ModulePlan
from bp_merge.tensors import Floats


def merge(pairs: Sequence[LoraPair], plan: ModulePlan) -> Product:
    """The merged change, cut to the plan's rank."""
    return cut_matrix(merge_change(pairs, plan), plan.rank)


def merge_change(pairs: Sequence[LoraPair], plan: ModulePlan) -> Floats:
    """The merged change before the cut: (d_out, d_in), times ``plan.scale``."""
    thresholds = [find_threshold(pair, plan.density) for pair in pairs]

    def merge_rows(_start: int, blocks: list[Floats]) -> Floats:
        for block, threshold in zip(blocks, thresholds, strict=True):
            block[np.abs(block) < threshold] = 0
        return elect(blocks, plan.shares) * np.float32(plan.scale)

    return merge_blocks(pairs, merge_rows)


def elect(changes: Sequence[Floats], weights: Sequence[float]) -> Floats:
    """Entry by entry the weighted mean of the changes whose sign is that of their weighted sum."""
    total = sum(np.float32(w) * change for w, change in zip(weights, changes, strict=True))
    is_positive = np.asarray(total) >= 0
    summed, weight = np.zeros_like(changes[0]), np.zeros_like(changes[0])
    for w, change in zip(weights, changes, strict=True):
        agrees = np.where(is_positive, change > 0, change < 0)
        summed += np.where(agrees, np.float32(w) * change, 0)
        weight += agrees * np.float32(w)
    weight[weight == 0] = 1
    summed /= weight
    return summed
