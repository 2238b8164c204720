"""The run store: run folders are the truth, ``run_history.json`` is their index."""

from __future__ import annotations

import contextlib
import copy
import os
import platform
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import orjson

from bp_runs import index, paths
from bp_runs.errors import (
    CodedError,
    DiskFullError,
    OutputLockedError,
    OutputNotWritableError,
    OutputTakenError,
    RecordInvalidError,
    RecordNewerError,
    RunActiveError,
    RunNotFoundError,
)
from bp_runs.files import coded_disk_errors, publish_folder, rename, require_folder
from bp_runs.process import acquire_lock, is_same_process
from bp_runs.record import Relation, RunRecord, read_record, utc_now, write_record
from bp_runs.redact import redact_data
from bp_runs.wording import command_ref

if TYPE_CHECKING:
    from bp_runs.writer import RunWriter

_LOCK_SECONDS = 30.0
_NAMED = 10  # ids of an ambiguous part


class RunStore:
    """All runs of one output folder.

    Reading never creates the folder; `start` does.
    """

    def __init__(self, output: Path) -> None:
        self.output = output

    def start(
        self,
        *,
        settings: Mapping[str, Mapping[str, Any]],
        rail: str,
        command: Sequence[str] = (),
        versions: Mapping[str, str] | None = None,
        hardware: Mapping[str, Any] | None = None,
        kind: str = "train",
        parent: tuple[str, Relation] | None = None,
    ) -> RunWriter:
        """Open a new run, recorded as running from this moment.

        Args:
            settings: By dotted key: value and source.
            kind: What the run is: ``train``, ``multi-run``.
            parent: Id of the run that it comes from, and how.

        Raises:
            OutputNotWritableError, DiskFullError: The output folder cannot take a run.
        """
        require_folder(self.output)
        self.require_own_adapter(paths.result_name(settings))
        record = RunRecord(
            run_id=paths.new_run_id(),
            kind=kind,
            parent={"run_id": parent[0], "relation": parent[1]} if parent else None,
            rail=rail,
            command=list(command),
            cwd=str(Path.cwd()),
            settings={k: dict(v) for k, v in settings.items()},
            versions=dict(versions or {}),
            hardware=dict(hardware or {}),
        )
        record.begin_session(from_step=0, checkpoint=None)
        from bp_runs.writer import RunWriter  # a list of runs needs none

        with self._locked():
            while self.folder(record.run_id).exists():  # two in one second that drew the same number
                record.run_id = paths.new_run_id()
            record.sequence = index.next_sequence(self.output)
            folder = self._create(record)
        return RunWriter(self, folder, record)

    def reopen(self, run_id: str, *, from_step: int, checkpoint: str | None, take_over: bool = False) -> RunWriter:
        """Open an unfinished run to continue it, recorded as running from this moment.

        Args:
            run_id: The whole id.
            from_step: Steps that are done.
            checkpoint: Name of the checkpoint's folder; None to begin again.
            take_over: Continue although the record names a process of another machine as running.

        Raises:
            RunActiveError: Another process works on it.
            RecordInvalidError, RecordNewerError: Its record cannot be read, or not be written by this version.
        """
        require_folder(self.folder(run_id))
        record = self.load(run_id)
        is_elsewhere = record.host != platform.node()
        if record.status == "running" and not (take_over and is_elsewhere):
            elsewhere = "; if that machine is gone for good: {set:take_over=true}" if is_elsewhere else ""
            raise RunActiveError(
                f"the run {run_id} is going on in process {record.pid} on {record.host}",
                fix=RunActiveError.default_fix.removesuffix(".") + elsewhere,
            )
        before = copy.deepcopy(record)
        record.begin_session(from_step=from_step, checkpoint=checkpoint)
        from bp_runs.writer import RunWriter

        return RunWriter(self, self.folder(run_id), record, before)

    def add_finished(self, record: RunRecord, events: Sequence[Mapping[str, Any]]) -> bool:
        """Add a run that took place elsewhere, whole: its record and its events; False where its id is taken."""
        lines = b"".join(orjson.dumps(redact_data(dict(e)), option=orjson.OPT_APPEND_NEWLINE) for e in events)
        with self._locked():
            if self.folder(record.run_id).exists():
                return False
            self._create(record, lines)
            self._publish(record)
        return True

    def rebuild_record(self, run_id: str) -> RunRecord:
        """Rebuild a damaged record from the newest copy in the run's checkpoints and publish it.

        What was left of it stays as ``run.damaged.json``. A record that can be read is returned as it is.

        Args:
            run_id: The whole id.

        Raises:
            RecordInvalidError: No checkpoint has a copy.
            RunActiveError: A process works on the run; it will write the record itself.
        """
        from bp_runs import recovery

        folder = self.folder(run_id)
        with contextlib.suppress(RecordInvalidError):
            return self.load(run_id)
        try:
            lock = acquire_lock(folder / paths.LOCK_FILE, 0)
        except OutputLockedError as error:
            raise RunActiveError(f"another process works on the run {run_id}, whose record is damaged") from error
        try:
            record = recovery.rebuild(folder)
            with self._locked():
                recovery.set_aside(folder)
                self._publish(record)
        finally:
            lock.release()
        return record

    def remove(self, run_id: str) -> None:
        """Delete a run's folder, and with it its adapter, checkpoints and record; ``<output>/lora`` stays.

        Raises:
            RunActiveError: The run is continuing.
        """
        folder = self.folder(run_id)
        with contextlib.suppress(RecordInvalidError):
            record = self.load(run_id)
            if record.status == "running":
                raise RunActiveError(f"the run {run_id} is going on in process {record.pid} on {record.host}")
        gone = folder.with_name(f".{run_id}.removed")
        with self._locked(), coded_disk_errors(folder):
            rename(folder, gone)
            _write_index(index.rebuild, self.output)
        shutil.rmtree(gone, ignore_errors=True)

    def update(self, run_id: str, change: Callable[[RunRecord], None]) -> RunRecord:
        """Read a record, change it and publish it, while no other process can.

        Raises:
            RecordInvalidError, RecordNewerError: It cannot be read, or not be written by this version.
        """
        with self._locked():
            record = read_record(self.folder(run_id))
            change(record)
            self._publish(record)
        return record

    def require_own_adapter(self, name: str = paths.ADAPTER_NAME) -> None:
        """Reject an output folder whose ``lora``, or ``model``, is not ours to replace.

        Raises:
            OutputTakenError: It holds files and none of ours.
        """
        from bp_runs.adapter import MANIFEST_SCHEMA, MODEL_SCHEMA, read_manifest

        place, ours = self.output / name, (MANIFEST_SCHEMA, MODEL_SCHEMA)
        if place.is_dir() and (not any(place.iterdir()) or read_manifest(place).get("schema") in ours):
            return
        if place.exists() or place.is_symlink():
            raise OutputTakenError(f"{place} was not written by a training run and would be replaced")

    def list_runs(self) -> list[dict[str, Any]]:
        """Summary rows, newest first; a running run whose process is gone is recorded as interrupted now.

        An index that was lost or damaged is rewritten, where the folder allows.
        """
        rows, is_whole = index.read_rows(self.output)
        return self._settle_rows(rows, is_whole=is_whole)

    def list_newest(self, count: int) -> tuple[list[dict[str, Any]], int]:
        """The first ``count`` rows of `list_runs`, and how many runs there are; older ones are not looked at."""
        rows, is_whole, total = index.read_newest(self.output, count)
        return self._settle_rows(rows, is_whole=is_whole)[:count], total

    def _settle_rows(self, rows: list[dict[str, Any]], *, is_whole: bool) -> list[dict[str, Any]]:
        for position, row in enumerate(rows):
            if row["status"] == "running":
                with contextlib.suppress(RecordInvalidError):
                    rows[position] = self._settle(row["run_id"]).to_summary()
        if not is_whole:
            with contextlib.suppress(CodedError):
                self.rebuild_index()
        return sorted(rows, key=index.by_age, reverse=True)

    def find(self, partial_id: str) -> str:
        """The one run id that has ``partial_id`` in it; ids that start or end with it go first.

        Raises:
            RunNotFoundError: None or several do, or it is empty.
        """
        ids = index.run_ids(self.output) if partial_id else []
        if partial_id in ids:
            return partial_id
        ways = (str.startswith, str.endswith, str.__contains__)
        by_way = ([run_id for run_id in ids if way(run_id, partial_id)] for way in ways)
        matches: list[str] = next((found for found in by_way if found), [])
        if len(matches) == 1:
            return matches[0]
        found = f"{len(matches)} runs match" if matches else "no run matches"
        raise RunNotFoundError(
            f"{found} {partial_id!r} in {self.output}",
            fix=f"See the ids: {command_ref('list-runs', output=self.output)}",
            cause=", ".join(matches[:_NAMED]) + (" …" if len(matches) > _NAMED else "") if matches else None,
            details={"matches": matches[:_NAMED]},
        )

    def load(self, partial_id: str) -> RunRecord:
        """A run's whole record, by its id or an unambiguous part of it.

        Raises:
            RunNotFoundError, RecordInvalidError: As `find` and `read_record`; the hint says whether `rebuild_record`
                can rebuild the record.
        """
        run_id = self.find(partial_id)
        try:
            return self._settle(run_id)
        except RecordInvalidError as error:
            from bp_runs.recovery import read_copy

            if (copy := read_copy(self.folder(run_id))) is None:
                raise
            raise RecordInvalidError(
                error.message,
                cause=error.cause,
                fix=f"Rebuild it from {copy.place} and resume the run: "
                f"{command_ref('resume', run_id, output=self.output)}",
            ) from error

    def folder(self, run_id: str) -> Path:
        """The run's folder, by its whole id."""
        return paths.run_folder(self.output, run_id)

    def read_metrics(self, run_id: str) -> list[dict[str, Any]]:
        """The run's events, oldest first; torn lines and what a resumption superseded are left out."""
        from bp_runs.metrics import read_events  # a list of runs reads no events

        return read_events(self.folder(run_id) / paths.METRICS_FILE)

    def add_artifact(self, run_id: str, artifact: Mapping[str, Any]) -> None:
        """Note a file that was made from the run, such as an export."""
        self.update(run_id, lambda record: record.artifacts.append({"at": utc_now(), **artifact}))

    def publish_adapter(self, run_id: str) -> Path:
        """Let ``<output>/lora`` be this run's adapter, or ``<output>/model`` its model; returns that folder.

        The weights are hard-linked where the disk can, since nobody edits them in place; other files are copied.

        Raises:
            OutputTakenError: As `require_own_adapter`.
        """
        model = self.folder(run_id) / paths.MODEL_NAME
        source = model if model.is_dir() else self.folder(run_id) / paths.ADAPTER_NAME
        target = self.output / source.name
        with self._locked():
            self.require_own_adapter(source.name)
            with publish_folder(target) as partial:
                for file in source.iterdir():
                    _link_or_copy(file, partial / file.name)
        return target

    def save(self, record: RunRecord) -> None:
        """Publish a record and its index row."""
        with self._locked():
            self._publish(record)

    def rebuild_index(self) -> list[dict[str, Any]]:
        """Rebuild the index from the run folders; folders without a readable record are left alone."""
        with self._locked():
            return index.rebuild(self.output)

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        """Hold the output folder; a new lock each time, since a fork must not inherit one."""
        lock = acquire_lock(self.output / ".run_history.lock", _LOCK_SECONDS)
        try:
            yield
        finally:
            lock.release()

    def _publish(self, record: RunRecord) -> None:
        write_record(self.folder(record.run_id), record)
        _write_index(index.put_row, self.output, record)

    def _create(self, record: RunRecord, events: bytes = b"") -> Path:
        """Make the run's folder with its record in it, so that none without one is ever seen; under the lock."""
        folder = self.folder(record.run_id)
        new = folder.with_name(f".{record.run_id}.new")
        with coded_disk_errors(folder):
            folder.parent.mkdir(exist_ok=True)
            for leftover in folder.parent.glob(".*.*"):  # what was being made or removed when its process was killed
                shutil.rmtree(leftover, ignore_errors=True)
            new.mkdir()
            (new / paths.METRICS_FILE).write_bytes(events)
            write_record(new, record)
            rename(new, folder)
        return folder

    def _settle(self, run_id: str) -> RunRecord:
        """Read a record; where it says running and its process is gone, it is recorded as interrupted."""
        record = read_record(self.folder(run_id))
        if record.status != "running" or record.host != platform.node():
            return record  # this machine knows nothing of another's processes
        try:
            lock = acquire_lock(self.folder(run_id) / paths.LOCK_FILE, 0)
        except OutputLockedError:
            return record
        except (OSError, DiskFullError, OutputNotWritableError):
            return self._told(record)
        try:
            record = read_record(self.folder(run_id))
            if record.status == "running" and not self._lives(record):
                self._interrupt(record)
        except (OSError, DiskFullError, OutputNotWritableError, RecordNewerError):
            return self._told(record)
        finally:
            lock.release()
        return record

    def _told(self, record: RunRecord) -> RunRecord:
        """The record as it would be, where nothing can be locked or written."""
        if not self._lives(record):
            record.status = "interrupted"
        return record

    def _interrupt(self, record: RunRecord) -> None:
        metrics = self.folder(record.run_id) / paths.METRICS_FILE
        record.status = "interrupted"
        from bp_runs.metrics import read_last_time, read_progress

        record.ended_at = read_last_time(metrics) or utc_now()  # its last sign of life
        record.progress = read_progress(metrics)
        self.save(record)

    @staticmethod
    def _lives(record: RunRecord) -> bool:
        return is_same_process(record.pid, record.process_started)


def _write_index(write: Callable[..., object], *arguments: Any) -> None:
    """The folders are the truth: an index that cannot be written costs no run, and the next look does without it."""
    with contextlib.suppress(DiskFullError, OutputNotWritableError):
        write(*arguments)


def _link_or_copy(source: Path, target: Path) -> None:
    if source.suffix == ".safetensors":
        with contextlib.suppress(OSError):
            os.link(source, target)
            return
    shutil.copy2(source, target)
