"""A run's events on disk, the append-only ``metrics.jsonl``, and the mean losses at both ends of a run."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Self

import orjson

from bp_runs.files import coded_disk_errors
from bp_runs.redact import redact_data

if TYPE_CHECKING:
    from bp_runs.events import Event

_TAIL = 64 * 2**10  # bytes; holds the last steps' lines
STEP, RESUMED = "step", "resumed"
"""Kinds of events by name: building their classes takes longer than reading a file, and `show-run` only reads."""
OF_A_STEP = frozenset({STEP, "eval", "sample", "checkpoint"})
"""Events that a resumption supersedes."""


class MetricsFile:
    """Adds events to the file, each with one write, so that a kill tears at most the last line."""

    def __init__(self, path: Path) -> None:
        self._path = path
        with coded_disk_errors(path):
            self._file: BinaryIO = path.open("ab", buffering=0)
            if _is_torn(path):
                self._file.write(b"\n")

    def add(self, at: str, event: Event) -> None:
        """Write one event, redacted.

        Raises:
            DiskFullError: No room for the line.
        """
        line = orjson.dumps({"at": at, **redact_data(event.to_dict())}, option=orjson.OPT_APPEND_NEWLINE)
        with coded_disk_errors(self._path):
            if self._file.write(line) != len(line):  # the disk took a part: a second try says why
                self._file.write(b"\n")

    def sync(self) -> None:
        """Make what was added durable."""
        with coded_disk_errors(self._path):
            os.fsync(self._file.fileno())

    def close(self) -> None:
        """End writing; may be called twice."""
        self._file.close()

    @property
    def closed(self) -> bool:
        """Whether `close` was called."""
        return self._file.closed


def read_events(path: Path) -> list[dict[str, Any]]:
    """A run's events as they count: torn lines are left out, and so is what a resumption has superseded."""
    try:
        lines = path.read_bytes().splitlines()
    except (FileNotFoundError, IsADirectoryError):
        return []
    events: list[dict[str, Any]] = []
    for line in lines:
        event = _parse(line)
        if event is None:
            continue
        if event.get("event") == RESUMED:
            kept = event["step"] if event.get("checkpoint") else -1  # begun again: not even the first answers stay
            events = [e for e in events if e.get("event") not in OF_A_STEP or e["step"] <= kept]
        events.append(event)
    return events


def read_new_events(path: Path, offset: int = 0) -> tuple[list[dict[str, Any]], int]:
    """Events of the whole lines that were added since ``offset``, and where the next look begins, in bytes.

    For whoever follows a run as it happens: about a megabyte of lines at most, nothing left out but torn lines. A
    `resumed` among the events supersedes what came before.
    """
    try:
        with path.open("rb") as file:
            file.seek(offset)
            text = file.read(_CHUNK)
            while text and b"\n" not in text and (more := file.read(_CHUNK)):
                text += more
            whole, _, _ = text.rpartition(b"\n")
    except OSError:
        return [], offset
    if not whole:
        return [], offset
    return [event for line in whole.split(b"\n") if (event := _parse(line)) is not None], offset + len(whole) + 1


def read_progress(path: Path) -> dict[str, Any]:
    """The last step and its loss, from the end of the file; empty where no step was recorded."""
    for line in reversed(_read_tail(path)):
        event = _parse(line)
        if event and event.get("event") == STEP:
            return {"step": event.get("step"), "steps": event.get("steps"), "loss": event.get("loss")}
    return {}


def read_last_time(path: Path) -> str | None:
    """When the last event was recorded, as ISO 8601; None where there is none."""
    for line in reversed(_read_tail(path)):
        event = _parse(line)
        if event and isinstance(event.get("at"), str):
            return str(event["at"])
    return None


def _read_tail(path: Path) -> list[bytes]:
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - _TAIL))
            return file.read().splitlines()
    except OSError:
        return []


def _parse(line: bytes) -> dict[str, Any] | None:
    try:
        event = orjson.loads(line)
    except orjson.JSONDecodeError:
        return None
    return event if isinstance(event, dict) else None


def _is_torn(path: Path) -> bool:
    with path.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        if size == 0:
            return False
        file.seek(-1, os.SEEK_END)
        return file.read(1) != b"\n"


_MEAN_STEPS = 100  # steps that a mean is taken over, at most
FIRST_STEPS = 5
"""Steps whose mean loss is a run's first loss."""
_CHUNK = 2**20  # bytes read at once


def mean_losses(first: Sequence[float], last: Sequence[float], count: int) -> tuple[float, float]:
    """A run's first and final loss, in nats: the one definition of records, terminal and web page.

    The first is the mean over the first five steps, so that it stays what it was while the run continues. The final one
    is the mean over the last tenth of the steps, from one to a hundred.

    Args:
        first: The first losses, five or more where there are as many.
        last: The last losses, a hundred or more where there are as many.
        count: Steps in all.

    Raises:
        ZeroDivisionError: There was no step.
    """
    begin = first[:FIRST_STEPS]
    share = min(_MEAN_STEPS, max(1, count // 10), count)
    return sum(begin) / len(begin), sum(last[-share:]) / share


class LossEnds:
    """The first and the last hundred losses, in nats, and how many there were.

    Args:
        losses: Those so far.
    """

    def __init__(self, losses: Iterable[float] = ()) -> None:
        self.count = 0
        self._first: list[float] = []
        self._last: deque[float] = deque(maxlen=_MEAN_STEPS)
        for loss in losses:
            self.add(loss)

    def add(self, loss: float) -> None:
        """Take the next step's loss."""
        self.count += 1
        self._last.append(loss)
        if len(self._first) < FIRST_STEPS:
            self._first.append(loss)

    def means(self) -> tuple[float, float]:
        """The first and the final loss, see `mean_losses`."""
        return mean_losses(self._first, list(self._last), self.count)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready, of at most two hundred numbers."""
        return {"count": self.count, "first": self._first, "last": list(self._last)}

    @classmethod
    def from_dict(cls, found: Mapping[str, Any]) -> Self:
        """What `to_dict` gave."""
        ends = cls()
        ends.count = found["count"]
        ends._first = list(found["first"])
        ends._last.extend(found["last"])
        return ends
