"""Settings of a run, and those of several runs in sequence, which no rail reads."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from bp_runs.spec import Settings, setting


@dataclass(frozen=True, slots=True, kw_only=True)
class MultiRunSpec:
    """Several runs, each continuing from the previous one; only multi-runs read it."""

    runs: int = setting(
        5,
        "Number of runs, each on its own slice of the data. With several data files: one run per file.",
        aliases=("num_runs", "multi_run.num_runs"),
        at_least=1,
    )
    merge: Literal["ftba-mb", "slao", "slao-preserving", "none"] = setting(
        "ftba-mb",
        "How runs are merged. ftba-mb: blend B by 1/sqrt(i) and start from the last adapter; slao: the "
        "same from orthonormal rows of A (arXiv:2512.23017); slao-preserving: as slao, keeping the "
        "adapter's function; none: keep the last adapter.",
    )
    last_lr: float = setting(
        0.25, "Learning rate of the last run as a share of the first's; it falls linearly in between.", above=0
    )
    replay_share: float = setting(
        0.0, "Share of each run's examples to draw from earlier runs.", at_least=0.0, at_most=0.9
    )
    replay: Literal["recent", "random", "all"] = setting(
        "random",
        "Which examples to replay: from the run before (recent), any earlier run (random), or all of them"
        " equally (all).",
    )
    heldout: float = setting(
        0.1,
        "Share of each run's examples to hold out for measuring forgetting; 0: none.",
        aliases=("eval_heldout",),
        at_least=0.0,
        at_most=0.9,
    )
    metric: Literal["none", "exact", "f1", "contains"] = setting(
        "none",
        "Also score answers to held-out examples: exact match, f1 (shared words), or contains.",
    )
    eval_gate: bool = setting(False, "Leave out a run whose merge makes the mean held-out loss worse.")
    max_regression: float = setting(
        0.0,
        "How much worse the mean held-out loss may become before the gate leaves a run out, in nats.",
        aliases=("eval_max_regression",),
        at_least=0.0,
    )
    patience: int = setting(0, "Stop after this many runs without a lower mean held-out loss; 0: never.", at_least=0)
    keep_adapters: Literal["all", "last", "none"] = setting(
        "all", "Which runs' own adapters to keep, fine-tuned and merged. The result is always kept."
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class RunSettings(Settings):
    """All that a user can set for a run or a multi-run, by group."""

    multirun: MultiRunSpec = field(default_factory=MultiRunSpec)
