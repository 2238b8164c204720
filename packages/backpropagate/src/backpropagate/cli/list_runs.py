"""`backprop list-runs`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from backpropagate.cli.flags import Json, Output, output_folder
from backpropagate.cli.screen import print_json
from bp_runs.errors import RunStatus
from bp_runs.store import RunStore

_HEADS = ("run", "status", "started (UTC)", "steps", "loss", "model", "data")


def list_runs(*, output: Output = None, status: RunStatus | None = None, limit: int = 20, json: Json = False) -> int:
    """List the runs of an output folder, newest first.

    Parameters
    ----------
    status: str
        Only runs that ended so.
    limit: int
        At most so many; 0: all.
    """
    rows = [r for r in RunStore(output_folder(output)).list_runs() if status in (None, r["status"])]
    shown = rows[:limit] if limit else rows
    if json:
        print_json("list-runs", {"runs": shown, "total": len(rows)})
        return 0
    if not rows:
        print(f"no runs in {output_folder(output)}; start one: backprop train --data my_data.jsonl")  # noqa: T201
        return 0
    print(_table([_HEADS, *(_cells(row) for row in shown)]))  # noqa: T201
    if len(shown) < len(rows):
        print(f"{len(rows) - len(shown)} older ones: --limit 0")  # noqa: T201
    return 0


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    loss = "" if row["final_loss"] is None else f"{row['first_loss']:.2f} → {row['final_loss']:.2f}"
    started = row["created_at"][:16].replace("T", " ")
    return (
        row["run_id"],
        row["status"],
        started,
        str(row["steps"] or ""),
        loss,
        Path(row["model"] or "").name,
        Path(row["data"] or "").name,
    )


def _table(rows: list[tuple[str, ...]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ("  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in rows)
    return "\n".join(lines)
