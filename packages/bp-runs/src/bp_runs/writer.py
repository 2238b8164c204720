"""Writes one run while it happens: events as they come, facts into the record, and how it ended."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn, Protocol, Self

from bp_runs import paths
from bp_runs.adapter import WEIGHTS_FILE
from bp_runs.errors import (
    CodedError,
    OutputLockedError,
    RecordInvalidError,
    ResumeChangedError,
    RunActiveError,
    RunStatus,
)
from bp_runs.events import CheckpointSaved, DataReady, Event, ModelLoaded, Notice, Resumed, RunPlanned
from bp_runs.files import sha256_file
from bp_runs.fingerprint import fingerprint_weights
from bp_runs.metrics import MetricsFile, read_progress
from bp_runs.process import acquire_lock
from bp_runs.rail import TrainOutcome
from bp_runs.record import RunRecord, read_record, utc_now
from bp_runs.spec import RunFolders
from bp_runs.wording import command_ref

_LOOK_SECONDS = 5.0  # who looks whether the run lives holds its lock for a moment
_OTHERS = ("tags", "note", "title", "artifacts")  # fields that people and exports may change meanwhile

_SAME_DATA = ("sha256", "template_sha256", "read", "whole", "truncated", "dropped", "heldout", "tokens")
_SAME_PLAN = ("steps", "eval_steps")
_SAME_MODEL = ("config_sha256", "revision", "parameters", "trainable", "dtype")

_BEFORE_STEPS = (DataReady, RunPlanned, ModelLoaded, Notice)
"""Events before the first step; they are held back until a resumed run is known to be the same."""


class RecordKeeper(Protocol):
    """What a writer needs of the run store."""

    output: Path

    def update(self, run_id: str, change: Callable[[RunRecord], None]) -> RunRecord:
        """Read, change and publish a record as one step."""
        ...

    def save(self, record: RunRecord) -> None:
        """Publish a record."""
        ...


class RunWriter:
    """Writes one run while it happens; a context manager that records how it ended.

    Leaving it by an error records that error; leaving it without `finish` is a failure too. Of a resumed run,
    data and model must be what they were. Until both have been compared its events are held back, and an error leaves
    it as it stood before.
    """

    def __init__(self, store: RecordKeeper, folder: Path, record: RunRecord, before: RunRecord | None = None) -> None:
        self._store = store
        self._record = record
        self._before = before
        try:
            self._lock = acquire_lock(folder / paths.LOCK_FILE, _LOOK_SECONDS)
        except OutputLockedError as error:
            raise RunActiveError(f"another process works on the run {record.run_id}") from error
        cache = paths.cache_folder(store.output)
        self.folders = RunFolders(run_id=record.run_id, output=store.output, run=folder, cache=cache)
        self._held: list[tuple[str, Event]] = []
        self._compared: set[type[Event]] = set()
        try:
            self._begin(folder)
        except BaseException:
            self._lock.release()
            raise

    def _begin(self, folder: Path) -> None:
        """With the run in this process's hands: look whether it is still what it was, and say that it is running."""
        if self._before and read_record(folder).sessions != self._before.sessions:
            raise RunActiveError(f"another process went on with the run {self.run_id} meanwhile")
        self._metrics = MetricsFile(folder / paths.METRICS_FILE)
        self._save()
        if self._before and not (self._before.data or self._before.model or self._before.base):
            self._go_on()  # nothing to compare: cut off early

    @property
    def run_id(self) -> str:
        """The run's id."""
        return self._record.run_id

    def use_base(self, folder: Path) -> None:
        """Record which weights the run trains on; of a resumed run they must be those that it began with.

        Call it before the model is loaded.

        Args:
            folder: The base model's.

        Raises:
            ResumeChangedError: They are not, though the config may be the same.
        """
        found = fingerprint_weights(folder)
        base = {"folder": str(folder), "weights": found} if found else {}
        if self._before is None:
            self._record.base = base
            self._save()
            return
        recorded = self._before.base
        if recorded and base and recorded["weights"] != base["weights"]:
            place = "" if recorded["folder"] == str(folder) else f", in {recorded['folder']}"
            self._refuse("base model", f"the weights in {folder} are not those that the run began with{place}")
        self._record.base = base
        if not (self._before.data or self._before.model):
            self._go_on()  # a multi-run, or cut off before its data was read

    def emit(self, event: Event) -> None:
        """Append an event to ``metrics.jsonl``; facts about model and data go to the record as well.

        Raises:
            ResumeChangedError: The run continues, and its data or model are not what they were.
            DiskFullError: No room for the line.
        """
        if self._before is None:
            self._take(utc_now(), event)
            return
        if isinstance(event, DataReady):
            self._require_same("data", self._before.data, event.to_dict(), _SAME_DATA)
        elif isinstance(event, RunPlanned):
            self._require_same("plan", self._before.plan, event.to_dict(), _SAME_PLAN)
        elif isinstance(event, ModelLoaded):
            self._require_same("base model", self._before.model, event.to_dict(), _SAME_MODEL)
        self._held.append((utc_now(), event))
        self._compared.add(type(event))
        if self._compared >= {DataReady, ModelLoaded} or not isinstance(event, _BEFORE_STEPS):
            self._go_on()

    def _require_same(self, what: str, before: dict[str, Any], now: dict[str, Any], names: tuple[str, ...]) -> None:
        changed = {n: {"before": before[n], "now": now[n]} for n in names if n in before and before[n] != now[n]}
        if not changed:
            return
        told = ", ".join(f"{n} was {c['before']} and is {c['now']}" for n, c in changed.items())
        self._refuse(what, told, changed)

    def _refuse(self, what: str, cause: str, details: dict[str, Any] | None = None) -> NoReturn:
        anew = command_ref("replay", self.run_id, output=self.folders.output)
        raise ResumeChangedError(
            f"the {what} changed since the run began",
            cause=cause,
            fix=f"Put back what the run began with, or start over with its settings: {anew}",
            details=details,
        )

    def _go_on(self) -> None:
        """From here on the run is no longer what it was before."""
        session = self._record.sessions[-1]
        self._before = None
        self._take(utc_now(), Resumed(step=session["from_step"], checkpoint=session["checkpoint"]))
        for at, event in self._held:
            self._take(at, event)
        self._held.clear()

    def _take(self, at: str, event: Event) -> None:
        self._metrics.add(at, event)
        if isinstance(event, ModelLoaded):
            self._record.model = event.to_dict()
            self._save()
        elif isinstance(event, DataReady):
            self._record.data = event.to_dict()
            self._save()
        elif isinstance(event, RunPlanned):
            self._record.plan = event.to_dict()
            self._save()
        elif isinstance(event, CheckpointSaved):
            self._metrics.sync()  # what led to a checkpoint must not be lost while the checkpoint stays

    def finish(self, outcome: TrainOutcome) -> RunRecord:
        """Record a run that ended well, or was stopped by the user with its adapter kept."""
        if self._before:
            self._go_on()
        self._record.result = outcome.to_dict()
        weights = outcome.adapter / WEIGHTS_FILE  # a whole model has its hashes in its own run.json
        digest = {"sha256": sha256_file(weights)} if weights.is_file() else {}
        kind = "adapter" if digest else "model"
        artifact = {"at": utc_now(), "kind": kind, "path": str(outcome.adapter), **digest}
        self._end("stopped" if outcome.stopped else "completed", artifact)
        return self._record

    def fail(self, error: BaseException) -> RunRecord:
        """Record a run that ended by ``error``; one that has not gone on yet is left as it stood."""
        if self._before:
            self._record = self._before
            self._close()
        elif isinstance(error, CodedError):
            self._record.error = {**error.to_dict(), "hint": error.hint}
            self._end(error.run_status)
        else:
            name = type(error).__name__
            self._record.error = {
                "code": "RUNTIME_BUG",
                "message": f"{name}: {error}",
                "cause": None,
                "fix": "Report it.",
            }
            self._end("interrupted" if isinstance(error, KeyboardInterrupt) else "failed")
        return self._record

    def _end(self, status: RunStatus, artifact: dict[str, Any] | None = None) -> None:
        self._record.status = status
        self._record.ended_at = utc_now()
        self._record.progress = read_progress(self.folders.run / paths.METRICS_FILE)
        self._close(artifact)

    def _close(self, artifact: dict[str, Any] | None = None) -> None:
        self._metrics.close()
        try:
            self._save(artifact)
        finally:
            self._lock.release()

    def _save(self, artifact: dict[str, Any] | None = None) -> None:
        """Publish all but what others may have changed since; where the file is damaged, all."""
        own = self._record

        def change(found: RunRecord) -> None:
            for name in (f.name for f in fields(RunRecord) if f.name not in _OTHERS):
                setattr(found, name, getattr(own, name))
            found.artifacts += [artifact] if artifact else []

        try:
            self._record = self._store.update(own.run_id, change)
        except RecordInvalidError:
            own.artifacts += [artifact] if artifact else []
            self._store.save(own)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._metrics.closed:
            return
        self.fail(error or RuntimeError("the run was left without an outcome"))
