"""Ctrl-C once, SIGTERM or a closed terminal: finish the step and save. Twice: stop immediately."""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from types import FrameType
from typing import TYPE_CHECKING, TypeAlias

if TYPE_CHECKING:
    from bp_runs.rail import Stop

Interrupts: TypeAlias = "Callable[[], AbstractContextManager[Stop]]"
"""Opens what tells a run to stop, for as long as the run is under way: `on_interrupt`, or one of the caller's own."""

_ONE_PRESS = 3.0  # seconds in which a launcher passes on what the terminal has sent already


def stop_signals() -> tuple[signal.Signals, ...]:
    """Signals that ask a run to stop: SIGINT, SIGTERM, and SIGHUP, which a closed terminal or a lost ssh sends.

    SIGHUP is left out on Windows, which has none, and where it is ignored, as under ``nohup``.
    """
    hangup: signal.Signals | None = getattr(signal, "SIGHUP", None)
    if hangup is None or signal.getsignal(hangup) is signal.SIG_IGN:
        return signal.SIGINT, signal.SIGTERM
    return signal.SIGINT, signal.SIGTERM, hangup


@contextlib.contextmanager
def on_interrupt(*, pressed_once: bool = False) -> Iterator[Stop]:
    """Yield a stop request that the first of `stop_signals` turns true; the second one acts as usual.

    Outside the main thread, where signals cannot be caught, it never turns true.

    Args:
        pressed_once: Take all signals of a few seconds for one: a launcher sends on what the terminal sent to all.
    """
    asked = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield asked.is_set
        return
    before = {number: signal.getsignal(number) for number in stop_signals()}

    first: list[float] = []
    hangups: list[int] = []

    def ask(number: int, _frame: FrameType | None) -> None:
        asked.set()
        if number == getattr(signal, "SIGHUP", None):
            hangups.append(number)
            return  # a shell repeats the terminal's own: a second one is not a second request
        first.append(time.monotonic())
        if not pressed_once:
            signal.signal(number, before[signal.Signals(number)])
        elif first[-1] - first[0] > _ONE_PRESS:
            for again, handler in before.items():
                signal.signal(again, handler)
            signal.raise_signal(number)

    for number in before:
        signal.signal(number, ask)
    try:
        yield asked.is_set
    finally:
        for number, handler in before.items():
            # A repeated hangup must not kill a process that has saved everything and is about to end.
            signal.signal(number, signal.SIG_IGN if number in hangups else handler)


@contextlib.contextmanager
def no_interrupts() -> Iterator[Stop]:
    """Yield a stop request that never turns true; no signal handler is installed."""
    yield lambda: False
