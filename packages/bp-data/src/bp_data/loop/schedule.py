"""The learning rate of each step."""

from __future__ import annotations

import math

from bp_runs.spec import TrainingSpec


def rate_factor(step: int, training: TrainingSpec, steps: int) -> float:
    """Share of the peak learning rate at optimizer step ``step``, counted from 0.

    Warm-up is linear and ends at 1; it starts at 1/warmup_steps so that the first step is not lost. After it, linear
    ends just above 0 and cosine reaches 0 after the last step.

    Args:
        step: Counted from 0.
        training: Its ``warmup_steps`` and ``scheduler``.
        steps: Steps of the whole run.
    """
    if step < training.warmup_steps:
        return (step + 1) / training.warmup_steps
    left = (steps - step) / max(1, steps - training.warmup_steps)  # from 1 down to 0
    match training.scheduler:
        case "linear":
            return max(0.0, left)
        case "cosine":
            return 0.5 * (1 + math.cos(math.pi * (1 - max(0.0, left))))
        case "constant":
            return 1.0
