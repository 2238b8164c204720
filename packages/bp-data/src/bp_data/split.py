"""A held-out share of rows, the same one for the same seed."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import TypeVar

from bp_runs.errors import ContractError

T = TypeVar("T")


def split_rows(rows: Sequence[T], heldout: float, seed: int) -> tuple[list[T], list[T]]:
    """Part ``rows`` into those to train on and those held out, both in their order.

    Args:
        rows: Any rows.
        heldout: A whole number (int) counts rows; a fraction (float, 0 to below 1) is a share, rounded, at least one
            row where it is above 0. At least one row always stays for training.
        seed: The same seed and number of rows hold out the same places.

    Raises:
        ContractError: ``heldout`` is negative, or a float of 1 or more.
    """
    if heldout < 0 or (isinstance(heldout, float) and heldout >= 1):
        raise ContractError(f"heldout={heldout!r}: a number of rows, or a share from 0 to below 1")
    wanted = max(1, round(heldout * len(rows))) if isinstance(heldout, float) and heldout else int(heldout)
    count = max(0, min(wanted, len(rows) - 1))
    places = set(random.Random(seed).sample(range(len(rows)), count))  # noqa: S311 - a choice that must repeat
    train = [row for place, row in enumerate(rows) if place not in places]
    return train, [rows[place] for place in sorted(places)]
