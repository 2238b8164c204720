"""Ctrl-C once: finish the step, save, say so. Twice: stop at once."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType

from bp_runs.rail import Stop


@contextlib.contextmanager
def on_interrupt() -> Iterator[Stop]:
    """Yield a stop request that the first SIGINT or SIGTERM turns true; the second one acts as ever.

    Outside the main thread, where signals cannot be caught, it never turns true.
    """
    asked = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield asked.is_set
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def ask(number: int, _frame: FrameType | None) -> None:
        asked.set()
        signal.signal(number, before[signal.Signals(number)])

    for number in before:
        signal.signal(number, ask)
    try:
        yield asked.is_set
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
