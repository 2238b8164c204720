"""How long a run trains and what becomes of each row. `Event`, the base of all events, is here too: a command that
shows one recorded plan does not build the classes of the other events.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, ClassVar, Literal, Self

from bp_runs.errors import ContractError
from bp_runs.serialize import from_json


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """One thing that happened."""

    kind: ClassVar[str] = "event"

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready, with the event's kind under ``event``."""
        return {"event": self.kind, **{f.name: getattr(self, f.name) for f in fields(self)}}

    @classmethod
    def from_dict(cls, found: Mapping[str, Any]) -> Self:
        """What `to_dict` of the same class gave.

        Raises:
            ContractError: It is another event, or a field is missing, unknown, or of another type.
        """
        if found.get("event") != cls.kind:
            raise ContractError(f"event: expected {cls.kind!r}, found {found.get('event')!r:.80}")
        return from_json(cls, {name: value for name, value in found.items() if name != "event"})


@dataclass(frozen=True, slots=True, kw_only=True)
class RowCounts:
    """What happens to every row that is read; each row is in exactly one of the five counts that add up to ``read``."""

    read: int
    visited: int
    """Rows trained on whole, at least once."""
    truncated: int
    """Rows trained on, at least once, without their end."""
    not_reached: int
    """Rows ready to train on that no step gets to."""
    held_out: int
    """Rows that only measure the validation loss."""
    dropped: int
    passes: float
    """Times that a training row is visited, on average; below 1 where some are not reached."""

    def __post_init__(self) -> None:
        parts = self.visited + self.truncated + self.not_reached + self.held_out + self.dropped
        if self.read != parts:
            raise ContractError(f"row counts: {self.read} rows read, but {parts} accounted for: {self}")

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return asdict(self)

    def describe(self) -> str:
        """In words: ``60 read = 54 trained on + 6 held out; each training example seen 3.0 times``."""
        parts = {
            "trained on": self.visited,
            "trained on truncated": self.truncated,
            "not reached": self.not_reached,
            "held out": self.held_out,
            "dropped": self.dropped,
        }
        told = " + ".join(f"{count:,} {name}" for name, count in parts.items() if count) or "0"
        seen = (
            f"each training example seen {self.passes:.1f} times"
            if self.passes >= 1
            else f"{self.passes:.0%} of an epoch"
        )
        return f"{self.read:,} read = {told}; {seen}"


@dataclass(frozen=True, slots=True, kw_only=True)
class RunPlanned(Event):
    """How long the run trains and what it validates on, before the model is loaded."""

    kind = "plan"
    steps: int
    """Optimizer steps to do."""
    epochs: float
    """The same in passes over the training rows."""
    steps_per_epoch: int
    examples_per_step: int
    """Rows of a full step on all ranks; packs of rows where they are packed."""
    eval_steps: int
    """Steps between validations."""
    packs: int | None = None
    """Packs that the training rows are in; None: rows are not packed."""
    origin: Literal["steps", "epochs", "default"]
    """The setting that decides the length; ``default``: neither is set."""
    limit: Literal["none", "floor", "cap"] = "none"
    """Whether the default length was raised to its fewest or cut to its most steps."""
    rows: RowCounts
    """What is planned for every row; what came of it is in `bp_runs.rail.TrainOutcome`."""

    def to_dict(self) -> dict[str, Any]:
        """As `Event.to_dict`."""
        return {**Event.to_dict(self), "rows": self.rows.to_dict()}

    def describe(self) -> str:
        """In words: ``60 rows: 3 epochs = 21 steps of 8, validated on 6``."""
        rows = self.rows.read - self.rows.dropped
        packed = "" if self.packs is None else f" in {self.packs:,} packs"
        size = f"{self.examples_per_step:,}" + ("" if self.packs is None else " packs")
        epochs = f"{self.epochs:.1f}".removesuffix(".0")
        epochs += " epoch" if epochs == "1" else " epochs"
        steps = f"{self.steps:,} step{'' if self.steps == 1 else 's'}"
        validated = f"validated on {self.rows.held_out:,}" if self.rows.held_out else "not validated"
        missed = f"; {self.rows.not_reached:,} rows not reached" if self.rows.not_reached else ""
        return f"{rows:,} row{'' if rows == 1 else 's'}{packed}: {epochs} = {steps} of {size}, {validated}{missed}"
