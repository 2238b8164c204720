"""Warnings about settings that do not fit the data, given before the model is loaded; each says what to do."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final

from bp_runs.events import Notice, RunPlanned
from bp_runs.spec import LoraSpec, Settings, TrainingSpec

MANY_EPOCHS: Final = 5
"""Passes from which on a warning is due: after about 4, repeated data loses its worth, and it has none at 16
(arXiv:2305.16264, on pretraining). Adapters on 60 rows validate worse after 13 passes than after 7."""
FEW_ROWS: Final = 500
HIGH_RANK: Final = 64
"""A rank for large data: on WikiSQL's 56,000 rows, rank 8 is as good as 64 (arXiv:2106.09685, table 6)."""
RATE_FACTORS: Final = (1 / 200, 10)
"""How far from the method's usual rate a rate may be. Ten times it, SimPO's models answer without sense
(arXiv:2405.14734, its repository). AdamW moves a weight by about the rate in each step, so that at a two-hundredth a
whole run of 1,000 steps moves it as far as 5 usual steps."""


def warn_about_plan(settings: Settings, plan: RunPlanned) -> Iterator[Notice]:
    """Warnings about the run's length, rank and learning rate; ``details["try"]`` has settings that help, by key."""
    rows = plan.rows.read - plan.rows.dropped
    if rows == 1:
        yield _warning("the data has one example: the model can only memorize it. Add more; 50 is a good start")
    elif plan.epochs > MANY_EPOCHS:
        yield _warning(
            f"each example is seen {plan.epochs:.1f} times, which favors memorizing: add examples or train for less",
            {"training.epochs": 3},
        )
    if warning := _about_unreached(plan):
        yield warning
    if settings.training.mode != "full" and settings.lora.r >= HIGH_RANK and rows < FEW_ROWS:
        yield _warning(
            f"rank {settings.lora.r} is high for {rows} examples: it costs memory and favors memorizing",
            {"lora.r": LoraSpec().r},
        )
    if warning := _about_rate(settings.training):
        yield warning


def _about_unreached(plan: RunPlanned) -> Notice | None:
    """Where fewer than half of the rows are seen; of steps that nobody chose, wherever any is not."""
    ready = plan.rows.visited + plan.rows.truncated + plan.rows.not_reached
    seen = ready - plan.rows.not_reached
    if not plan.rows.not_reached or (plan.origin != "default" and 2 * seen >= ready):
        return None
    return _warning(
        f"{plan.steps:,} steps see {seen:,} of {ready:,} training examples; "
        f"one epoch is {plan.steps_per_epoch:,} steps",
        {"training.epochs": 1},
    )


def _about_rate(training: TrainingSpec) -> Notice | None:
    usual, rate = training.usual_learning_rate, training.resolved_learning_rate
    low, high = (usual * factor for factor in RATE_FACTORS)
    if low <= rate <= high:
        return None
    what = "full fine-tuning" if training.mode == "full" else "adapters"
    effect = "is likely to diverge" if rate > high else "is likely to change almost nothing"
    return _warning(
        f"a learning rate of {rate:g} {effect}: for {training.method} of {what}, {low:.2g} to {high:.2g} is usual",
        {"training.learning_rate": usual},
    )


def _warning(message: str, remedy: dict[str, Any] | None = None) -> Notice:
    return Notice(message=message, level="warning", details={"try": remedy} if remedy else {})
