"""`backprop export-runs`."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

import orjson
from cyclopts import Parameter

from backpropagate.cli.flags import Json, Output, output_folder, spell
from backpropagate.cli.output import print_json
from bp_runs.errors import RunStatus
from bp_runs.files import publish_bytes, require_folder
from bp_runs.record import read_record
from bp_runs.store import RunStore

_LINE_SCHEMA = "backpropagate.exported-run/1"


def export_runs(
    *,
    output: Output = None,
    format: Literal["jsonl", "csv"] = "jsonl",
    to: Path | None = None,
    status: RunStatus | None = None,
    metrics: Annotated[bool, Parameter(negative="")] = False,
    json: Json = False,
) -> int:
    """Write all runs of an output folder as one file, oldest first.

    Parameters
    ----------
    format: str
        jsonl: a line a run, with its whole record; csv: a row a run, with its summary and settings.
    to: Path
        The file to write; default: the screen.
    status: str
        Only runs that ended so.
    metrics: bool
        With jsonl: each run's events too.
    """
    store = RunStore(output_folder(output))
    rows = [row for row in reversed(store.list_runs()) if status in (None, row["status"])]
    text = _to_csv(store, rows) if format == "csv" else b"".join(_to_lines(store, rows, metrics=metrics))
    if to is not None:
        require_folder(to.absolute().parent)
        publish_bytes(to, text)
    if json:
        print_json("export-runs", {"runs": len(rows), "format": format, "file": None if to is None else str(to)})
    elif to is None:
        print(text.decode(), end="")  # noqa: T201
    else:
        print(f"  exported  {len(rows)} runs to {to}")  # noqa: T201
    return 0


def _to_lines(store: RunStore, rows: list[dict[str, Any]], *, metrics: bool) -> Iterator[bytes]:
    for row in rows:
        record = _record(store, row)
        events = {"metrics": store.read_metrics(row["run_id"])} if metrics else {}
        line = {**record, "schema": _LINE_SCHEMA, "record_schema": record.get("schema"), **events}
        yield orjson.dumps(line, option=orjson.OPT_APPEND_NEWLINE)


def _record(store: RunStore, row: dict[str, Any]) -> dict[str, Any]:
    """The run's whole record; its summary row where the record cannot be read."""
    if row["error"] == "STATE_RECORD_INVALID":
        return row
    return read_record(store.folder(row["run_id"])).to_dict()


def _to_csv(store: RunStore, rows: list[dict[str, Any]]) -> bytes:
    flat = []
    for row in rows:
        settings = _record(store, row).get("settings", {})
        flat.append({**row, "tags": " ".join(row["tags"]), **{k: _cell(v["value"]) for k, v in settings.items()}})
    columns = list(dict.fromkeys(name for row in flat for name in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(flat)
    return text.getvalue().encode()


def _cell(value: Any) -> Any:
    """A setting as it is typed; several words as JSON."""
    return orjson.dumps(value).decode() if isinstance(value, list) else None if value is None else spell(value)
