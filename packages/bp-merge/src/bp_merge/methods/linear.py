"""Weighted mean of changes: ΔW = Σ w_i s_i B_i A_i, cut back to rank (model soups, arXiv:2203.05482).

Exact in the space of ΔW: the factors are put side by side and the product is cut once. Averaging A and B apart would
add cross terms B_i A_j of adapters that never met.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from bp_merge.adapter import LoraPair
from bp_merge.lowrank import Product, Term, cut_sum
from bp_merge.methods.options import ModulePlan
from bp_merge.tensors import Floats


def stack_factors(pairs: Sequence[LoraPair], weights: Sequence[float]) -> tuple[Floats, Floats]:
    """B (d_out, Σr) and A (Σr, d_in) whose product is Σ w_i s_i B_i A_i."""
    factors = [np.float32(w * pair.scale) for w, pair in zip(weights, pairs, strict=True)]
    b = np.concatenate([pair.b * factor for pair, factor in zip(pairs, factors, strict=True)], axis=1)
    return b, np.concatenate([pair.a for pair in pairs])


def merge(pairs: Sequence[LoraPair], plan: ModulePlan) -> Product:
    """The nearest product of the plan's rank to the weighted sum."""
    if sum(pair.a.shape[0] for pair in pairs) == plan.rank:
        b, a = stack_factors(pairs, plan.weights)
        return Product(a, b)
    terms = [Term(w * pair.scale, pair.b, pair.a) for w, pair in zip(plan.weights, pairs, strict=True)]
    return cut_sum(terms, plan.rank)
