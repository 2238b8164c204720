"""A zip about one run for a bug report: what was set, what happened, on what machine; no data, weights or secrets."""

from __future__ import annotations

import getpass
import io
import platform
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import orjson

from backpropagate import system
from bp_runs.events import Notice, SampleAnswer
from bp_runs.files import publish_bytes
from bp_runs.record import RunRecord
from bp_runs.redact import redact_data
from bp_runs.store import RunStore

_LEFT_OUT = "[left out]"
_TEXTS = ("training.sample_prompts", "training.run_name")
"""Settings that hold a user's own words."""
_COMMON_NAMES = ("root", "user", "home", "localhost")
_CRASHES = 3
"""Newest tracebacks that go into the report."""
_README = """What is in this report:

run.json       the run's settings, versions, hardware, result and error
metrics.jsonl  its events: losses, speed, memory, notices; answers to prompts are left out
machine.json   this machine, and the installed versions
crashes/       the newest tracebacks of the program, if there are any

Your data, the weights, prompts, notes and secrets are not in it. Your home folder is written as ~, and the names of you
and of this machine are left out. Look at it before you send it.
"""


def write_report(store: RunStore, run: str, file: Path, environ: Mapping[str, str]) -> RunRecord:
    """Write the report of a run to a zip file; returns the run's record.

    Args:
        store: The output folder's runs.
        run: The run's id, or a part of it.
        file: The zip; an earlier one is replaced.
        environ: The environment, of which the program's home is read.

    Raises:
        RunNotFoundError, RecordInvalidError: As `RunStore.load`.
        DiskFullError, OutputNotWritableError: It cannot be written.
    """
    record = store.load(run)
    parts = {
        "README.txt": _README,
        "run.json": _pretty(_without_texts(record.to_dict())),
        "metrics.jsonl": "".join(f"{_line(event)}\n" for event in store.read_metrics(record.run_id)),
        "machine.json": _pretty({"machine": system.describe_machine(), "versions": system.installed_versions()}),
    }
    crashes = sorted((system.program_home(environ) / "crashes").glob("*.txt"))[-_CRASHES:]
    parts |= {f"crashes/{crash.name}": crash.read_text(encoding="utf-8", errors="replace") for crash in crashes}
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, text in parts.items():
            archive.writestr(name, _without_names(redact_data(text), record.host))
    publish_bytes(file, packed.getvalue())
    return record


def _without_texts(record: dict[str, Any]) -> dict[str, Any]:
    """A record without the user's own words: prompts, names, tags, note; nor the command, which may hold them."""
    settings = {
        key: {**row, "value": _LEFT_OUT} if key in _TEXTS and row.get("value") else row
        for key, row in record["settings"].items()
    }
    return {**record, "settings": settings, "note": None, "title": "", "tags": [], "command": record["command"][:2]}


def _line(event: Mapping[str, Any]) -> str:
    if event.get("event") == SampleAnswer.kind:
        event = {**event, "prompt": _LEFT_OUT, "answer": _LEFT_OUT}
    if event.get("event") == Notice.kind and "rows" in (event.get("details") or {}):
        event = {**event, "details": _LEFT_OUT}
    return orjson.dumps(redact_data(event), default=str).decode()


def _pretty(body: Mapping[str, Any]) -> str:
    return orjson.dumps(redact_data(body), default=str, option=orjson.OPT_INDENT_2).decode()


def _without_names(text: str, host: str | None) -> str:
    home = str(Path.home())
    names = {home: "~", platform.node(): "[machine]", host or "": "[machine]", _user(): "[user]"}
    for name, instead in sorted(names.items(), key=lambda pair: -len(pair[0])):
        if len(name) > 1 and name not in _COMMON_NAMES:
            text = re.sub(rf"(?<![\w-]){re.escape(name)}(?![\w-])", instead, text)
    return text


def _user() -> str:
    try:
        return getpass.getuser()
    except (OSError, KeyError, ImportError):
        return ""  # a container's user may have no name
