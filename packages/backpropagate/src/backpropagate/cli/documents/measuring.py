"""The document of `backprop eval`."""

from __future__ import annotations

from typing import Any, TypedDict


class Measure(TypedDict):
    """One measure of two models; ``low`` and ``high`` bound the difference, null where one row tells nothing."""

    name: str
    base: float
    tuned: float
    low: float | None
    high: float | None
    rows: int
    verdict: str


class Eval(TypedDict):
    """`backprop eval`."""

    adapter: str
    against: str
    data: str
    part: str
    run_id: str | None
    rows: int
    verdict: str
    measures: list[Measure]
    answers: list[dict[str, str | None]]
    losses: dict[str, list[float]]
    blind: dict[str, Any] | None
    gate: dict[str, Any] | None
