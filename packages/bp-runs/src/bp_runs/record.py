"""A run's record: ``run.json``, the truth about what was asked, with what, on what, and how it ended."""

from __future__ import annotations

import contextlib
import os
import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import orjson

from bp_runs.errors import ContractError, RecordInvalidError, RecordNewerError, RunStatus
from bp_runs.files import publish_json
from bp_runs.migrations import LATEST, RECORD_SCHEMA, migrate, schema_number
from bp_runs.paths import RECORD_FILE
from bp_runs.process import process_birth
from bp_runs.redact import redact_data
from bp_runs.serialize import from_json
from bp_runs.wording import render

Relation = Literal["replay", "member", "from", "extend"]
"""To its parent: done again with its settings; one run of a multi-run; trained on from its adapter; its
extension by more steps."""


def utc_now() -> str:
    """The time as ISO 8601 in UTC, to the millisecond."""
    return datetime.now(UTC).isoformat(timespec="milliseconds")


@dataclass(slots=True, kw_only=True)
class RunRecord:
    """The whole record; every value is JSON-ready and free of secrets."""

    schema: str = RECORD_SCHEMA
    run_id: str
    kind: str = "train"
    """What the run is: ``train``, ``multi-run``."""
    parent: dict[str, Any] | None = None
    """The run that this one comes from: ``{"run_id": …, "relation": …}``, see `Relation`. A resumed run keeps its id:
    each process that worked on it is one of its ``sessions``."""
    sequence: int = 0
    """Counts the runs that the store began: what is newest is known by it, never by a clock. 0 for runs of versions
    that did not count, and for imported ones: they are older than all that are counted."""
    status: RunStatus = "running"
    created_at: str = field(default_factory=utc_now)
    ended_at: str | None = None
    command: list[str] = field(default_factory=list)
    """What was typed; empty when started from Python."""
    rail: str = ""
    host: str = ""
    pid: int = 0
    process_started: str | None = None
    """With host and pid: the process that worked on the run last, see `bp_runs.process.process_birth`."""
    sessions: list[dict[str, Any]] = field(default_factory=list)
    """One for each process: ``at``, ``host``, ``pid``, ``from_step``, the ``checkpoint`` that it continued from; of all
    but the last also how it ended: ``status``, ``ended_at``, ``result``."""
    cwd: str = ""
    """Folder that relative paths in ``settings`` and ``command`` start from."""
    settings: dict[str, dict[str, Any]] = field(default_factory=dict)
    """By dotted key: ``{"value": …, "source": "flag"}``."""
    base: dict[str, Any] = field(default_factory=dict)
    """The base model on disk: ``weights``, its `bp_runs.fingerprint.fingerprint_weights`; empty if it holds none."""
    model: dict[str, Any] = field(default_factory=dict)
    """`ModelLoaded` as a dict, once it happened."""
    data: dict[str, Any] = field(default_factory=dict)
    """`DataReady` as a dict, once it happened."""
    plan: dict[str, Any] = field(default_factory=dict)
    """`RunPlanned` as a dict, once it happened; ``settings`` says what was requested."""
    versions: dict[str, str] = field(default_factory=dict)
    hardware: dict[str, Any] = field(default_factory=dict)
    progress: dict[str, Any] = field(default_factory=dict)
    """The last step and its loss, once no process works on it any more; a loss that is not finite is null."""
    result: dict[str, Any] = field(default_factory=dict)
    """`TrainOutcome` as a dict, once it ended well."""
    artifacts: list[dict[str, Any]] = field(default_factory=list)
    error: dict[str, Any] | None = None
    tags: list[str] = field(default_factory=list)
    note: str = ""
    title: str = ""
    """What a person calls the run; empty: nothing."""

    @property
    def is_imported(self) -> bool:
        """Whether the older tool made the run, whose record has not all that it was made with."""
        return not self.rail

    def begin_session(self, *, from_step: int, checkpoint: str | None) -> None:
        """Note that this process works on the run from now on, which is running again."""
        self.host, self.pid, self.process_started = platform.node(), os.getpid(), process_birth(os.getpid())
        if self.sessions:
            self.sessions[-1] |= {"status": self.status, "ended_at": self.ended_at, "result": self.result}
        session = {"at": utc_now(), "host": self.host, "pid": self.pid}
        self.sessions.append({**session, "from_step": from_step, "checkpoint": checkpoint})
        self.status, self.ended_at, self.error, self.result, self.progress = "running", None, None, {}, {}

    @property
    def steps_planned(self) -> int | None:
        """Steps that the run is to do; None while they are neither set nor planned from the data."""
        steps: int | None = self.plan.get("steps", self.setting("training.steps"))
        return steps

    def describe_fix(self) -> str:
        """What to do about the error, in the words of the program that reads the record; empty if there is none."""
        error = self.error or {}
        return render(error.get("hint") or error.get("fix") or "")

    def describe_plan(self) -> str:
        """How long the run trains, in words; empty where that is not recorded."""
        with contextlib.suppress(ContractError):  # the record has none, or it was edited
            from bp_runs.plan import RunPlanned  # a list of runs describes no plan

            return RunPlanned.from_dict(self.plan).describe()
        return ""

    def describe_rows(self) -> str:
        """What became of every row that was read, or what is planned for it; empty where neither is recorded."""
        planned = "" if self.result.get("rows") else "planned: "
        with contextlib.suppress(ContractError):  # as above
            from bp_runs.plan import RowCounts

            return planned + from_json(RowCounts, self.result.get("rows") or self.plan.get("rows")).describe()
        return ""

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready and redacted."""
        redacted: dict[str, Any] = redact_data(asdict(self))
        return redacted

    def to_summary(self) -> dict[str, Any]:
        """The record's row in the index, redacted."""
        row: dict[str, Any] = redact_data(self._summary())
        return row

    def _summary(self) -> dict[str, Any]:
        return {
            "run_id": self.run_id,
            "kind": self.kind,
            "parent": (self.parent or {}).get("run_id"),
            "sequence": self.sequence,
            "status": self.status,
            "created_at": self.created_at,
            "ended_at": self.ended_at,
            "rail": self.rail,
            "model": self.setting("model.name"),
            "data": self.setting("data.path"),
            "steps": self.result.get("steps", self.progress.get("step")),
            "steps_asked": self.steps_planned,
            "first_loss": self.result.get("first_loss"),
            "final_loss": self.result.get("final_loss"),
            "seconds": self.result.get("seconds"),
            "error": (self.error or {}).get("code"),
            "tags": self.tags,
            "title": self.title,
        }

    def describe_artifact(self, artifact: Mapping[str, Any]) -> str:
        """Who wrote a file, from which step, and whether the run has trained on since; as far as recorded."""
        via, step = artifact.get("via"), artifact.get("step")
        words = ["native" if via == "native" else f"via {via}"] if via else []
        now = self.result.get("steps", self.progress.get("step"))
        if isinstance(step, int):
            is_stale = isinstance(now, int) and now > step
            words.append(f"from step {step}, stale: the run is at step {now}" if is_stale else f"from step {step}")
        return ", ".join(words)

    def setting(self, key: str) -> Any:
        """A setting's value by dotted key; None when it was not recorded."""
        return self.settings.get(key, {}).get("value")


