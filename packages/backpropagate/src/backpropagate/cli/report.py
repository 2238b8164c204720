"""`backprop report`."""

from __future__ import annotations

import os
from pathlib import Path

from backpropagate.bug_report import write_report
from backpropagate.cli.flags import Json, Output, output_folder
from backpropagate.cli.output import print_json
from bp_runs.store import RunStore


def report(run: str, *, output: Output = None, to: Path | None = None, json: Json = False) -> int:
    """Write a zip about a run for a bug report, without your data, weights, prompts or secrets.

    Parameters
    ----------
    run: str
        The run's id, or part of it.
    to: Path
        The file to write; default: report-RUN.zip in the current folder.
    """
    store = RunStore(output_folder(output))
    file = to or Path(f"report-{store.find(run)}.zip")
    record = write_report(store, run, file, os.environ)
    if json:
        print_json("report", {"run_id": record.run_id, "file": str(file)})
        return 0
    print(f"  written   {file}")  # noqa: T201
    print("  next      look at it, then attach it to an issue; README.txt in it says what it holds")  # noqa: T201
    return 0
