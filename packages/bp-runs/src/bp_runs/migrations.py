"""From a record of an older schema to today's: a numbered list that only ever grows at its end.

A step, once released, is never changed: records that it has led on are already on people's disks. A record of a newer
schema than the last number is read as far as it is understood, and never rewritten.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

NAME = "backpropagate.run"


@dataclass(frozen=True, slots=True)
class Migration:
    """One step of the schema."""

    number: int
    """The schema that it leads to."""
    what: str
    change: Callable[[dict[str, Any]], None]
    """Changes a record of the schema before, in place."""


def _add_sessions(data: dict[str, Any]) -> None:
    first = {"at": data.get("created_at", ""), "host": data.get("host", ""), "pid": data.get("pid", 0), "from_step": 0}
    data |= {"parent": None, "sessions": [first], "tags": [], "note": "", "progress": {}, "process_started": None}


MIGRATIONS = (Migration(2, "parent, sessions, progress, tags and note", _add_sessions),)

LATEST = MIGRATIONS[-1].number
RECORD_SCHEMA = f"{NAME}/{LATEST}"


def schema_number(data: dict[str, Any]) -> int | None:
    """The number in ``schema``; None where it is none of ours."""
    name, _, number = str(data.get("schema")).rpartition("/")
    return int(number) if name == NAME and number.isascii() and number.isdigit() else None


def migrate(data: dict[str, Any]) -> dict[str, Any]:
    """``data`` led on to the latest schema; unchanged where it is as new, or newer."""
    found = dict(data)
    number = schema_number(found)
    for step in MIGRATIONS:
        if number is not None and number < step.number:
            step.change(found)
            found["schema"] = f"{NAME}/{step.number}"
    return found
