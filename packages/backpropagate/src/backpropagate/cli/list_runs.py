"""`backprop list-runs`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from backpropagate.cli.flags import Json, Output, output_folder
from backpropagate.cli.hint_wording import command_line
from backpropagate.cli.output import print_json
from backpropagate.errors import CommandLineError
from backpropagate.system import output_setting
from bp_runs.errors import RunStatus
from bp_runs.store import RunStore

_HEADS = ("run", "status", "started (UTC)", "steps", "loss", "model", "data", "tags")


def list_runs(
    *,
    output: Output = None,
    status: RunStatus | None = None,
    tag: str | None = None,
    limit: int = 20,
    json: Json = False,
) -> int:
    """List the runs of an output folder, newest first.

    Parameters
    ----------
    status: str
        Only runs that ended so.
    tag: str
        Only runs with this tag.
    limit: int
        At most so many; 0: all.
    """
    folder = output_folder(output)
    if limit < 0:
        raise CommandLineError(f"--limit is {limit}; it must be 0 or more", fix="All of them: --limit 0")
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
    print(_table([_HEADS, *(_cells(row) for row in shown)]))  # noqa: T201
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
        started,
        _steps(row),
        loss,
        Path(row["model"] or "").name,
        Path(row["data"] or "").name,
        " ".join(row["tags"]),
    )


def _steps(row: dict[str, Any]) -> str:
    """``20``, or ``7/20`` where it did not come to its end."""
    done, asked = row["steps"], row["steps_asked"]
    if row["status"] == "completed" or asked is None:
        return str(done or "")
    return f"{done or 0}/{asked}"


def _table(rows: list[tuple[str, ...]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ("  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in rows)
    return "\n".join(lines)
