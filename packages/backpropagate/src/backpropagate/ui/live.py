"""A run's numbers for its page: read once, then only what is new; and each new event as it is written.

`RunSeries` keeps the steps of a run in arrays and reads only the bytes that were added since the last look, so that a
refresh of a run of 100,000 steps costs milliseconds. Charts get the lowest and the highest loss of every stretch.

`follow` sends server-sent events. A step's message has the step as its ``id``, so that a browser that comes back says
in ``Last-Event-ID`` where it was.
"""

from __future__ import annotations

import asyncio
import math
import threading
from array import array
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from datetime import datetime
from itertools import groupby
from pathlib import Path
from typing import Any

import orjson

from bp_runs.events import EvalDone, Notice, Resumed, SampleAnswer, StepDone
from bp_runs.metrics import mean_losses, read_new_events
from bp_runs.redact import redact_data

MOST_POINTS = 2000
"""Points that a chart begins with."""
_LOOK_SECONDS = 0.5
_STATUS_LOOKS = 4  # looks at the file between two looks at the status
_ALIVE_LOOKS = 30  # looks after which a silent stream says something, so that a lost browser is noticed
_MOST_SERIES = 8  # runs that are kept in memory
_CSV_LINES = 1000
_MOST_EVENTS = 500  # validations, notices and samples of a run that are kept, each
_STEP_FIELDS = ("loss", "learning_rate", "grad_norm", "tokens", "tokens_per_second", "memory_bytes", "temperature")