def write_record(folder: Path, record: RunRecord) -> None:
    """Publish ``run.json`` in the run's folder, atomically.

    Raises:
        RecordNewerError: The record that stands there is of a newer schema.
        DiskFullError, OutputNotWritableError: The old record stays.
    """
    if (schema_number({"schema": record.schema}) or 0) > LATEST:
        raise RecordNewerError(f"{folder / RECORD_FILE} is of {record.schema}; this version writes {RECORD_SCHEMA}")
    publish_json(folder / RECORD_FILE, record.to_dict())


def read_record(folder: Path) -> RunRecord:
    """Read ``run.json``, led on from an older schema; fields of a newer one are left out. The file is not touched.

    Raises:
        RecordInvalidError: Missing, not JSON, or not a record.
    """
    file = folder / RECORD_FILE
    try:
        data = orjson.loads(file.read_bytes())
    except OSError as error:
        raise RecordInvalidError(f"{file} cannot be read", cause=str(error)) from error
    except orjson.JSONDecodeError as error:
        raise RecordInvalidError(f"{file} is not JSON", cause=str(error)) from error
    return parse_record(data, file, folder.name)


def parse_record(data: Any, file: Path, run_id: str) -> RunRecord:
    """A record from the content of a file, led on from an older schema; fields of a newer one are left out.

    Args:
        file: Where it was read, for errors.
        run_id: Whose record it must be.

    Raises:
        RecordInvalidError: Not a record, or another run's.
    """
    shape = {f.name: type(getattr(_SHAPE, f.name)) for f in fields(RunRecord)}
    if not isinstance(data, dict) or data.get("run_id") != run_id:
        raise RecordInvalidError(f"{file} is not the record of the run {run_id}")
    found = {k: v for k, v in migrate(data).items() if k in shape}
    for name, value in found.items():
        wanted = _OPTIONAL.get(name, shape[name])
        if not isinstance(value, wanted) and not (value is None and name in _OPTIONAL):
            raise RecordInvalidError(f"{file}: {name} is {value!r}, not a {wanted.__name__}")
    for name, part in _PARTS.items():
        parts = found.get(name) or ()
        inner = parts.values() if isinstance(parts, dict) else parts
        if not all(isinstance(value, part) for value in inner):
            raise RecordInvalidError(f"{file}: {name} holds something that is not a {part.__name__}")
    return RunRecord(**found)


_SHAPE = RunRecord(run_id="")
_PARTS = {"settings": dict, "versions": str, "sessions": dict, "artifacts": dict, "tags": str, "command": str}
"""What the values of some fields are; whoever reads a record may go by it."""
_OPTIONAL = {"ended_at": str, "error": dict, "parent": dict, "process_started": str}
"""Fields that may be null."""
