"""The screen on a terminal: four lines that move while a run trains, and everything else above them."""

from __future__ import annotations

import sys
import time
from collections import deque
from collections.abc import Callable
from typing import Self

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from backpropagate.cli.plots import loss_plot, spark
from backpropagate.cli.progress import describe
from bp_runs.events import EvalDone, Event, Notice, RunPlanned, StepDone
from bp_runs.redact import redact

_RECENT_STEPS = 20
"""The time left is estimated from so many steps: a pause long ago says nothing about the next one."""
_GUARD_NOTES = 2


class LiveScreen:
    """Step, time left, loss, validation loss, learning rate, speed, memory, temperature, what the guards did.

    Args:
        console: Where to draw; default: the terminal on stdout.
        clock: Seconds from anywhere, growing.
    """

    def __init__(self, console: Console | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        self._console = console or Console(highlight=False)
        self._clock = clock
        self._began = clock()
        self._live: Live | None = None
        self._step: StepDone | None = None
        self._validation: EvalDone | None = None
        self._times: deque[tuple[int, float]] = deque(maxlen=_RECENT_STEPS)
        self._guards: deque[str] = deque(maxlen=_GUARD_NOTES)
        self._losses: list[float] = []
        self._evals: list[EvalDone] = []

    def show(self, event: Event) -> None:
        """Move the lines, or print an event's line above them."""
        match event:
            case RunPlanned():
                self._began = self._clock()  # the clock of a run is its time of training
            case StepDone():
                self._on_step(event)
                return
            case EvalDone():
                self._validation = event
                self._evals.append(event)
            case Notice() if event.details and self._live is not None:
                self._guards.append(redact(event.message))
        if line := describe(event, since=self._began):
            self.say(line)
        self._draw()

    def say(self, text: str) -> None:
        """Print one line above the moving ones."""
        self._console.print(text, markup=False, soft_wrap=True)

    def plot(self) -> str:
        """The loss so far as text; empty for fewer than two steps."""
        return loss_plot(self._losses, evals=[(e.step, e.loss) for e in self._evals])

    def _on_step(self, event: StepDone) -> None:
        self._step = event
        self._losses.append(event.loss)
        self._times.append((event.step, self._clock()))
        if self._live is None:
            self._live = Live(console=self._console, transient=True, auto_refresh=False)
            self._live.start()
        self._draw()
        if event.step == event.steps:
            self._close()
            self.say(describe(event, since=self._began))

    def _draw(self) -> None:
        if self._live is not None and self._step is not None:
            self._live.update(self._build(self._step), refresh=True)

    def _build(self, step: StepDone) -> RenderableType:
        table = Table.grid(padding=(0, 2))
        table.add_column(width=9)
        table.add_column()
        bar = Table.grid(padding=(0, 2))
        bar.add_row(ProgressBar(step.steps, step.step, width=30), f"{step.step}/{step.steps}", self._time_left(step))
        table.add_row("training", bar)
        table.add_row("loss", Text(f"{step.loss:.3f}  {spark(self._losses)}{self._validated()}"))
        table.add_row("speed", Text(_speed(step)))
        if self._guards:
            table.add_row("guards", Text("\n".join(self._guards), style="yellow", overflow="ellipsis"))
        return Group(Text(), table)

    def _validated(self) -> str:
        found = self._validation
        return "" if found is None else f"  validation {found.loss:.3f} at step {found.step}"

    def _time_left(self, step: StepDone) -> str:
        if len(self._times) < 2:
            return ""
        (first, began), (last, now) = self._times[0], self._times[-1]
        seconds = round((now - began) / max(1, last - first) * (step.steps - step.step))
        hours, rest = divmod(seconds, 3600)
        return f"{hours}:{rest // 60:02d}:{rest % 60:02d} left"

    def _close(self) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *args: object) -> None:
        self._close()


def _speed(step: StepDone) -> str:
    parts = [
        f"{step.tokens_per_second:,.0f} tok/s",
        f"lr {step.learning_rate:.1e}",
        f"memory {step.memory_bytes / 2**30:.1f} GiB",
    ]
    if step.temperature is not None:
        parts.append(f"{step.temperature:.0f} °C")
    return "  ".join(parts)


def can_draw() -> bool:
    """Whether stdout is a terminal that lines can be moved on."""
    return sys.stdout.isatty() and not Console().is_dumb_terminal
