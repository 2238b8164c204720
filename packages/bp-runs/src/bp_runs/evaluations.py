"""Evaluations of a run's adapter, ``evaluations.json`` in its folder: the newest last, without rows and answers."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import orjson

from bp_runs.files import publish_json
from bp_runs.paths import EVALUATIONS_FILE

SCHEMA = "backpropagate.evaluations/1"
_MOST = 100
"""Evaluations that are kept; the oldest are dropped."""


def add_evaluation(folder: Path, evaluation: Mapping[str, Any]) -> None:
    """Add one to a run's folder, atomically.

    Args:
        folder: The run's folder.
        evaluation: JSON-ready: ``at``, ``adapter``, ``against``, ``data``, ``rows``, ``verdict`` and ``measures``, a
            list with ``name``, ``base``, ``tuned``, ``low``, ``high``, ``rows`` and ``verdict`` each.

    Raises:
        DiskFullError, OutputNotWritableError: The file stays as it was.
    """
    found = [*read_evaluations(folder), dict(evaluation)][-_MOST:]
    publish_json(folder / EVALUATIONS_FILE, {"schema": SCHEMA, "evaluations": found})


def read_evaluations(folder: Path) -> list[dict[str, Any]]:
    """The evaluations in a run's folder, the newest last; empty if the file is missing or damaged."""
    try:
        found = orjson.loads((folder / EVALUATIONS_FILE).read_bytes())
        if found["schema"] != SCHEMA:
            return []
        return [one for one in found["evaluations"] if _is_whole(one)]
    except (OSError, orjson.JSONDecodeError, KeyError, TypeError):
        return []


def _is_whole(found: Any) -> bool:
    texts = ("at", "adapter", "against", "data", "verdict")
    if not isinstance(found, dict) or not all(isinstance(found.get(name), str) for name in texts):
        return False
    measures = found.get("measures")
    return isinstance(found.get("rows"), int) and isinstance(measures, list) and all(map(_is_measure, measures))


def _is_measure(found: Any) -> bool:
    if not isinstance(found, dict) or not isinstance(found.get("name"), str):
        return False
    return all(isinstance(found.get(name), int | float) for name in ("base", "tuned"))
