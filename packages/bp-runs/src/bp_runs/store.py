"""The run store: run folders are the truth, ``run_history.json`` is their index."""

from __future__ import annotations

import contextlib
import os
import platform
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import orjson
from filelock import FileLock, Timeout

from bp_runs import paths
from bp_runs.adapter import MANIFEST_SCHEMA, read_manifest
from bp_runs.errors import (
    CodedError,
    OutputLockedError,
    OutputNotWritableError,
    OutputTakenError,
    RecordInvalidError,
    RunNotFoundError,
)
from bp_runs.events import DataReady, Event, ModelLoaded
from bp_runs.files import coded_disk_errors, publish_folder, publish_json, require_folder, sha256_file
from bp_runs.rail import TrainOutcome
from bp_runs.record import RunRecord, read_record, utc_now, write_record
from bp_runs.redact import redact_data
from bp_runs.spec import RunFolders

INDEX_SCHEMA = "backpropagate.run_history/1"
_LOCK_SECONDS = 30.0
_ROW_KEYS = RunRecord(run_id="").to_summary().keys()


class RunStore:
    """All runs of one output folder.

    Reading never creates the folder; `start` does.
    """

    def __init__(self, output: Path) -> None:
        self.output = output
        self._lock = _CodedLock(output / ".run_history.lock")

    def start(
        self,
        *,
        settings: Mapping[str, Mapping[str, Any]],
        rail: str,
        command: Sequence[str] = (),
        versions: Mapping[str, str] | None = None,
        hardware: Mapping[str, Any] | None = None,
    ) -> RunWriter:
        """Open a new run, recorded as running from this moment.

        Args:
            settings: By dotted key: value and source.

        Raises:
            OutputNotWritableError, DiskFullError: The output folder cannot take a run.
        """
        require_folder(self.output)
        self.require_own_adapter()
        run_id = paths.new_run_id()
        folder = require_folder(paths.run_folder(self.output, run_id))
        record = RunRecord(
            run_id=run_id,
            rail=rail,
            command=list(command),
            host=platform.node(),
            pid=os.getpid(),
            cwd=str(Path.cwd()),
            settings={k: dict(v) for k, v in settings.items()},
            versions=dict(versions or {}),
            hardware=dict(hardware or {}),
        )
        return RunWriter(self, folder, record)

    def require_own_adapter(self) -> None:
        """Refuse an output folder whose ``lora`` is not ours to replace.

        Raises:
            OutputTakenError: It holds files and none of ours.
        """
        place = paths.adapter_folder(self.output)
        if place.is_dir() and (not any(place.iterdir()) or read_manifest(place).get("schema") == MANIFEST_SCHEMA):
            return
        if place.exists() or place.is_symlink():
            raise OutputTakenError(f"{place} was not written by backprop and would be replaced")

    def list_runs(self) -> list[dict[str, Any]]:
        """Summary rows, newest first; a running run whose process is gone is recorded as interrupted now.

        An index that was lost or damaged is written anew, where the folder allows.
        """
        rows = self._read_index()
        if rows is None:
            rows = self._scan_rows()
            if rows:
                with contextlib.suppress(CodedError):
                    self.rebuild_index()
        for position, row in enumerate(rows):
            if row["status"] == "running":
                with contextlib.suppress(RecordInvalidError):
                    rows[position] = self._settle(row["run_id"]).to_summary()
        return sorted(rows, key=lambda row: (row["created_at"], row["run_id"]), reverse=True)

    def find(self, partial_id: str) -> str:
        """The one run id that starts with ``partial_id``, or ends with it.

        Raises:
            RunNotFoundError: None or several do.
        """
        ids = self._folder_ids()
        matches = [i for i in ids if i.startswith(partial_id)] or [
            i for i in ids if partial_id and i.endswith(partial_id)
        ]
        if partial_id in ids:
            return partial_id
        if len(matches) == 1:
            return matches[0]
        found = f"{len(matches)} runs match" if matches else "no run matches"
        raise RunNotFoundError(
            f"{found} {partial_id!r} in {self.output}",
            way_out=f"See the ids: backprop list-runs --output {self.output}",
            details={"matches": matches[:10]},
        )

    def load(self, partial_id: str) -> RunRecord:
        """A run's whole record, by its id or an unambiguous part of it.

        Raises:
            RunNotFoundError, RecordInvalidError: As `find` and `read_record`.
        """
        return self._settle(self.find(partial_id))

    def folder(self, run_id: str) -> Path:
        """The run's folder, by its whole id."""
        return paths.run_folder(self.output, run_id)

    def read_metrics(self, run_id: str) -> list[dict[str, Any]]:
        """The run's events, oldest first; a torn last line is left out."""
        try:
            lines = (self.folder(run_id) / paths.METRICS_FILE).read_bytes().splitlines()
        except FileNotFoundError:
            return []
        events = []
        for line in lines:
            try:
                events.append(orjson.loads(line))
            except orjson.JSONDecodeError:
                continue
        return events

    def add_artifact(self, run_id: str, artifact: Mapping[str, Any]) -> None:
        """Note a file that was made from the run, such as an export."""
        with self._lock:
            record = read_record(self.folder(run_id))
            record.artifacts.append({"at": utc_now(), **artifact})
            self.save(record)

    def publish_adapter(self, run_id: str) -> Path:
        """Let ``<output>/lora`` be this run's adapter; returns that folder.

        The weights are hard-linked where the disk can, since nobody edits them in place; other files are copied.

        Raises:
            OutputTakenError: As `require_own_adapter`.
        """
        source = self.folder(run_id) / "lora"
        target = paths.adapter_folder(self.output)
        with self._lock:
            self.require_own_adapter()
            with publish_folder(target) as partial:
                for file in source.iterdir():
                    _link_or_copy(file, partial / file.name)
        return target

    def save(self, record: RunRecord) -> None:
        """Publish a record and its index row."""
        with self._lock:
            write_record(self.folder(record.run_id), record)
            rows = {row["run_id"]: row for row in self._read_index() or self._scan_rows()}
            rows[record.run_id] = record.to_summary()
            self._write_index(list(rows.values()))

    def rebuild_index(self) -> list[dict[str, Any]]:
        """Make the index anew from the run folders; folders without a readable record are left alone."""
        with self._lock:
            rows = self._scan_rows()
            self._write_index(rows)
        return rows

    def _read_index(self) -> list[dict[str, Any]] | None:
        """The index's rows; None where it is lost, damaged, or tells of other folders than those that stand there."""
        try:
            rows: list[dict[str, Any]] = orjson.loads(paths.index_file(self.output).read_bytes())["runs"]
            whole = all(row.keys() >= _ROW_KEYS for row in rows)
            if whole and {row["run_id"] for row in rows} == set(self._folder_ids()):
                return rows
        except (OSError, orjson.JSONDecodeError, KeyError, TypeError, AttributeError):
            pass
        return None

    def _scan_rows(self) -> list[dict[str, Any]]:
        rows = []
        for run_id in self._folder_ids():
            try:
                rows.append(read_record(self.folder(run_id)).to_summary())
            except RecordInvalidError as error:
                rows.append(
                    RunRecord(run_id=run_id, status="failed", created_at="", error=error.to_dict()).to_summary()
                )
        return rows

    def _folder_ids(self) -> list[str]:
        try:
            with os.scandir(paths.runs_folder(self.output)) as entries:
                return sorted(e.name for e in entries if e.is_dir() and not e.name.startswith("."))
        except (FileNotFoundError, NotADirectoryError):
            return []

    def _settle(self, run_id: str) -> RunRecord:
        """Read a record; where it says running and nobody holds the run's lock, its process is gone."""
        record = read_record(self.folder(run_id))
        if record.status != "running" or record.host != platform.node():
            return record  # locks tell nothing of another machine's processes
        lock = FileLock(self.folder(run_id) / paths.LOCK_FILE)
        try:
            with lock.acquire(timeout=0):
                record = read_record(self.folder(run_id))
                if record.status == "running":
                    record.status = "interrupted"
                    record.ended_at = utc_now()
                    self.save(record)
        except (Timeout, OSError, OutputNotWritableError):
            pass  # it lives, or the folder is not ours to correct
        return record

    def _write_index(self, rows: list[dict[str, Any]]) -> None:
        """Rows of unreadable records are left out: the next look reads them again, in case they were mended."""
        rows = [row for row in rows if row["error"] != RecordInvalidError.code]
        publish_json(paths.index_file(self.output), {"schema": INDEX_SCHEMA, "runs": rows})


