"""A run's numbers for its charts: what is there, and then each new event as it is written (server-sent events).

A step's message has the step as its ``id``, so that a browser that comes back says in ``Last-Event-ID`` where it was.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import orjson

from bp_runs.events import EvalDone, Resumed, StepDone
from bp_runs.metrics import read_new_events
from bp_runs.redact import redact_data

MOST_POINTS = 2000
"""Steps that a chart begins with; of more, every so many."""
_LOOK_SECONDS = 0.5
_STATUS_LOOKS = 4  # looks at the file between two looks at the status
_ALIVE_LOOKS = 30  # looks after which a silent stream says something, so that a lost browser is noticed
_STEP_FIELDS = (
    "step",
    "steps",
    "loss",
    "learning_rate",
    "grad_norm",
    "tokens_per_second",
    "memory_bytes",
    "temperature",
)


def chart_points(events: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The steps by column and the validations, as `RunStore.read_metrics` gives them.

    Returns:
        ``columns``: name to values, all of one length; ``evals``: steps and losses; ``last``: the last step, 0 before
        the first. Losses in nats; a value that is missing or not finite is None.
    """
    steps = [event for event in events if event.get("event") == StepDone.kind]
    every = -(-len(steps) // MOST_POINTS) or 1
    kept = [event for place, event in enumerate(steps) if place % every == 0 or place == len(steps) - 1]
    evals = [event for event in events if event.get("event") == EvalDone.kind]
    return {
        "columns": {name: [event.get(name) for event in kept] for name in _STEP_FIELDS if name != "steps"},
        "evals": [[event["step"] for event in evals], [event.get("loss") for event in evals]],
        "last": steps[-1]["step"] if steps else 0,
        "steps": steps[-1].get("steps") if steps else None,
    }


def events_after(file: Path, step: int | None) -> tuple[list[dict[str, Any]], int]:
    """Events that were written after a step's newest line, all where it has none, and where the next look begins."""
    events, offset = read_new_events(file)
    places = [i for i, e in enumerate(events) if e.get("event") == StepDone.kind and e.get("step") == step]
    return events[places[-1] + 1 :] if places else events, offset


async def follow(file: Path, step: int | None, read_status: Callable[[], str]) -> AsyncIterator[bytes]:
    """Messages of a run from a step on, until it does not run any more; the last one, ``end``, has its status."""
    events, offset = await asyncio.to_thread(events_after, file, step)
    looks = 0
    while True:
        for event in events:
            yield message(event)
        looks = 0 if events else looks + 1
        if looks % _STATUS_LOOKS == 0:
            status = await asyncio.to_thread(read_status)
            if status != "running":
                events, offset = await asyncio.to_thread(read_new_events, file, offset)
                for event in events:
                    yield message(event)
                yield _spell("end", {"status": status})
                return
        if looks and looks % _ALIVE_LOOKS == 0:
            yield b": alive\n\n"
        await asyncio.sleep(_LOOK_SECONDS)
        events, offset = await asyncio.to_thread(read_new_events, file, offset)


def message(event: Mapping[str, Any]) -> bytes:
    """An event as a message; of a step only what is drawn."""
    kind = str(event.get("event"))
    if kind == StepDone.kind:
        return b"id: %d\n" % event["step"] + _spell(kind, {name: event.get(name) for name in _STEP_FIELDS})
    if kind == Resumed.kind:
        return _spell(kind, {"step": event["step"]})
    return _spell(kind, redact_data(dict(event)))


def _spell(kind: str, data: Mapping[str, Any]) -> bytes:
    return f"event: {kind}\ndata: ".encode() + orjson.dumps(data) + b"\n\n"
