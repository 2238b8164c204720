"""From a record of an older schema to today's: a numbered list that only ever grows at its end.

A step, once released, is never changed: records that it has led on are already on people's disks. A record of a newer
schema than the last number is read as far as it is understood, and never rewritten.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
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


def _add_sequence(data: dict[str, Any]) -> None:
    data |= {"sequence": 0, "base": {}}


def _name_merge_arms(data: dict[str, Any]) -> None:
    """``slao`` meant any of three arms, which ``slao_qr`` told apart; before that switch it was the paper's."""
    settings = data.get("settings")
    if not isinstance(settings, dict):
        return
    switch, merge = settings.pop("multirun.slao_qr", None), settings.get("multirun.merge")
    if not isinstance(merge, dict):
        return
    if merge.get("value") == "slao":
        settings["multirun.merge"] = merge = _merge_arm(merge, switch)
    result = data.get("result")
    if isinstance(result, dict) and isinstance(card := result.get("score_card"), dict):
        card.setdefault("merge", merge.get("value"))


def _merge_arm(merge: dict[str, Any], switch: Any) -> dict[str, Any]:
    told = switch if isinstance(switch, dict) else {"value": "on", "source": "default"}
    arm = {"off": "ftba-mb", "on": "slao", "preserving": "slao-preserving"}.get(str(told.get("value")), "slao")
    source = merge.get("source") if told.get("source") == "default" else told.get("source")
    return {"value": arm, "source": source}


MIGRATIONS = (
    Migration(2, "parent, sessions, progress, tags and note", _add_sessions),
    Migration(3, "sequence and base", _add_sequence),
    Migration(4, "each merge arm of a multi-run by its own name", _name_merge_arms),
)

LATEST = MIGRATIONS[-1].number
RECORD_SCHEMA = f"{NAME}/{LATEST}"


def schema_number(data: Mapping[str, Any], name: str = NAME) -> int | None:
    """The number in ``schema``; None where it is none of that name's."""
    found, _, number = str(data.get("schema")).rpartition("/")
    return int(number) if found == name and number.isascii() and number.isdigit() else None


def migrate(data: Mapping[str, Any], name: str = NAME, steps: Sequence[Migration] = MIGRATIONS) -> dict[str, Any]:
    """``data`` led on to the latest schema; unchanged where it is as new, or newer.

    Args:
        data: A record, or what else has a list of its own: a rail's checkpoint.
        name: The schema's, without its number.
        steps: The list.
    """
    found = dict(data)
    number = schema_number(found, name)
    for step in steps:
        if number is not None and number < step.number:
            step.change(found)
            found["schema"] = f"{name}/{step.number}"
    return found
