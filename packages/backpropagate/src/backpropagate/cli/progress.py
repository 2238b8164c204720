"""What people see while a run trains: plain lines, on a terminal moving ones, and nothing under --json."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Protocol, Self

from backpropagate.cli.hint_wording import CommandLineWording
from bp_runs.events import (
    AdapterSaved,
    CheckpointSaved,
    DataReady,
    EvalDone,
    Event,
    ModelLoaded,
    Notice,
    RunPlanned,
    SampleAnswer,
    StepDone,
)
from bp_runs.paths import MODEL_NAME
from bp_runs.redact import redact

_PLAIN_LINES = 10


class Screen(Protocol):
    """Shows a run's events."""

    def show(self, event: Event) -> None:
        """Show one event."""
        ...

    def say(self, text: str) -> None:
        """Show one line."""
        ...

    def plot(self) -> str:
        """The loss over the steps shown, for the end of a run; empty where nobody would look at it."""
        ...

    def __enter__(self) -> Self: ...

    def __exit__(self, *args: object) -> None: ...


class SilentScreen:
    """Shows nothing."""

    def show(self, event: Event) -> None:
        """Nothing."""

    def say(self, text: str) -> None:
        """Nothing."""

    def plot(self) -> str:
        """Nothing."""
        return ""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *args: object) -> None:
        return


class PlainScreen:
    """Ten lines a run, for files and pipes."""

    def __init__(self) -> None:
        self._began = time.monotonic()

    def show(self, event: Event) -> None:
        """Print an event's line; steps are thinned to about ten lines."""
        if isinstance(event, RunPlanned):
            self._began = time.monotonic()  # the clock of a run is its time of training
        if isinstance(event, StepDone) and not _is_told(event):
            return
        line = describe(event, since=self._began)
        if line:
            self.say(line)

    def say(self, text: str) -> None:
        """Print one line at once."""
        print(text, flush=True)  # noqa: T201

    def plot(self) -> str:
        """Empty: `backprop show-run` draws it for whoever reads the lines later."""
        return ""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *args: object) -> None:
        return


def describe(event: Event, *, since: float) -> str:
    """An event in one line, redacted; empty for events that have nothing to say."""
    return redact(_line(event, since))


def _line(event: Event, since: float) -> str:
    match event:
        case DataReady():
            lost = f", {event.truncated} truncated, {event.dropped} dropped" if event.truncated or event.dropped else ""
            template = "the model's own" if event.template == "tokenizer" else event.template
            return (
                f"  data      {event.read:,} rows read: {event.whole:,} whole{lost}; "
                f"{event.trained_tokens:,} of {event.tokens:,} tokens trained; chat template: {template}"
            )
        case ModelLoaded():
            return (
                f"  model     {event.name}: {event.parameters / 1e6:,.0f} M parameters, "
                f"{event.trainable / 1e6:,.2f} M trained; {event.mode}, {event.dtype} on {event.device}"
            )
        case RunPlanned():
            return f"  plan      {event.describe()}"
        case StepDone():
            return f"  step      {event.step}/{event.steps}  {_facts(event)}  {time.monotonic() - since:,.0f} s"
        case EvalDone():
            best = ", the best" if event.best else ""
            return f"  eval      step {event.step}: validation loss {event.loss:.3f}{_sides(event)}{best}"
        case AdapterSaved():
            kind = "model" if Path(event.path).name == MODEL_NAME else "adapter"
            return f"  {kind:<9} {event.bytes / 2**20:,.1f} MiB saved"
        case CheckpointSaved():
            return f"  saved     step {event.step}: {event.bytes / 2**20:,.1f} MiB in {event.seconds:.1f} s"
        case Notice():
            return f"  {event.level:<9} {event.message}{_remedy(event)}"
        case SampleAnswer():
            when = "before" if event.step == 0 else f"step {event.step}"
            return f"  {when:<9} {event.prompt}  →  {' '.join(event.answer.split())}"
        case _:
            return ""


def _remedy(event: Notice) -> str:
    """The flags that the notice recommends."""
    settings = {key: str(value) for key, value in event.details.get("try", {}).items()}
    return f". Try: {CommandLineWording().settings(settings)}" if settings else ""


def _facts(event: StepDone) -> str:
    heat = "" if event.temperature is None else f"  {event.temperature:.0f} °C"
    return (
        f"loss {event.loss:.3f}{_sides(event)}  lr {event.learning_rate:.1e}  "
        f"{event.tokens_per_second:,.0f} tok/s  {event.memory_bytes / 2**30:.1f} GiB{heat}"
    )


def _sides(event: StepDone | EvalDone) -> str:
    return "".join(f"  {name} {value:.2f}" for name, value in event.metrics.items())


def _is_told(event: StepDone) -> bool:
    every = max(1, event.steps // _PLAIN_LINES)
    return event.step % every == 0 or event.step in (1, event.steps)
