"""A held-out share of rows, the same one for the same seed."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any, TypeVar, overload

from bp_data.answers import AnswerRows
from bp_data.store import TokenRows
from bp_runs.errors import ContractError

T = TypeVar("T")
Stored = TypeVar("Stored", TokenRows, AnswerRows[Any])


@overload
def split_rows(  # type: ignore[overload-overlap]  # stored rows are a sequence too, and come back as stored rows
    rows: Stored, heldout: float, seed: int
) -> tuple[Stored, Stored]: ...
@overload
def split_rows(rows: Sequence[T], heldout: float, seed: int) -> tuple[list[T], list[T]]: ...
def split_rows(rows: Sequence[Any], heldout: float, seed: int) -> tuple[Sequence[Any], Sequence[Any]]:
    """Part ``rows`` into those to train on and those held out, both in their order; stored rows are not copied.

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
    kept = (place for place in range(len(rows)) if place not in places)
    if isinstance(rows, TokenRows | AnswerRows):
        return rows.pick(kept), rows.pick(sorted(places))
    return [rows[place] for place in kept], [rows[place] for place in sorted(places)]
