"""Trackers that follow a run: found where they are installed, told the run's id, settings and numbers.

They read the events that every rail emits. Each is imported only where it is used. ``auto`` takes those that write to
this machine, and wandb only where its key is in the environment, since it sends the numbers away.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from backpropagate.errors import TrackerMissingError
from bp_runs.events import Emit, EvalDone, Event, StepDone
from bp_runs.redact import redact_data

PROJECT = "backpropagate"


class Tracker(Protocol):
    """One tracker's view of one run."""

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Note numbers after a step."""
        ...

    def close(self, *, failed: bool) -> None:
        """The run is over."""
        ...


@dataclass(frozen=True, slots=True)
class Tracked:
    """What a tracker is told of a run at its start."""

    run_id: str
    name: str
    settings: Mapping[str, Any]
    """By dotted key, without secrets."""
    output: Path
    offline: bool
    environ: Mapping[str, str]


class Tensorboard:
    """Event files under ``<output>/tensorboard/<name>``."""

    def __init__(self, run: Tracked) -> None:
        from tensorboard.summary import Writer

        self._writer = Writer(str(run.output / "tensorboard" / run.name))

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """One scalar a number."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self, *, failed: bool) -> None:  # noqa: ARG002  # event files have no end
        """Write what is still held."""
        self._writer.close()


class Mlflow:
    """A run in the store that MLFLOW_TRACKING_URI names, else in ``<output>/mlflow.db``."""

    def __init__(self, run: Tracked) -> None:
        mlflow = import_module("mlflow")  # of either distribution, the small one too

        if not run.environ.get("MLFLOW_TRACKING_URI"):
            mlflow.set_tracking_uri(f"sqlite:///{(run.output / 'mlflow.db').resolve().as_posix()}")
        mlflow.set_experiment(run.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT))
        mlflow.start_run(run_name=run.name, tags={"run_id": run.run_id})
        mlflow.log_params({key: str(value)[:500] for key, value in run.settings.items()})
        self._mlflow = mlflow

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """All numbers of a step at once."""
        self._mlflow.log_metrics(dict(values), step=step)

    def close(self, *, failed: bool) -> None:
        """End the run as finished or failed."""
        self._mlflow.end_run("FAILED" if failed else "FINISHED")


class Wandb:
    """A run of the same id; kept on this machine while offline."""

    def __init__(self, run: Tracked) -> None:
        import wandb

        self._run = wandb.init(
            project=run.environ.get("WANDB_PROJECT", PROJECT),
            id=run.run_id,
            name=run.name,
            config=dict(run.settings),
            dir=str(run.output),
            mode="offline" if run.offline else None,
        )

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """All numbers of a step at once."""
        self._run.log(dict(values), step=step)

    def close(self, *, failed: bool) -> None:
        """End the run."""
        self._run.finish(exit_code=int(failed))


class Trackio:
    """A run in trackio's local store."""

    def __init__(self, run: Tracked) -> None:
        import trackio

        self._trackio = trackio
        config = {**run.settings, "run_id": run.run_id}
        trackio.init(project=run.environ.get("TRACKIO_PROJECT", PROJECT), name=run.name, config=config)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """All numbers of a step at once."""
        self._trackio.log(dict(values), step=step)

    def close(self, *, failed: bool) -> None:  # noqa: ARG002  # trackio's runs have no outcome
        """End the run."""
        self._trackio.finish()


TRACKERS: Mapping[str, Callable[[Tracked], Tracker]] = {
    "tensorboard": Tensorboard,
    "mlflow": Mlflow,
    "wandb": Wandb,
    "trackio": Trackio,
}


def choose_trackers(wanted: str, environ: Mapping[str, str]) -> list[str]:
    """The trackers to tell: the one named, none, or with ``auto`` all that are found.

    Raises:
        TrackerMissingError: The one named is not installed.
    """
    if wanted == "auto":
        found = [name for name in TRACKERS if find_spec(name) is not None]
        return [name for name in found if name != "wandb" or environ.get("WANDB_API_KEY")]
    if wanted == "none":
        return []
    if find_spec(wanted) is None:
        raise TrackerMissingError(
            f"the tracker {wanted} is not installed", way_out=f"pip install {wanted}; or --report-to none"
        )
    return [wanted]


@contextmanager
def follow(names: list[str], run: Tracked) -> Iterator[list[Emit]]:
    """Open the trackers for a run; yields one taker of events for each, and closes them at the end."""
    opened = [TRACKERS[name](run) for name in names]
    failed = True
    try:
        yield [_taker(tracker) for tracker in opened]
        failed = False
    finally:
        for tracker in opened:
            tracker.close(failed=failed)


def describe_run(run_id: str, name: str | None, settings: Mapping[str, Any], **where: Any) -> Tracked:
    """What trackers are told of a run; secrets are masked."""
    return Tracked(run_id=run_id, name=name or run_id, settings=redact_data(dict(settings)), **where)


def _taker(tracker: Tracker) -> Emit:
    def take(event: Event) -> None:
        if values := numbers_of(event):
            tracker.log(event.step, values)  # type: ignore[attr-defined]  # events with numbers have a step

    return take


def numbers_of(event: Event) -> dict[str, float]:
    """The numbers of a step or a validation by their trackers' names; empty for other events."""
    match event:
        case StepDone():
            found = {
                "train/loss": event.loss,
                "train/learning_rate": event.learning_rate,
                "train/grad_norm": event.grad_norm,
                "train/tokens_per_second": event.tokens_per_second,
                "gpu/memory_bytes": float(event.memory_bytes),
                "gpu/temperature": event.temperature,
                **{f"train/{name}": value for name, value in event.metrics.items()},
            }
        case EvalDone():
            found = {"eval/loss": event.loss, **{f"eval/{name}": value for name, value in event.metrics.items()}}
        case _:
            return {}
    return {name: value for name, value in found.items() if value is not None}
