"""The table of `backprop list-runs`; light, see `backpropagate.cli.fast_path`."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Any

from backpropagate.cli.hint_wording import command_line
from backpropagate.cli.output import print_json
from backpropagate.errors import CommandLineError
from backpropagate.run_hints import output_setting
from bp_runs.errors import RunStatus
from bp_runs.store import RunStore

_HEADS = ("run", "status", "steps", "loss", "model", "data", "tags", "started (UTC)")
_SHRINKS = (5, 4, 6)
"""Columns that are cut where a terminal is too narrow: data first, then model and tags."""
_LEAST = 6
"""Columns of a terminal that a cut column keeps."""


def print_list(folder: Path, *, status: RunStatus | None, tag: str | None, limit: int, json: bool) -> int:
    """Print the runs of an output folder, newest first, one line each."""
    if limit < 0:
        raise CommandLineError(f"--limit is {limit}; it must be 0 or more", fix="Show all of them: --limit 0")
    shown, total = _find(RunStore(folder), status, tag, limit)
    if json:
        print_json("list-runs", {"runs": shown, "total": total})
        return 0
    if not shown and (status or tag):
        print(f"no such runs in {folder}; see all: {command_line('list-runs', **output_setting(folder))}")  # noqa: T201
        return 0
    if not shown:
        start = command_line("train", data="my_data.jsonl", **output_setting(folder))
        print(f"no runs in {folder}; start one: {start}")  # noqa: T201
        return 0
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else None
    print(table([_HEADS, *(_cells(row) for row in shown)], width))  # noqa: T201
    if len(shown) < total:
        print(f"{total - len(shown)} older ones: --limit 0")  # noqa: T201
    return 0


def _find(store: RunStore, status: RunStatus | None, tag: str | None, limit: int) -> tuple[list[dict[str, Any]], int]:
    """The rows to show, and how many there are."""
    if limit and not (status or tag):
        return store.list_newest(limit)
    rows = [r for r in store.list_runs() if status in (None, r["status"]) and (tag is None or tag in r["tags"])]
    return rows[:limit] if limit else rows, len(rows)


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    loss = "" if row["final_loss"] is None else f"{row['first_loss']:.2f} → {row['final_loss']:.2f}"
    started = row["created_at"][:16].replace("T", " ")
    return (
        row["run_id"],
        row["status"],
        _steps(row),
        loss,
        Path(row["model"] or "").name,
        row.get("title") or Path(row["data"] or "").name,
        " ".join(row["tags"]),
        started,
    )


def _steps(row: dict[str, Any]) -> str:
    """``20``, or ``7/20`` where it did not come to its end."""
    done, asked = row["steps"], row["steps_asked"]
    if row["status"] == "completed" or asked is None:
        return str(done or "")
    return f"{done or 0}/{asked}"


def table(rows: list[tuple[str, ...]], width: int | None) -> str:
    """Rows as aligned lines; in a terminal of ``width`` columns each row stays on one line.

    Too wide a table first loses its last column, the time, which a run's id tells too; then names are cut.
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    if width is not None and sum(widths) + 2 * (len(widths) - 1) > width:
        rows, widths = [row[:-1] for row in rows], widths[:-1]
        for place in _SHRINKS:
            excess = sum(widths) + 2 * (len(widths) - 1) - width
            if excess > 0:
                widths[place] = min(widths[place], max(_LEAST, widths[place] - excess))
    return "\n".join(_line(row, widths)[:width] for row in rows)


def _line(row: tuple[str, ...], widths: list[int]) -> str:
    cells = (cell if len(cell) <= w else f"{cell[: w - 1]}…" for cell, w in zip(row, widths, strict=True))
    return "  ".join(cell.ljust(w) for cell, w in zip(cells, widths, strict=True)).rstrip()
