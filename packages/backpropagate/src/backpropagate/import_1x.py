"""The older tool's ``run_history.json``: a JSON list of rows, one a run, taken over as finished runs of ours.

Its rows have ``run_id``, ``timestamp``, ``status``, ``model_name``, ``dataset_info``, ``hyperparameters``,
``final_loss``, ``loss_history`` and more. It wrote a loss that was not finite as 0, so that a diverged run looked like
the best one.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeGuard

import orjson

from backpropagate.errors import HistoryInvalidError
from bp_runs.errors import RunStatus, first_line
from bp_runs.events import StepDone
from bp_runs.index import run_ids
from bp_runs.metrics import LossEnds
from bp_runs.record import RunRecord
from bp_runs.store import RunStore
from bp_runs.wording import render

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
_OF_A_RUN = frozenset({"run_id", "model_name", "hyperparameters", "loss_history", "final_loss"})
_MOST_DIGITS = 2**53  # beyond, a JSON number is kept as text
_SAFE_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Imported:
    """What became of the rows of a history."""

    added: list[str]
    """Ids of the runs that were added."""
    known: list[str]
    """Of those that were there already."""
    left_out: list[str]
    """Rows that are no runs: the file and the row, counted from 1."""


def import_history(store: RunStore, file: Path) -> Imported:
    """Add the file's runs to the store; a run that is there already is left alone, so importing twice adds nothing.

    Raises:
        HistoryInvalidError: The file is not such a list; nothing has been added.
    """
    rows, left_out = read_history(file)
    there = set(run_ids(store.output))
    added: list[str] = []
    known: list[str] = []
    for row in rows:
        record, events = to_record(row, file)
        is_new = record.run_id not in there and store.add_finished(record, events)
        (added if is_new else known).append(record.run_id)
    return Imported(added=added, known=known, left_out=left_out)


def read_history(file: Path) -> tuple[list[dict[str, Any]], list[str]]:
    """The file's rows that are runs, one a run id, and where those stand that are none.

    Where an id occurs twice, what the later row tells counts; a row without a usable id gets one of its content.

    Raises:
        HistoryInvalidError: It cannot be read, is not a JSON list, or has no row that is a run.
    """
    try:
        found = json.loads(file.read_text(encoding="utf-8-sig"))  # the older tool wrote NaN as Python does
    except (OSError, ValueError, RecursionError) as error:
        raise HistoryInvalidError(f"{file} cannot be read", cause=first_line(error)) from error
    if not isinstance(found, list):
        raise HistoryInvalidError(f"{file} is not a JSON list of runs")
    rows: dict[str, dict[str, Any]] = {}
    left_out: list[str] = []
    for place, row in enumerate(found, start=1):
        if not isinstance(row, dict) or not row.keys() & _OF_A_RUN:
            left_out.append(f"{file}, row {place}")
            continue
        told = {name: value for name, value in _storable(row).items() if value is not None}
        rows.setdefault(_run_id(told), {}).update(told)
    if found and not rows:
        raise HistoryInvalidError(f"no row of {file} is a run")
    return [row | {"run_id": run_id, "own_id": row.get("run_id")} for run_id, row in rows.items()], left_out


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
        data={"path": _text(row.get("dataset_info")), "sha256": row.get("dataset_hash")},
        progress={"step": steps, "steps": steps, "loss": final},
        result=result,
        artifacts=[{"at": created, "kind": "export", "path": str(path)} for path in _list(row.get("export_paths"))],
        error=_error(str(failure)) if failure else None,
        tags=["imported"],
        note=f"from {file}" + ("" if str(row["own_id"]) == row["run_id"] else f", where its id is {row['own_id']!r}"),
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
    broken = any(_is_broken(loss) for loss in (*_list(row.get("loss_history")), final))
    masked = final == 0 and status == "completed" and (not known or known[-1] > 0)
    return "diverged" if broken or masked else status


def _settings(row: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    values: dict[str, Any] = {"model.name": _text(row.get("model_name")), "data.path": _text(row.get("dataset_info"))}
    hyper = row.get("hyperparameters")
    for name, value in (hyper if isinstance(hyper, dict) else {}).items():
        values[_SETTINGS.get(str(name), str(name))] = value
    values["training.steps"] = _whole(values.get("training.steps", row.get("steps")))
    return {key: {"value": value, "source": "import"} for key, value in values.items() if value is not None}


def _error(reason: str) -> dict[str, Any]:
    return {"code": "", "message": reason, "cause": None, "fix": render("Run it again: {do:train}")}


def _run_id(row: Mapping[str, Any]) -> str:
    own = str(row.get("run_id", ""))
    if _SAFE_ID.fullmatch(own):
        return own
    return f"older-{hashlib.sha256(orjson.dumps(row, option=orjson.OPT_SORT_KEYS)).hexdigest()[:12]}"


def _storable(value: Any) -> Any:
    """As it is, but for what our JSON cannot hold: numbers of over 53 bits, halves of surrogate pairs."""
    if isinstance(value, dict):
        return {_storable(str(name)): _storable(inner) for name, inner in value.items()}
    if isinstance(value, list):
        return [_storable(inner) for inner in value]
    if isinstance(value, str):
        return value.encode("utf-8", "replace").decode()
    return str(value) if isinstance(value, int) and abs(value) > _MOST_DIGITS else value


def _is_number(value: Any) -> TypeGuard[int | float]:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_broken(value: Any) -> bool:
    return _is_number(value) and not math.isfinite(value)


def _finite(value: Any) -> float | None:
    return float(value) if _is_number(value) and math.isfinite(value) else None


def _whole(value: Any) -> int | None:
    return int(value) if _is_number(value) and abs(value) < _MOST_DIGITS else None


def _text(value: Any) -> str | None:
    return None if value is None else str(value)


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _time(told: Any) -> str:
    """A local time without a zone, as the older tool wrote it, or seconds since 1970, as UTC; else 1970."""
    try:
        found = datetime.fromtimestamp(told, UTC) if _is_number(told) else datetime.fromisoformat(str(told))
        return found.astimezone(UTC).isoformat(timespec="milliseconds")
    except (ValueError, OverflowError, OSError):
        return datetime.fromtimestamp(0, UTC).isoformat(timespec="milliseconds")
