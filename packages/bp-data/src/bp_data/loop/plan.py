"""How long a run trains and which rows it validates on, decided from the data before the model is loaded.

`plan_run` turns ``training.steps``, ``training.epochs`` or neither into a number of steps; `hold_out` takes the
validation rows out; `count_rows` says what becomes of every row that was read. Nothing here knows a framework.
"""

from __future__ import annotations

import hashlib
import math
import random
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import compress
from typing import Any, Final, Literal, TypeAlias, TypeVar, overload

from bp_data.ledger import Ledger
from bp_data.token_rows import JudgedRow, JudgedRows, PairRow, StoredRows
from bp_runs.events import RowCounts, RunPlanned
from bp_runs.spec import TrainingSpec

EPOCHS: Final = 3
"""Passes where neither steps nor epochs are set: as in Alpaca, QLoRA's OASST1 runs (arXiv:2305.14314: 1,875 steps of 16
are 3 passes) and Zephyr's DPO (arXiv:2310.16944). Up to 4 passes, repeated data is worth nearly as much as new
(arXiv:2305.16264)."""
MIN_STEPS: Final = 20
"""Fewest planned steps. The learning rate warms up over the first 5, and an adapter's B starts at zero: a run of 3 or 4
steps, which is what 10 rows would give, changes almost nothing."""
MAX_STEPS: Final = 1000
"""Most planned steps: LIMA (arXiv:2305.11206) and QLoRA's best models took 500 to 2,000 steps, and 1,000 steps of a 7B
model are about an hour on one consumer GPU. A run that this cuts short says which rows it does not reach."""

MAX_VALIDATION_ROWS: Final = 500
"""A validation costs time at every visit; more rows than these would tell little more."""
_ROWS_PER_VALIDATION_ROW: Final = 5  # the fewest validation rows may take a fifth of the data, and no more
_MIN_EVALS, _MAX_EVALS = 2, 20
_CANDIDATES: Final = 8  # candidates looked at for each validation row that is needed

