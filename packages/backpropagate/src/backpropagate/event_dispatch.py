"""Where a run's events go: its record, the log, and callbacks."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Iterator
from typing import Any, TypeAlias

from backpropagate.logs import log_event
from bp_runs.errors import ContractError
from bp_runs.events import Emit, Event

_log = logging.getLogger("backpropagate")


Callback: TypeAlias = Callable[[Event], Any] | object
"""A function that is called with every event; or an object with methods named after them: ``on_step``, ``on_eval``,
``on_notice``, ``on_sample`` … (`Event.kind`), and perhaps ``on_event`` for all."""


def listener(callback: Callback | None) -> Emit | None:
    """What calls a callback with the events that it wants.

    Raises:
        ContractError: It is neither a function nor an object with such a method.
    """
    if callback is None or inspect.isroutine(callback):
        return callback
    kinds = {cls.kind for cls in _events(Event)}
    methods = {
        name for name in dir(callback) if name.removeprefix("on_") in {*kinds, "event"} and name.startswith("on_")
    }
    if not methods:
        if callable(callback):
            return callback
        raise ContractError(f"{type(callback).__name__} has no method on_event, on_step, on_eval …")

    def call(event: Event) -> None:
        for name in ("on_event", f"on_{event.kind}"):
            if name in methods:
                getattr(callback, name)(event)

    return call


def join_listeners(*listeners: Emit | None) -> Emit | None:
    """One listener that calls several; None if there are none."""
    found = [one for one in listeners if one is not None]
    if len(found) < 2:
        return found[0] if found else None

    def call(event: Event) -> None:
        for one in found:
            one(event)

    return call


def _events(cls: type[Event]) -> Iterator[type[Event]]:
    for inner in cls.__subclasses__():
        yield inner
        yield from _events(inner)


class EventDispatcher:
    """Records and logs every event, then shows it; a screen that fails is dropped, and the run continues."""

    def __init__(self, record: Emit, *shows: Emit | None) -> None:
        self._record = record
        self._shows = [show for show in shows if show is not None]

    def add(self, show: Emit) -> None:
        """Show events to one more."""
        self._shows.append(show)

    def emit(self, event: Event) -> None:
        """Record, log and show one event.

        Raises:
            CodedError: Recording failed, on a full disk for instance.
        """
        self._record(event)
        log_event(event)
        self.show(event)

    def show(self, event: Event) -> None:
        """Show one event without recording it, for when the record is closed."""
        for show in list(self._shows):
            try:
                show(event)
            except Exception:  # noqa: BLE001  # an edge: what a caller's callback or a closed terminal raises must not cost a run
                self._shows.remove(show)
                _log.warning("on_event failed and is not called again; the run goes on", exc_info=True)
