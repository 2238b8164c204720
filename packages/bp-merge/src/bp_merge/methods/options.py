"""The options of a merge, checked before anything is read."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from bp_merge.errors import MergeOptionError

_SUM_TOLERANCE = 1e-6


@dataclass(frozen=True, slots=True, kw_only=True)
class MergeOptions:
    """What a user may choose; None leaves it to the method."""

    weights: tuple[float, ...] | None = None
    """Share of each adapter; they sum to 1. Default: equal shares."""
    density: float | None = None
    """Share of each change's entries that stays, above 0 and at most 1."""
    scale: float | None = None
    """Factor on the merged change, the λ of task arithmetic; default 1."""
    rank: int | None = None
    """Rank of the result; default: the largest of the inputs'."""
    seed: int | None = None
    """Of the entries that DARE drops; default 0."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModulePlan:
    """What a method is given for one module."""

    module: str
    shares: tuple[float, ...]
    """Of each adapter; they sum to 1."""
    scale: float = 1.0
    density: float = 1.0
    rank: int = 1
    seed: int = 0

    @property
    def weights(self) -> tuple[float, ...]:
        """Shares times scale: factors of a plain weighted sum."""
        return tuple(share * self.scale for share in self.shares)


def check_options(options: MergeOptions, takes: Sequence[str], method: str, count: int) -> None:
    """Reject options that the method does not take, or values that make no sense.

    Raises:
        MergeOptionError: With the value, and what it should have been.
    """
    for name in ("weights", "density", "scale", "rank", "seed"):
        if getattr(options, name) is not None and name not in takes:
            raise MergeOptionError(f"{method} takes no {name}", fix=f"Leave it out: {{set:{name}}}")
    if options.weights is not None:
        _check_weights(options.weights, count)
    if options.density is not None and not 0 < options.density <= 1:
        raise MergeOptionError(f"the density is {options.density}; it must be above 0 and at most 1")
    if options.scale is not None and not (math.isfinite(options.scale) and options.scale):
        raise MergeOptionError(f"the scale is {options.scale}; it must be a number other than 0")
    if options.rank is not None and options.rank < 1:
        raise MergeOptionError(f"the rank is {options.rank}; it must be at least 1")


def _check_weights(weights: Sequence[float], count: int) -> None:
    told = ", ".join(f"{w:g}" for w in weights)
    if len(weights) != count:
        raise MergeOptionError(f"there are {len(weights)} weights ({told}) and {count} adapters")
    if not all(math.isfinite(w) and w >= 0 for w in weights):
        raise MergeOptionError(f"the weights are {told}; each must be a number from 0 on")
    total = math.fsum(weights)
    if abs(total - 1) > _SUM_TOLERANCE:
        fix = "Give shares that sum to 1, and a factor on the whole: {set:scale}"
        if total > 0:
            shares = ",".join(f"{w / total:.6g}" for w in weights)
            fix = f"Give shares and a factor: {{set:weights={shares} scale={total:g}}}"
        raise MergeOptionError(f"the weights {told} sum to {total:g}, not to 1", fix=fix)
