"""Whether an output may stand where it is requested: nothing is replaced unasked, and never what no export wrote.

Every folder that an export writes holds ``export.json``, {"schema", "format", "files": [names]}. A folder without it
may be a model that somebody downloaded or trained, whatever else is in it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bp_export.errors import OutputTakenError
from bp_export.gguf.file import MAGIC
from bp_runs.files import publish_json
from bp_runs.wording import setting_ref

MARK_FILE = "export.json"
MARK_SCHEMA = "backpropagate.export/1"
_ELSEWHERE = "Name another folder: {set:output=./other}; or move this one away yourself."
# What file browsers leave in any folder.
_LITTER = frozenset({".DS_Store", "Thumbs.db", "desktop.ini"})


def write_mark(folder: Path, format: str, template: Mapping[str, Any] | None = None) -> None:
    """Note in a finished folder, not yet in its place, that an export wrote it, and what.

    Args:
        template: Hashes of ten rendered conversations as training stored them, for a folder without a ``run.json``.
    """
    files = sorted(path.name for path in folder.iterdir())
    stored = {} if template is None else {"template": dict(template)}
    publish_json(folder / MARK_FILE, {"schema": MARK_SCHEMA, "format": format, "files": files, **stored})


def require_free_folder(path: Path, *, force: bool, sources: Sequence[Path]) -> None:
    """Reject an output folder that would replace something.

    Args:
        path: The folder.
        force: Whether the folder of an earlier export may be replaced.
        sources: What is read for the export, which is never replaced.

    Raises:
        OutputTakenError: Why not.
    """
    if not path.exists() or (path.is_dir() and not any(path.iterdir())):
        return
    if any(source.resolve().is_relative_to(path.resolve()) for source in sources):
        raise OutputTakenError(f"{path} holds what is to be exported", fix="Name another folder: {set:output=./other}")
    if not force:
        raise OutputTakenError(f"{path} exists and is not empty")
    mark = _read_mark(path)
    if mark is None:
        raise OutputTakenError(f"{path} is no export's folder", fix=_ELSEWHERE)
    there = {entry.name for entry in path.iterdir()} - _LITTER - {MARK_FILE}
    if added := sorted(there - mark[1]):
        raise OutputTakenError(f"{path} holds {added[0]}, which no export wrote", fix=_ELSEWHERE)


def read_format(folder: Path) -> str | None:
    """The format of the export that wrote the folder; None where none did, or one before there were marks."""
    mark = _read_mark(folder)
    return mark[0] if mark else None


def read_mark(folder: Path) -> Mapping[str, Any] | None:
    """What an export noted in a folder that it wrote; None if none did."""
    try:
        mark: dict[str, Any] = json.loads((folder / MARK_FILE).read_bytes())
        return mark if mark["schema"] == MARK_SCHEMA else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _read_mark(folder: Path) -> tuple[str, set[str]] | None:
    """The format, and the names of what an export wrote there; None where none did."""
    try:
        mark = read_mark(folder)
        return None if mark is None else (str(mark["format"]), set(map(str, mark["files"])))
    except (KeyError, TypeError):
        return None


def require_free_file(path: Path, *, force: bool, sources: Sequence[Path] = ()) -> None:
    """Reject an output file that would replace something.

    Args:
        path: The GGUF.
        force: Whether an earlier GGUF may be replaced.
        sources: Files that are read for it, which are never replaced.

    Raises:
        OutputTakenError: Why not.
    """
    if path.is_dir():
        raise OutputTakenError(f"{path} is a folder", fix=f"Name a file: {setting_ref('output', path / 'model.gguf')}")
    if not path.exists():
        return
    if not force:
        raise OutputTakenError(f"{path} exists")
    if path.resolve() in [source.resolve() for source in sources]:
        raise OutputTakenError(f"{path} is read for it", fix="Name another file: {set:output=./other.gguf}")
    with path.open("rb") as file:
        if file.read(len(MAGIC)) not in (MAGIC, b""):
            raise OutputTakenError(f"{path} exists and is no GGUF", fix="Name another file: {set:output=./model.gguf}")