class RunSeries:
    """The numbers of one run's ``metrics.jsonl``.

    Losses are in nats; a value that is missing or not finite is None. Lines that are not what a rail writes are left
    out, whatever they hold.
    """

    def __init__(self, file: Path) -> None:
        self._file = file
        self._lock = threading.Lock()
        self._clear()

    def _clear(self) -> None:
        self._offset = 0
        self._steps = array("q")
        self._values = {name: array("d") for name in _STEP_FIELDS}
        self._elapsed = array("d")
        self._last_at = math.nan
        self._epoch_steps: int | None = None
        self.evals: list[dict[str, Any]] = []
        self.notices: list[dict[str, Any]] = []
        self.samples: list[dict[str, Any]] = []
        self._points: dict[str, Any] | None = None

    def update(self) -> RunSeries:
        """Read what was added; returns itself."""
        with self._lock:
            try:
                if self._file.stat().st_size < self._offset:  # replaced by another file
                    self._clear()
                while True:
                    events, offset = read_new_events(self._file, self._offset)
                    if offset == self._offset:
                        return self
                    self._offset, self._points = offset, None
                    for is_step, group in groupby(events, _is_done_step):
                        if is_step:
                            self._take_steps(list(group))
                        else:
                            for event in group:
                                self._take(event)
            except OSError:
                return self

    def _take(self, event: dict[str, Any]) -> None:
        kind = event.get("event")
        if kind == Resumed.kind:
            kept = event.get("step")
            self._cut(kept if event.get("checkpoint") and isinstance(kept, int) and _is_step(kept) else -1)
            self._last_at = seconds_of(event.get("at"))
        elif kind == EvalDone.kind and _is_step(event.get("step")):
            _keep(self.evals, {**event, "loss": _number(event.get("loss"))})
        elif kind == SampleAnswer.kind and _is_step(event.get("step")):
            _keep(self.samples, event)
        elif kind == Notice.kind:
            _keep(self.notices, event)

    def _take_steps(self, events: list[dict[str, Any]]) -> None:
        """Column by column: nearly all of a file are steps, and a call for each value would be most of the time."""
        self._steps.extend([event["step"] for event in events])
        for name, values in self._values.items():
            column = [event.get(name) for event in events]
            values.extend([value if type(value) is float else _finite(value) for value in column])
        for event in events:
            self._elapsed.append(self._count_time(seconds_of(event.get("at"))))
        planned = events[-1].get("steps")
        self._epoch_steps = planned if _is_step(planned) else self._epoch_steps

    def _cut(self, step: int) -> None:
        """Forget what was trained after ``step``: the run was resumed from there."""
        keep = next((i for i, found in enumerate(self._steps) if found > step), len(self._steps))
        del self._steps[keep:]
        for values in (*self._values.values(), self._elapsed):
            del values[keep:]
        self.evals = [e for e in self.evals if e["step"] <= step]
        self.samples = [e for e in self.samples if e["step"] <= step]

    def _count_time(self, at: float) -> float:
        """Seconds of training up to a step; pauses before a resumption do not count."""
        before = self._elapsed[-1] if self._elapsed else 0.0
        passed = at - self._last_at
        self._last_at = at
        return before + (passed if 0 <= passed < math.inf else 0.0)

    @property
    def count(self) -> int:
        """Steps that were done."""
        return len(self._steps)

    def step(self, place: int) -> dict[str, Any]:
        """One step's numbers, by its place."""
        found: dict[str, Any] = {name: _number(values[place]) for name, values in self._values.items()}
        return {"step": self._steps[place], "steps": self._epoch_steps, **found}

    def newest(self, count: int) -> list[dict[str, Any]]:
        """The numbers of the newest steps, oldest first."""
        return [self.step(place) for place in range(max(0, self.count - count), self.count)]

    def losses(self) -> tuple[float | None, float | None]:
        """The first and the final loss as records and the terminal have them, see `bp_runs.metrics.mean_losses`."""
        found = self._values["loss"]
        if not found:
            return None, None
        first, final = mean_losses(found[:100], found[-100:], len(found))
        return _number(first), _number(final)

    def points(self) -> dict[str, Any]:
        """What charts begin with.

        Returns:
            ``columns``: name to values, all of one length, ``elapsed`` in seconds; ``evals``: steps and losses;
            ``last``: the last step, 0 before the first; ``last_at``: its time, in seconds since 1970; ``steps``:
            planned steps.
        """
        if self._points is None:
            places = self._thin()
            columns: dict[str, list[Any]] = {"step": [self._steps[i] for i in places]}
            columns |= {name: [_number(values[i]) for i in places] for name, values in self._values.items()}
            columns["elapsed"] = [round(self._elapsed[i], 2) for i in places]
            self._points = {
                "columns": columns,
                "evals": [[e["step"] for e in self.evals], [e["loss"] for e in self.evals]],
                "last": self._steps[-1] if self._steps else 0,
                "last_at": _number(self._last_at),
                "steps": self._epoch_steps,
            }
        return self._points

    def csv(self) -> Iterator[str]:
        """Every step as a line of a CSV file, in blocks."""
        names = list(self._values)
        yield ",".join(("step", "seconds", *names)) + "\n"
        for begin in range(0, self.count, _CSV_LINES):
            lines = []
            for place in range(begin, min(begin + _CSV_LINES, self.count)):
                found = self.step(place)
                cells = (found["step"], f"{self._elapsed[place]:.2f}", *(found[name] for name in names))
                lines.append(",".join("" if cell is None else str(cell) for cell in cells))
            yield "\n".join(lines) + "\n"

    def _thin(self) -> list[int]:
        """Places of the lowest and the highest loss of each stretch, the first and the last."""
        losses, count = self._values["loss"], self.count
        if count <= MOST_POINTS:
            return list(range(count))
        size = -(-2 * count // MOST_POINTS)
        found = {0, count - 1}
        for begin in range(0, count, size):
            stretch = losses[begin : begin + size].tolist()
            found.add(begin + stretch.index(min(stretch)))
            found.add(begin + stretch.index(max(stretch)))
        return sorted(found)


class SeriesCache:
    """The series of the runs that were looked at last."""

    def __init__(self) -> None:
        self._found: OrderedDict[Path, RunSeries] = OrderedDict()
        self._lock = threading.Lock()

    def read(self, file: Path) -> RunSeries:
        """The series of a ``metrics.jsonl``, up to date."""
        with self._lock:
            series = self._found.setdefault(file, RunSeries(file))
            self._found.move_to_end(file)
            while len(self._found) > _MOST_SERIES:
                self._found.popitem(last=False)
        return series.update()


def _is_done_step(event: Mapping[str, Any]) -> bool:
    return event.get("event") == StepDone.kind and _is_step(event.get("step"))


def _keep(events: list[dict[str, Any]], event: dict[str, Any]) -> None:
    """Append an event; of very many, the newest stay."""
    events.append(event)
    del events[:-_MOST_EVENTS]


def seconds_of(at: Any) -> float:
    """A time of an event in seconds since 1970; NaN for whatever is none."""
    try:
        return datetime.fromisoformat(at).timestamp()
    except (TypeError, ValueError, OverflowError):
        return math.nan


def _is_step(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**53


def _finite(value: Any) -> float:
    """A number as a float; NaN for whatever is none."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return math.nan
    try:
        return float(value)
    except OverflowError:
        return math.nan


def _number(value: Any) -> float | None:
    found = _finite(value)
    return found if math.isfinite(found) else None


def events_after(file: Path, step: int | None) -> tuple[list[dict[str, Any]], int]:
    """Events that were written after a step's newest line, all where it has none, and where the next look begins."""
    events: list[dict[str, Any]] = []
    offset = 0
    while True:
        new, after = read_new_events(file, offset)
        if after == offset:
            return events, offset
        offset = after
        for event in new:
            events.append(event)
            if step is not None and event.get("event") == StepDone.kind and event.get("step") == step:
                events.clear()


async def follow(
    file: Path, step: int | None, read_status: Callable[[], str], is_allowed: Callable[[], bool] = lambda: True
) -> AsyncIterator[bytes]:
    """Messages of a run from a step on, until it ends or ``is_allowed`` fails; the last, ``end``, has its status."""
    events, offset = await asyncio.to_thread(events_after, file, step)
    looks = 0
    while True:
        for event in events:
            if (text := message(event)) is not None:
                yield text
        looks = 0 if events else looks + 1
        if looks % _STATUS_LOOKS == 0:
            if not is_allowed():
                return
            status = await asyncio.to_thread(read_status)
            if status != "running":
                events, offset = await asyncio.to_thread(read_new_events, file, offset)
                for event in events:
                    if (text := message(event)) is not None:
                        yield text
                yield _spell("end", {"status": status})
                return
        if looks and looks % _ALIVE_LOOKS == 0:
            yield b": alive\n\n"
        await asyncio.sleep(_LOOK_SECONDS)
        events, offset = await asyncio.to_thread(read_new_events, file, offset)


def message(event: Mapping[str, Any]) -> bytes | None:
    """An event as a message, of a step only what is drawn; None for a line that no rail writes."""
    kind = event.get("event")
    if not isinstance(kind, str) or not kind.isidentifier():
        return None
    if kind in (StepDone.kind, Resumed.kind) and not _is_step(event.get("step")):
        return None
    if kind == StepDone.kind:
        numbers = {name: _number(event.get(name)) for name in _STEP_FIELDS}
        steps = event.get("steps") if _is_step(event.get("steps")) else None
        at = _number(seconds_of(event.get("at")))
        return b"id: %d\n" % event["step"] + _spell(kind, {"step": event["step"], "steps": steps, "at": at, **numbers})
    if kind == Resumed.kind:
        return _spell(kind, {"step": event["step"]})
    return _spell(kind, redact_data(dict(event)))


def _spell(kind: str, data: Mapping[str, Any]) -> bytes:
    return f"event: {kind}\ndata: ".encode() + orjson.dumps(data) + b"\n\n"