class RunWriter:
    """Writes one run while it happens; a context manager that records how it ended.

    Leaving it by an error records that error; leaving it without `finish` is a failure too.
    """

    def __init__(self, store: RunStore, folder: Path, record: RunRecord) -> None:
        self._store = store
        self._record = record
        self._lock = FileLock(folder / paths.LOCK_FILE)
        self._lock.acquire(timeout=0)
        cache = paths.cache_folder(store.output)
        self.folders = RunFolders(run_id=record.run_id, output=store.output, run=folder, cache=cache)
        store.save(record)
        with coded_disk_errors(folder):
            self._metrics = (folder / paths.METRICS_FILE).open("ab", buffering=0)

    @property
    def run_id(self) -> str:
        """The run's id."""
        return self._record.run_id

    def emit(self, event: Event) -> None:
        """Append an event to ``metrics.jsonl``; facts about model and data go to the record as well.

        Raises:
            DiskFullError: No room for the line.
        """
        line = orjson.dumps({"at": utc_now(), **redact_data(event.to_dict())}, option=orjson.OPT_APPEND_NEWLINE)
        with coded_disk_errors(self.folders.run):
            self._metrics.write(line)
        if isinstance(event, ModelLoaded):
            self._record.model = event.to_dict()
            self._store.save(self._record)
        elif isinstance(event, DataReady):
            self._record.data = event.to_dict()
            self._store.save(self._record)

    def finish(self, outcome: TrainOutcome) -> RunRecord:
        """Record a run that ended well, or was stopped by the user with its adapter kept."""
        self._record.result = outcome.to_dict()
        weights = outcome.adapter / "adapter_model.safetensors"
        self._record.artifacts.append(
            {"at": utc_now(), "kind": "adapter", "path": str(outcome.adapter), "sha256": sha256_file(weights)}
        )
        self._end("stopped" if outcome.stopped else "completed")
        return self._record

    def fail(self, error: BaseException) -> RunRecord:
        """Record a run that ended by ``error``."""
        if isinstance(error, CodedError):
            self._record.error = error.to_dict()
            self._end(error.run_status)
        else:
            name = type(error).__name__
            self._record.error = {
                "code": "RUNTIME_BUG",
                "message": f"{name}: {error}",
                "cause": None,
                "way_out": "Report it.",
            }
            self._end("interrupted" if isinstance(error, KeyboardInterrupt) else "failed")
        return self._record

    def _end(self, status: Any) -> None:
        self._record.status = status
        self._record.ended_at = utc_now()
        self._metrics.close()
        try:
            self._store.save(self._record)
        finally:
            self._lock.release()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._metrics.closed:
            return
        self.fail(error or RuntimeError("the run was left without an outcome"))


class _CodedLock:
    """A file lock that gives up with a coded error."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self._lock = FileLock(file, timeout=_LOCK_SECONDS)

    def __enter__(self) -> None:
        try:
            with coded_disk_errors(self._file):
                self._lock.acquire()
        except Timeout as error:
            raise OutputLockedError(f"{self._file} has been held for {_LOCK_SECONDS:.0f} seconds") from error

    def __exit__(self, *_: object) -> None:
        self._lock.release()


def _link_or_copy(source: Path, target: Path) -> None:
    if source.suffix == ".safetensors":
        with contextlib.suppress(OSError):
            os.link(source, target)
            return
    shutil.copy2(source, target)
