"""Factors side by side: exactly Σ w_i s_i B_i A_i, at the price of a rank that is the sum of ranks (PEFT's ``cat``)."""

from __future__ import annotations

from collections.abc import Sequence

from bp_merge.adapter import LoraPair
from bp_merge.lowrank import Product
from bp_merge.methods.linear import stack_factors
from bp_merge.methods.options import ModulePlan


def merge(pairs: Sequence[LoraPair], plan: ModulePlan) -> Product:
    """The weighted sum itself."""
    b, a = stack_factors(pairs, plan.weights)
    return Product(a, b)
