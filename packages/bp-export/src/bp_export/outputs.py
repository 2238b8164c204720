"""Whether an output may stand where it is asked for: nothing is replaced unasked, and never what no export wrote."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from bp_export.errors import OutputTakenError
from bp_export.gguf import MAGIC
from bp_runs.adapter import CONFIG_FILE

# One of them is in every folder that an export writes.
_MARKS = (CONFIG_FILE, "config.json", "Modelfile")


def require_free_folder(path: Path, *, force: bool, sources: Sequence[Path]) -> None:
    """Refuse an output folder that would replace something.

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
        raise OutputTakenError(f"{path} holds what is to be exported", way_out="Name another folder: --output ./other")
    if not force:
        raise OutputTakenError(f"{path} exists and is not empty")
    if not any((path / mark).is_file() for mark in _MARKS):
        raise OutputTakenError(f"{path} is no export's folder", way_out="Name another folder: --output ./other")


def require_free_file(path: Path, *, force: bool, sources: Sequence[Path] = ()) -> None:
    """Refuse an output file that would replace something.

    Args:
        path: The GGUF.
        force: Whether an earlier GGUF may be replaced.
        sources: Files that are read for it, which are never replaced.

    Raises:
        OutputTakenError: Why not.
    """
    if path.is_dir():
        raise OutputTakenError(f"{path} is a folder", way_out=f"Name a file: --output {path / 'model.gguf'}")
    if not path.exists():
        return
    if not force:
        raise OutputTakenError(f"{path} exists")
    if path.resolve() in [source.resolve() for source in sources]:
        raise OutputTakenError(f"{path} is read for it", way_out="Name another file: --output ./other.gguf")
    with path.open("rb") as file:
        if file.read(len(MAGIC)) not in (MAGIC, b""):
            raise OutputTakenError(f"{path} exists and is no GGUF", way_out="Name another file: --output ./model.gguf")
