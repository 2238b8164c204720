"""The table of merge methods: name, paper, function."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal, TypeAlias

from bp_merge.adapter import LoraPair
from bp_merge.errors import MergeOptionError
from bp_merge.lowrank import Product
from bp_merge.methods import cat, dare, linear, magmax, slao, ties
from bp_merge.methods.options import ModulePlan

Merge: TypeAlias = Callable[[Sequence[LoraPair], ModulePlan], Product]


@dataclass(frozen=True, slots=True)
class Method:
    """A row of the table."""

    name: str
    paper: str
    merge: Merge
    takes: tuple[str, ...]
    """Options of `MergeOptions` that act."""
    density: float = 1.0
    """Default of that option."""
    on_factors: bool = True
    """Whether it never forms a whole change of a weight."""
    ranks: Literal["largest", "sum", "same"] = "largest"
    """Rank of the result: the inputs' largest, their sum, or theirs, which must be the same."""


_WEIGHTED = ("weights", "scale")
METHODS = MappingProxyType(
    {
        method.name: method
        for method in (
            Method("slao", "arXiv:2512.23017", slao.merge, (), ranks="same"),
            Method("linear", "arXiv:2203.05482", linear.merge, (*_WEIGHTED, "rank")),
            Method("cat", "PEFT, add_weighted_adapter", cat.merge, _WEIGHTED, ranks="sum"),
            Method(
                "ties", "arXiv:2306.01708", ties.merge, (*_WEIGHTED, "density", "rank"), density=0.2, on_factors=False
            ),
            Method(
                "dare",
                "arXiv:2311.03099",
                dare.merge,
                (*_WEIGHTED, "density", "rank", "seed"),
                density=0.5,
                on_factors=False,
            ),
            Method("magmax", "arXiv:2407.06322", magmax.merge, ("scale", "rank"), on_factors=False),
        )
    }
)


def find_method(name: str) -> Method:
    """The method of that name.

    Raises:
        MergeOptionError: There is none; the message has the nearest name.
    """
    if name in METHODS:
        return METHODS[name]
    near = difflib.get_close_matches(name, METHODS, 1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise MergeOptionError(f"there is no merge method {name!r}{hint}", fix=f"Choose one of: {', '.join(METHODS)}")
