"""Progress of calls from Python: a line that moves on a terminal, a panel that updates in a notebook."""

from __future__ import annotations

import html
import sys
import time
from collections.abc import Callable
from typing import Any, TextIO

from backpropagate.results import loss_svg
from bp_runs.events import Emit, EvalDone, Event, Notice, RunPlanned, StepDone

_BAR = 24
_REDRAW_SECONDS = 0.2


def open_progress(wanted: bool | None) -> Emit | None:
    """What shows a run's progress.

    Args:
        wanted: True: always; False: nothing; None: in a notebook or on a terminal.
    """
    if wanted is False:
        return None
    if (display := _notebook_display()) is not None:
        return NotebookProgress(display).show
    return TerminalProgress(sys.stderr).show if wanted or sys.stderr.isatty() else None


def _notebook_display() -> Callable[..., Any] | None:
    """IPython's display function in Jupyter or Colab; None elsewhere, in IPython on a terminal too."""
    program = sys.modules.get("IPython")  # imported by whoever started the notebook; no dependency of ours
    shell = None if program is None else program.get_ipython()
    if program is None or shell is None or type(shell).__name__ == "TerminalInteractiveShell":
        return None
    display: Callable[..., Any] = program.display.display
    return display


class TerminalProgress:
    """One line on stderr: a bar, the loss, the speed and the time left."""

    def __init__(self, stream: TextIO, clock: Callable[[], float] = time.monotonic) -> None:
        self._stream, self._clock = stream, clock
        self._began = self._drawn = clock()

    def show(self, event: Event) -> None:
        """Redraw the line, or print a warning above it."""
        if isinstance(event, RunPlanned):
            self._began = self._clock()
        elif isinstance(event, Notice) and event.level == "warning":
            self._stream.write(f"\r\x1b[K{event.message}\n")
        elif isinstance(event, StepDone):
            is_last = event.step == event.steps
            if is_last or event.step == 1 or self._clock() - self._drawn >= _REDRAW_SECONDS:
                self._drawn = self._clock()
                self._stream.write("\r\x1b[K" + self._line(event) + ("\n" if is_last else ""))
        self._stream.flush()

    def _line(self, event: StepDone) -> str:
        done = round(_BAR * event.step / event.steps)
        left = (self._clock() - self._began) / event.step * (event.steps - event.step)
        return (
            f"{'█' * done}{'·' * (_BAR - done)} {event.step}/{event.steps}  loss {event.loss:.3f}  "
            f"{event.tokens_per_second:,.0f} tok/s  {left // 60:.0f}:{left % 60:02.0f} left"
        )


class NotebookProgress:
    """A panel with bar, loss curve and validation loss, which replaces itself.

    Args:
        display: `IPython.display.display`, or what takes the same arguments.
    """

    def __init__(self, display: Callable[..., Any], clock: Callable[[], float] = time.monotonic) -> None:
        self._clock, self._drawn = clock, -_REDRAW_SECONDS
        self._losses: list[float] = []
        self._validation = ""
        self._step: StepDone | None = None
        self._handle = display(self, display_id=True)  # last: it draws the panel at once

    def show(self, event: Event) -> None:
        """Take in an event, and update the panel at most five times a second."""
        if isinstance(event, EvalDone):
            self._validation = f", validation loss {event.loss:.3f} at step {event.step}"
        elif isinstance(event, StepDone):
            self._step = event
            self._losses.append(event.loss)
            now = self._clock()
            if event.step == event.steps or now - self._drawn >= _REDRAW_SECONDS:
                self._drawn = now
                self._handle.update(self)

    def __repr__(self) -> str:
        return "training …" if self._step is None else f"step {self._step.step}/{self._step.steps}"

    def _repr_html_(self) -> str:
        step = self._step
        if step is None:
            return "<p>Loading …</p>"
        text = f"step {step.step}/{step.steps}: loss {step.loss:.3f}{self._validation}"
        bar = f'<progress max="{step.steps}" value="{step.step}"></progress>'
        return f"{bar} {html.escape(text)}<br>{loss_svg(self._losses)}"
