"""A run's record rebuilt from a copy: every checkpoint carries ``settings.json``, what the run was made with.

    settings.json    {"schema", "run_id", "kind", "parent", "sequence", "created_at", "command", "rail", "cwd",
                      "settings", "base", "model", "data", "plan", "versions", "hardware"}, as in run.json

A multi-run, which has no checkpoints of its own, keeps the copy in the folder of its progress.
"""

from __future__ import annotations

import contextlib
import platform
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import orjson

from bp_runs import paths
from bp_runs.adapter import changed_files, read_manifest
from bp_runs.checkpoint_store import CheckpointFolder
from bp_runs.errors import AdapterInvalidError, RecordInvalidError
from bp_runs.files import coded_disk_errors, publish_json, sha256_file
from bp_runs.metrics import read_last_time, read_progress
from bp_runs.migrations import RECORD_SCHEMA
from bp_runs.record import RunRecord, parse_record, read_record, utc_now
from bp_runs.wording import command_ref

_NOT_COPIED = frozenset(
    ("status", "ended_at", "host", "pid", "process_started", "sessions", "progress", "result", "artifacts", "error",
     "tags", "note", "title")
)  # fmt: skip
"""What changes while a run is trained, or is the user's."""
DAMAGED_RECORD = "run.damaged.json"
"""What was left of a record that was rebuilt."""


@dataclass(frozen=True, slots=True)
class RecordCopy:
    """A copy of a run's record, as far as it was copied."""

    record: RunRecord
    place: Path
    """The file."""


def write_copy(run: Path, folder: Path) -> None:
    """Copy what the run was made with into ``folder``; from an earlier copy if its record is damaged, else nothing.

    Raises:
        DiskFullError, OutputNotWritableError: It cannot be written.
    """
    try:
        record = read_record(run)
    except RecordInvalidError:
        found = read_copy(run)
        if found is None:
            return
        record = found.record
    copied = {name: value for name, value in record.to_dict().items() if name not in _NOT_COPIED}
    publish_json(folder / paths.SETTINGS_FILE, copied | {"schema": RECORD_SCHEMA})


def read_copy(run: Path) -> RecordCopy | None:
    """The newest whole copy of a run's record; None if there is none."""
    for file in _copies(run):
        with contextlib.suppress(OSError, orjson.JSONDecodeError, RecordInvalidError):
            return RecordCopy(parse_record(orjson.loads(file.read_bytes()), file, run.name), file)
    return None


def rebuild(run: Path) -> RunRecord:
    """The record of a run as its newest copy tells it, and how far it came as its other files do; nothing is written.

    It is completed or stopped if its adapter or model is whole, else interrupted. Tags, notes, exports and earlier
    sessions are lost; the note says so.

    Raises:
        RecordInvalidError: There is no copy.
    """
    copy = read_copy(run)
    if copy is None:
        raise RecordInvalidError(
            f"{run / paths.RECORD_FILE} is damaged, and no checkpoint has a copy of it",
            fix=f"Restore {run / paths.RECORD_FILE} from a backup, or delete the run: "
            f"{command_ref('runs rm', run.name)}",
        )
    record, metrics = copy.record, run / paths.METRICS_FILE
    record.progress = read_progress(metrics)
    record.ended_at = read_last_time(metrics) or utc_now()
    record.host, record.status = platform.node(), "interrupted"
    record.sessions = [{"at": record.created_at, "host": record.host, "pid": 0, "from_step": 0, "checkpoint": None}]
    place = copy.place.parent.relative_to(run).as_posix()
    record.note = f"Rebuilt from {place}, since run.json was damaged; tags, notes and exports noted before are lost."
    if _has_result(run):
        step, steps = (record.progress.get(name) for name in ("step", "steps"))
        record.status = "completed" if step is not None and step == steps else "stopped"
    return record


def set_aside(run: Path) -> None:
    """Keep what is left of a damaged record next to the new one.

    Raises:
        DiskFullError, OutputNotWritableError: It cannot be kept.
    """
    damaged = run / paths.RECORD_FILE
    if damaged.exists():
        with coded_disk_errors(damaged):
            damaged.replace(run / DAMAGED_RECORD)


def _copies(run: Path) -> Iterator[Path]:
    for checkpoint in CheckpointFolder(run).read():
        file, saved = checkpoint.path / paths.SETTINGS_FILE, checkpoint.files.get(paths.SETTINGS_FILE)
        with contextlib.suppress(OSError):
            if saved and sha256_file(file) == saved["sha256"]:
                yield file
    yield from sorted(run.glob(f"*/{paths.SETTINGS_FILE}"))


def _has_result(run: Path) -> bool:
    """Whether the run's adapter or model is whole."""
    for name in (paths.ADAPTER_NAME, paths.MODEL_NAME):
        with contextlib.suppress(AdapterInvalidError, OSError):
            if read_manifest(run / name).get("run_id") == run.name and not changed_files(run / name):
                return True
    return False
