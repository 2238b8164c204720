"""Trackers that follow a run: found where they are installed, told the run's id, settings and numbers.

They read the events that every rail emits. Each is imported only where it is used. ``auto`` takes those that write to
this machine, and wandb only where its key is in the environment, since it sends the numbers away. A resumed run
continues in the entry that it had. Whatever a tracker raises costs the tracker and never the run.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import urlsplit

from backpropagate.errors import TrackerMissingError
from bp_runs.errors import InvalidSettingError, first_line
from bp_runs.events import Emit, EvalDone, Event, Notice, StepDone
from bp_runs.redact import redact_data

PROJECT = "backpropagate"
_log = logging.getLogger("backpropagate")


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
    """What a tracker receives of a run at its start."""

    run_id: str
    name: str
    settings: Mapping[str, Any]
    """By dotted key, without secrets."""
    output: Path
    offline: bool
    environ: Mapping[str, str]
    done: int | None = None
    """Steps after which it continues; None: it begins."""
    group: str | None = None
    """The multi-run that it is one of."""

    @property
    def entry(self) -> str:
        """A name that no other run has, for trackers that know runs by nothing else."""
        return self.name if self.name == self.run_id else f"{self.name}-{self.run_id}"


class Tensorboard:
    """Event files under ``<output>/tensorboard/<entry>``."""

    def __init__(self, run: Tracked) -> None:
        from tensorboard.summary import Writer

        folder = str(run.output / "tensorboard" / run.entry)
        _tell_start(folder, run.done or 0)
        self._writer = Writer(folder)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """One scalar a number."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self, *, failed: bool) -> None:  # noqa: ARG002  # event files have no end
        """Write what is still held."""
        self._writer.close()


def _tell_start(folder: str, done: int) -> None:
    """Tell TensorBoard that steps after ``done`` follow; what came of them before a second start does not count."""
    from tensorboard.compat.proto.event_pb2 import Event as Entry
    from tensorboard.compat.proto.event_pb2 import SessionLog
    from tensorboard.summary.writer.event_file_writer import EventFileWriter

    writer = EventFileWriter(folder)
    writer.add_event(Entry(step=done + 1, session_log=SessionLog(status=SessionLog.START)))
    writer.close()


class Mlflow:
    """A run in the store that MLFLOW_TRACKING_URI names, else in ``<output>/mlflow.db``; found again by its tag."""

    def __init__(self, run: Tracked) -> None:
        mlflow = import_module("mlflow")  # of either distribution, the small one too

        if not run.environ.get("MLFLOW_TRACKING_URI"):
            mlflow.set_tracking_uri(f"sqlite:///{(run.output / 'mlflow.db').resolve().as_posix()}")
        experiment = mlflow.set_experiment(run.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT))
        before = mlflow.search_runs(
            [experiment.experiment_id], f"tags.run_id = '{run.run_id}'", max_results=1, output_format="list"
        )
        if before:
            mlflow.start_run(run_id=before[0].info.run_id)
        else:
            group = {"group": run.group} if run.group else {}
            mlflow.start_run(run_name=run.name, tags={"run_id": run.run_id, **group})
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
            resume=None if run.done is None else "allow",
            name=run.name,
            group=run.group,
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
        trackio.init(
            project=run.environ.get("TRACKIO_PROJECT", PROJECT),
            name=run.entry,
            group=run.group,
            config={**run.settings, "run_id": run.run_id},
            resume="never" if run.done is None else "allow",
        )

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


def choose_trackers(names: Sequence[str], environ: Mapping[str, str]) -> list[str]:
    """The trackers to log to: those named; with ``auto`` all that are installed and send nothing to other machines.

    Raises:
        InvalidSettingError: ``none`` next to others.
        TrackerMissingError: One that is named is not installed.
    """
    if "none" in names:
        if len(names) > 1:
            raise InvalidSettingError(
                f"{{set:training.report_to}} is {', '.join(names)}: none, or some", setting="training.report_to"
            )
        return []
    for name in names:
        if name != "auto" and find_spec(name) is None:
            raise TrackerMissingError(
                f"the tracker {name} is not installed",
                fix=f"Install it: {{install:{name}}}; or train without: {{set:training.report_to=none}}",
            )
    local = [name for name in TRACKERS if find_spec(name) is not None and not _sends_data(name, environ)]
    chosen = [*(name for name in names if name != "auto"), *(local if "auto" in names else ())]
    return list(dict.fromkeys(chosen))


def _sends_data(name: str, environ: Mapping[str, str]) -> bool:
    """Whether a tracker sends what it logs to another machine, so that it starts only when it is named.

    wandb does. MLflow does if its tracking server is not a folder, a database file or this machine; trackio if it
    syncs to a Space. TensorBoard writes files.
    """
    if name == "wandb":
        return True
    if name == "mlflow":
        place = urlsplit(environ.get("MLFLOW_TRACKING_URI", ""))
        return place.scheme not in ("", "file", "sqlite") and place.hostname not in ("localhost", "127.0.0.1", "::1")
    return name == "trackio" and bool(environ.get("TRACKIO_SPACE_ID"))


class Watching(Protocol):
    """What a run's events go through: see `backpropagate.event_dispatch.EventDispatcher`."""

    def emit(self, event: Event) -> None:
        """Record and show one event."""
        ...

    def show(self, event: Event) -> None:
        """Show one event."""
        ...

    def add(self, show: Emit) -> None:
        """Show events to one more."""
        ...


@contextmanager
def follow(names: Sequence[str], run: Tracked, watcher: Watching) -> Iterator[None]:
    """Open the trackers for a run, let ``watcher`` show them its events, and close them at the end."""
    followers = [_Follower(name, run, watcher) for name in names]
    for follower in followers:
        watcher.add(follower.take)
    failed = True
    try:
        yield
        failed = False
    finally:
        for follower in followers:
            follower.close(failed=failed)


class _Follower:
    """One tracker, which follows a run until it fails; a failure is reported once."""

    def __init__(self, name: str, run: Tracked, watcher: Watching) -> None:
        self._name = name
        self._watcher = watcher
        self._tracker: Tracker | None = None
        self._has_failed = False
        with self._forgiven(watcher.emit):
            self._tracker = TRACKERS[name](run)

    def take(self, event: Event) -> None:
        values = numbers_of(event)
        if values and self._tracker is not None and not self._has_failed:
            with self._forgiven(self._watcher.emit):
                self._tracker.log(event.step, values)  # type: ignore[attr-defined]  # events with numbers have a step

    def close(self, *, failed: bool) -> None:
        """End its entry; the run's record may be closed by now, so a failure is only shown."""
        if self._tracker is not None:
            with self._forgiven(self._watcher.show):
                self._tracker.close(failed=failed)

    @contextmanager
    def _forgiven(self, tell: Emit) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # noqa: BLE001  # an edge: a tracker may raise anything, and must not cost a run
            reason = first_line(error)
            message = f"the tracker {self._name} failed and is told no more, the run goes on: {reason}"
            _log.warning(message, exc_info=True, extra={"told": True})
            if self._has_failed:
                return
            self._has_failed = True
            tell(Notice(message=message, level="warning", details={"tracker": self._name, "reason": reason}))


def describe_run(run_id: str, name: str | None, settings: Mapping[str, Any], **where: Any) -> Tracked:
    """What trackers receive of a run; secrets are masked."""
    return Tracked(run_id=run_id, name=name or run_id, settings=redact_data(dict(settings)), **where)


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
