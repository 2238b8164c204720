"""A run's losses drawn as text; light, for `show-run`."""

from __future__ import annotations

import math
from collections.abc import Sequence

_BLOCKS = "▁▂▃▄▅▆▇█"


def loss_plot(
    losses: Sequence[float], *, width: int = 60, height: int = 8, evals: Sequence[tuple[int, float]] = ()
) -> str:
    """The loss over steps as text, the y axis labeled; empty for fewer than two steps.

    Args:
        losses: Of each step, in nats; values that are not finite are left out.
        width: Most columns.
        height: Rows.
        evals: Step and loss of each validation; told in a line below.
    """
    losses = [loss for loss in losses if math.isfinite(loss)]
    if len(losses) < 2:
        return ""
    columns = [_mean_of_share(losses, i, min(width, len(losses))) for i in range(min(width, len(losses)))]
    low, high = min(columns), max(columns)
    levels = [1 + round(share * (height * 8 - 1)) for share in _shares(columns)]  # eighths of a row
    rows = []
    for row in range(height - 1, -1, -1):
        label = high if row == height - 1 else low if row == 0 else None
        cells = "".join(_cell(level - 8 * row) for level in levels)
        rows.append(f"  {'' if label is None else f'{label:.2f}':>6} │{cells}")
    rows.append(f"  {'loss':>6} └{'─' * len(columns)} step {len(losses)}")
    if evals:
        step, best = min(evals, key=lambda found: found[1])
        rows.append(f"  validation {evals[0][1]:.3f} → {evals[-1][1]:.3f}, the lowest {best:.3f} after step {step}")
    return "\n".join(rows)


def spark(values: Sequence[float], *, width: int = 24) -> str:
    """Values as one line of blocks, the newest on the right."""
    finite = [value for value in values if math.isfinite(value)]
    columns = [_mean_of_share(finite, i, min(width, len(finite))) for i in range(min(width, len(finite)))]
    return "".join(_BLOCKS[round(share * (len(_BLOCKS) - 1))] for share in _shares(columns))


def _shares(values: Sequence[float]) -> list[float]:
    """Where each value lies between the lowest, 0, and the highest, 1."""
    if not values:
        return []
    low, span = min(values), (max(values) - min(values)) or 1.0
    return [(value - low) / span for value in values]


def _mean_of_share(values: Sequence[float], index: int, shares: int) -> float:
    share = values[index * len(values) // shares : max((index + 1) * len(values) // shares, index + 1)]
    return sum(share) / len(share)


def _cell(eighths: int) -> str:
    return " " if eighths <= 0 else _BLOCKS[min(eighths, 8) - 1]