T = TypeVar("T")
Stored = TypeVar("Stored", bound=StoredRows[Any])
AnyRows: TypeAlias = StoredRows[Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class RunPlan:
    """A run's length, in steps and in passes over its training rows."""

    steps: int
    steps_per_epoch: int
    """The last step of an epoch takes the rows that are left, so it may be smaller."""
    examples_per_step: int
    """Units of a full step on all ranks."""
    eval_steps: int
    """Steps between validations; the last step is validated too."""
    validation_rows: int
    rows: int
    """Rows to train on."""
    units: int
    """What a step takes: rows, or packs of rows."""
    origin: Literal["steps", "epochs", "default"]
    """The setting that decides ``steps``; ``default``: neither is set."""
    limit: Literal["none", "floor", "cap"] = "none"
    """Whether the default length was raised to `MIN_STEPS` or cut to `MAX_STEPS`."""

    @property
    def epochs(self) -> float:
        """``steps`` in passes over the training rows."""
        return self.passes(self.steps)

    def passes(self, steps: int) -> float:
        """Visits per unit, on average, after ``steps`` steps."""
        whole, rest = divmod(steps, self.steps_per_epoch)
        return whole + min(self.units, rest * self.examples_per_step) / self.units

    def apply_to(self, training: TrainingSpec) -> TrainingSpec:
        """The settings with the planned numbers in place, as the training loop wants them."""
        return replace(training, steps=self.steps, epochs=None, eval_steps=self.eval_steps)

    def to_event(self, counts: RowCounts) -> RunPlanned:
        """What the record and the screen show, with what is planned for every row."""
        return RunPlanned(
            steps=self.steps,
            epochs=self.epochs,
            steps_per_epoch=self.steps_per_epoch,
            examples_per_step=self.examples_per_step,
            eval_steps=self.eval_steps,
            packs=None if self.units == self.rows else self.units,
            origin=self.origin,
            limit=self.limit,
            rows=counts,
        )


def plan_run(training: TrainingSpec, rows: int, units: int, ranks: int, *, validation_rows: int = 0) -> RunPlan:
    """Decide how many steps a run takes.

    Args:
        training: Its ``steps`` or ``epochs`` decide; without both it is `EPOCHS` passes, at least `MIN_STEPS` and at
            most `MAX_STEPS` steps.
        rows: Rows to train on, without those held out; at least one.
        units: Packs of rows where they are packed, else ``rows``.
        ranks: Processes that share each step.
        validation_rows: Rows held out.
    """
    together = training.batch_size * ranks
    per_epoch = math.ceil(math.ceil(units / together) / training.gradient_accumulation)
    origin, steps, limit = _decide_steps(training, per_epoch)
    return RunPlan(
        steps=steps,
        steps_per_epoch=per_epoch,
        examples_per_step=together * training.gradient_accumulation,
        eval_steps=training.eval_steps or _choose_eval_steps(steps, per_epoch),
        validation_rows=validation_rows,
        rows=rows,
        units=units,
        origin=origin,
        limit=limit,
    )


def _decide_steps(
    training: TrainingSpec, per_epoch: int
) -> tuple[Literal["steps", "epochs", "default"], int, Literal["none", "floor", "cap"]]:
    if training.steps is not None:
        return "steps", training.steps, "none"
    if training.epochs is not None:
        return "epochs", max(1, math.ceil(training.epochs * per_epoch - 1e-9)), "none"  # 0.1 * 30 is over 3 in floats
    wanted = EPOCHS * per_epoch
    steps = min(MAX_STEPS, max(MIN_STEPS, wanted))
    return "default", steps, "none" if steps == wanted else "floor" if steps > wanted else "cap"


def _choose_eval_steps(steps: int, per_epoch: int) -> int:
    """About one validation per epoch: 20 at most, and 2 at least, so that there is something to compare."""
    return min(max(per_epoch, math.ceil(steps / _MAX_EVALS)), max(1, steps // _MIN_EVALS))


@overload
def hold_out(rows: Stored, training: TrainingSpec) -> tuple[Stored, Stored]: ...
@overload
def hold_out(rows: Sequence[T], training: TrainingSpec) -> tuple[Sequence[T], Sequence[T]]: ...
def hold_out(rows: Sequence[Any], training: TrainingSpec) -> tuple[Sequence[Any], Sequence[Any]]:
    """Split ``rows`` into those to train on and those to validate on, both in their order; stored rows are not copied.

    The same seed and rows hold out the same ones. Rows with the same tokens stay on one side, so fewer may be held out
    than are needed. Of answers judged good and bad, both kinds are on both sides where there are two of each.

    Returns:
        Validation rows are ``eval_share`` of the rows, but at least ``eval_min_rows`` and at most
        `MAX_VALIDATION_ROWS`; none where ``eval_min_rows`` would be more than a fifth of the rows.
    """
    count = min(_validation_rows(len(rows), training), len(rows) - 1)
    chosen = set(_choose_rows(rows, count, training.seed)) if count > 0 else set()
    train = (place for place in range(len(rows)) if place not in chosen)
    if isinstance(rows, StoredRows):
        return rows.pick(train), rows.pick(sorted(chosen))
    return [rows[place] for place in train], [rows[place] for place in sorted(chosen)]


def _validation_rows(rows: int, training: TrainingSpec) -> int:
    if training.eval_share <= 0:
        return 0
    share, fewest = round(training.eval_share * rows), max(1, training.eval_min_rows)
    if share < fewest:
        return fewest if rows >= _ROWS_PER_VALIDATION_ROW * fewest else 0
    return min(MAX_VALIDATION_ROWS, share)


def _choose_rows(rows: Sequence[Any], count: int, seed: int) -> list[int]:
    """Places of up to ``count`` rows, drawn from each kind of row by its share."""
    kinds = _draw_by_kind(rows, count, seed)
    candidates = {place for order, wanted in kinds for place in order[: _CANDIDATES * wanted]}
    copies = _find_copies(rows, candidates)
    chosen: dict[int, None] = {}
    for order, wanted in kinds:
        left = wanted
        for place in order[: _CANDIDATES * wanted]:
            same = [copy for copy in copies[place] if copy not in chosen]
            if same and len(same) == len(copies[place]) <= left:
                chosen.update(dict.fromkeys(same))
                left -= len(same)
    return list(chosen)


def _draw_by_kind(rows: Sequence[Any], count: int, seed: int) -> list[tuple[list[int], int]]:
    """Places in random order and how many of them are needed: of all rows, or of each kind of judged answer."""
    draw = random.Random(seed)  # noqa: S311 - a choice that must repeat, not a secret
    order = draw.sample(range(len(rows)), count)  # the rows that `bp_data.split_rows` takes
    others = sorted(set(range(len(rows))).difference(order))
    draw.shuffle(others)
    order += others
    labels = _labels(rows)
    if labels is None or len(set(labels)) < 2:
        return [(order, count)]
    kinds = [[place for place in order if labels[place] == label] for label in (True, False)]
    rare, common = sorted(kinds, key=len)
    wanted = min(max(1, round(count * len(rare) / len(rows))), len(rare) - 1, count)
    return [(rare, wanted), (common, min(count - wanted, len(common) - 1))]


def _labels(rows: Sequence[Any]) -> Sequence[bool] | None:
    """Whether each judged answer is good; None for other rows."""
    if isinstance(rows, JudgedRows):
        return rows.labels()
    is_judged = len(rows) > 0 and isinstance(rows[0], JudgedRow)
    return [row.label for row in rows] if is_judged else None


def _find_copies(rows: Sequence[Any], candidates: Collection[int]) -> dict[int, list[int]]:
    """For each candidate, the places of all rows with its tokens, its own included.

    All rows are read once; memory holds the candidates' digests and the places of their copies.
    """
    digests = {place: _digest(rows[place]) for place in candidates}
    places: dict[bytes, list[int]] = {digest: [] for digest in digests.values()}
    for place, row in enumerate(rows):
        if (found := places.get(digests.get(place) or _digest(row))) is not None:
            found.append(place)
    return {place: places[digest] for place, digest in digests.items()}


def _digest(row: Any) -> bytes:
    """16 bytes that are the same for rows with the same tokens, whatever is learned of them."""
    found = hashlib.blake2b(digest_size=16)
    for part in _token_rows(row):
        found.update(len(part).to_bytes(8, "little"))
        found.update(part)
    return found.digest()


def _token_rows(row: Any) -> Iterator[bytes]:
    if isinstance(row, PairRow):
        yield from (row.chosen.ids.tobytes(), row.rejected.ids.tobytes())
    else:
        yield (row.row if isinstance(row, JudgedRow) else row).ids.tobytes()


def count_rows(
    ledger: Ledger, train: AnyRows, validation: AnyRows, visited: Collection[int], passes: float
) -> RowCounts:
    """Say of every row that was read whether it is trained on, not reached, held out or dropped.

    A long row that was split counts once: as trained on if a step gets to any of its pieces.

    Args:
        ledger: Of all rows that were read.
        train: Prepared rows to train on.
        validation: Prepared rows held out, of the same store.
        visited: Places in ``train`` that the steps get to.
        passes: Visits per training row.

    Raises:
        ContractError: The counts do not add up to the rows read.
    """
    seen, held, truncated = visited, len(validation), 0
    if ledger.pieces:
        origins, others = train.origins(), validation.origins()
        seen = {origins[place] for place in visited}
        held = len(set(others) - seen)
        cut = {*compress(origins, train.cut_flags()), *compress(others, validation.cut_flags())}
        truncated = len(cut & seen)
    elif ledger.truncated:
        flags = train.cut_flags()
        truncated = sum(flags[place] for place in visited)
    return RowCounts(
        read=ledger.read,
        visited=len(seen) - truncated,
        truncated=truncated,
        not_reached=ledger.whole + ledger.truncated - len(seen) - held,
        held_out=held,
        dropped=ledger.dropped,
        passes=passes,
    )
