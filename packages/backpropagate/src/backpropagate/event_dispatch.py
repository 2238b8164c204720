"""Where a run's events go: into its record, into the log, and to whoever looks on."""

from __future__ import annotations

import logging

from backpropagate.logs import log_event
from bp_runs.events import Emit, Event

_log = logging.getLogger("backpropagate")


class EventDispatcher:
    """Records and logs every event, then shows it; a screen that fails is dropped, and the run goes on."""

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
