"""Documents of `backprop multi-run` and `backprop merge`."""

from __future__ import annotations

from typing import TypedDict

from backpropagate.cli.documents.training import Outcome
from bp_runs.errors import RunStatus


class ScorecardBody(TypedDict):
    """losses[i][j]: held-out loss, in nats, on run j + 1's data after run i + 1; scores: as losses, of the metric."""

    runs: list[str]
    names: list[str]
    losses: list[list[float]]
    merge: str | None
    before_merge: list[float]
    before_run: list[float]
    metric: str | None
    scores: list[list[float]]
    scores_before: list[float]
    average: float | None
    backward_transfer: float | None
    forgetting: float | None
    merge_cost: float | None


class MultiRun(TypedDict):
    """`backprop multi-run`; runs: those that were merged, rejected: those that the gate left out."""

    run_id: str
    status: RunStatus
    adapter: str
    runs: list[str]
    rejected: list[str]
    score_card: ScorecardBody
    result: Outcome


class Merge(TypedDict):
    """`backprop merge`; kept: share of the change's squared norm that the cut to rank kept."""

    path: str
    method: str
    paper: str
    adapters: list[str]
    weights: list[float] | None
    modules: int
    rank: int
    kept: float
    bytes: int
    notes: list[str]
