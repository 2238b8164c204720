"""`backprop doctor`."""

from __future__ import annotations

import os
import shutil
import sys
import textwrap
from pathlib import Path

from backpropagate.cli.flags import Json, output_folder
from backpropagate.cli.output import print_json
from backpropagate.doctor import Diagnosis, diagnose
from backpropagate.errors import DoctorError
from bp_runs.errors import UserError

_MARKS = {"ok": "ok", "warning": "look", "failed": "FAILED", "skipped": "-"}


def doctor(*, json: Json = False) -> int:
    """Try out what training and export need here, and say how to fix what does not work.

    It computes on the GPU, takes tiny training steps, loads llama.cpp, and asks Ollama and the Hub for a sign of life;
    with --offline not the Hub. The exit status is 65 where training cannot work.
    """
    found: list[Diagnosis] = []
    for diagnosis in diagnose(os.environ, _output()):
        found.append(diagnosis)
        if not json:
            print("\n".join(_lines(diagnosis)), flush=True)  # noqa: T201
    failed = [d.name for d in found if d.finding.state == "failed"]
    if json:
        print_json("doctor", {"checks": [d.to_dict() for d in found], "failed": failed})
        return DoctorError.exit_status if failed else 0
    if failed:
        raise DoctorError(f"{len(failed)} of {len(found)} checks failed: {', '.join(failed)}")
    looks = sum(d.finding.state == "warning" for d in found)
    print(f"\n  everything that training needs works{f'; {looks} things to look at' if looks else ''}")  # noqa: T201
    return 0


def _output() -> Path:
    try:
        return output_folder(None)
    except UserError:  # the check of the settings tells it
        return Path("output")


def _lines(diagnosis: Diagnosis) -> list[str]:
    finding = diagnosis.finding
    rows = [(_MARKS[finding.state], diagnosis.name, finding.message)]
    if finding.fix and finding.state != "ok":
        rows.append(("", "do:", finding.fix))
    return [line for row in rows for line in _wrap(*row)]


def _wrap(mark: str, name: str, words: str) -> list[str]:
    """One line, or on a terminal as many as fit it, below each other."""
    head = f"  {mark:<7} {name:<14} "
    if not sys.stdout.isatty():
        return [head + words]
    width = max(shutil.get_terminal_size().columns, len(head) + 20)
    return textwrap.wrap(
        words,
        width,
        initial_indent=head,
        subsequent_indent=" " * len(head),
        break_long_words=False,
        break_on_hyphens=False,
    )
