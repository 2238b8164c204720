"""The older tool's ``run_history.json``: a JSON list of rows, one a run, taken over as finished runs of ours.

Its rows have ``run_id``, ``timestamp``, ``status``, ``model_name``, ``dataset_info``, ``hyperparameters``,
``final_loss``, ``loss_history`` and more. It wrote a loss that was not finite as 0, so that a diverged run looked like
the best one.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from bp_runs.errors import HistoryInvalidError, RunStatus
from bp_runs.events import StepDone
from bp_runs.losses import LossEnds
from bp_runs.record import RunRecord
from bp_runs.store import RunStore

_STATUSES: Mapping[str, RunStatus] = {"completed": "completed", "failed": "failed", "running": "interrupted"}
_KINDS = {"single_run": "train", "multi_run": "multi-run"}
_SETTINGS: Mapping[str, str] = {
    "lora_r": "lora.r",
    "lora_alpha": "lora.alpha",
    "lora_dropout": "lora.dropout",
    "use_dora": "lora.use_dora",
    "use_rslora": "lora.use_rslora",
    "learning_rate": "training.learning_rate",
    "lr": "training.learning_rate",
    "batch_size": "training.batch_size",
    "gradient_accumulation": "training.gradient_accumulation",
    "max_steps": "training.steps",
    "steps": "training.steps",
    "max_seq_length": "model.max_seq_length",
    "samples": "data.samples",
    "seed": "training.seed",
    "method": "training.method",
    "packing": "training.packing",
    "mode": "training.mode",
    "optim": "training.optimizer",
    "reasoning_trace": "data.reasoning_trace",
}
"""Our names of what it recorded; the rest is kept under its own."""
_SAFE_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


def import_history(store: RunStore, file: Path) -> tuple[list[str], list[str]]:
    """Add the file's runs to the store; a run that is there already is left alone, so importing twice adds nothing.

    Returns:
        Ids of the runs that were added, and of those that were there.

    Raises:
        HistoryInvalidError: The file is not such a list; nothing has been added.
    """
    rows = read_history(file)
    there = {row["run_id"] for row in store.list_runs()}
    added: list[str] = []
    known: list[str] = []
    for row in rows:
        record, events = to_record(row, file)
        if record.run_id in there:
            known.append(record.run_id)
            continue
        store.add_finished(record, events)
        there.add(record.run_id)
        added.append(record.run_id)
    return added, known


def read_history(file: Path) -> list[dict[str, Any]]:
    """The rows of the file, checked to be such rows.

    Raises:
        HistoryInvalidError: It cannot be read, is not a JSON list, or a row has no usable run id.
    """
    try:
        rows = json.loads(file.read_text(encoding="utf-8"))  # the older tool wrote NaN as Python does
    except (OSError, ValueError) as error:
        raise HistoryInvalidError(f"{file} cannot be read", cause=str(error)) from error
    if not isinstance(rows, list):
        raise HistoryInvalidError(f"{file} is not a JSON list of runs")
    for place, row in enumerate(rows):
        if not isinstance(row, dict) or not _SAFE_ID.fullmatch(str(row.get("run_id", ""))):
            raise HistoryInvalidError(f"row {place + 1} of {file} has no run id")
    return rows


def to_record(row: Mapping[str, Any], file: Path) -> tuple[RunRecord, list[dict[str, Any]]]:
    """One row as a record and its step events, of which the older tool kept at most a hundred."""
    losses = [_finite(loss) for loss in _list(row.get("loss_history"))]
    status = _status(row, losses)
    final = None if status == "diverged" else _finite(row.get("final_loss"))
    known = [loss for loss in losses if loss is not None]
    steps, created = _whole(row.get("steps")), _time(row.get("started_at") or row.get("timestamp"))
    result: dict[str, Any] = {}
    if status == "completed":
        first = LossEnds(known).means()[0] if known else final
        result = {
            "steps": steps,
            "first_loss": first,
            "final_loss": final,
            "seconds": _finite(row.get("duration_seconds")),
        }
    failure = row.get("failure_reason")
    record = RunRecord(
        run_id=str(row["run_id"]),
        kind=_KINDS.get(str(row.get("session_kind")), "train"),
        status=status,
        created_at=created,
        ended_at=_time(row["completed_at"]) if row.get("completed_at") else None,
        host=str(row.get("host") or ""),
        pid=_whole(row.get("pid")) or 0,
        settings=_settings(row),
        data={"path": row.get("dataset_info"), "sha256": row.get("dataset_hash")},
        progress={"step": steps, "steps": steps, "loss": final},
        result=result,
        artifacts=[{"at": created, "kind": "export", "path": str(path)} for path in _list(row.get("export_paths"))],
        error=_error(str(failure)) if failure else None,
        tags=["imported"],
        note=f"from {file}",
    )
    every = max(1, (steps or len(losses)) // max(1, len(losses)))
    events = [
        {"at": created, "event": StepDone.kind, "step": (place + 1) * every, "steps": steps, "loss": loss}
        for place, loss in enumerate(losses)
    ]
    return record, events


def _status(row: Mapping[str, Any], losses: list[float | None]) -> RunStatus:
    """The status, but diverged where a loss was not finite, or a final 0 belies the losses before it."""
    status = _STATUSES.get(str(row.get("status")), "failed")
    final, known = row.get("final_loss"), [loss for loss in losses if loss is not None]
    broken = len(known) < len(losses) or (final is not None and _finite(final) is None)
    masked = final == 0 and status == "completed" and (not known or known[-1] > 0)
    return "diverged" if broken or masked else status


def _settings(row: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    values: dict[str, Any] = {"model.name": row.get("model_name"), "data.path": row.get("dataset_info")}
    hyper = row.get("hyperparameters")
    for name, value in (hyper if isinstance(hyper, dict) else {}).items():
        values[_SETTINGS.get(str(name), str(name))] = value
    if row.get("steps") is not None:
        values.setdefault("training.steps", row["steps"])
    return {key: {"value": value, "source": "import"} for key, value in values.items() if value is not None}


def _error(reason: str) -> dict[str, Any]:
    return {"code": "", "message": reason, "cause": None, "way_out": "Run it again: backprop train"}


def _finite(value: Any) -> float | None:
    number = float(value) if isinstance(value, int | float) else math.nan
    return number if math.isfinite(number) else None


def _whole(value: Any) -> int | None:
    return int(value) if isinstance(value, int | float) and math.isfinite(value) else None


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _time(text: Any) -> str:
    """A local time without a zone, as the older tool wrote it, as UTC."""
    try:
        return datetime.fromisoformat(str(text)).astimezone(UTC).isoformat(timespec="milliseconds")
    except ValueError:
        return datetime.fromtimestamp(0, UTC).isoformat(timespec="milliseconds")
