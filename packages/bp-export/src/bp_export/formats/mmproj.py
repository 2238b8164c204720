"""The vision or audio tower of a base next to a GGUF of its language model, so that a model tuned on text still sees.

llama.cpp and Ollama load it as a file of its own, ``mmproj-<name>.gguf``. It comes from the base alone, through
llama.cpp's own converter, for an adapter on text changes nothing in it.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from bp_export.errors import ArchitectureUnsupportedError, ConversionFailedError
from bp_export.formats.output import require_free_file
from bp_export.llama_cpp.classes import VIA, converts_vision
from bp_export.llama_cpp.convert import convert_folder
from bp_export.llama_cpp.environment import ensure_converter, find_converter
from bp_export.source import read_config
from bp_runs.files import coded_disk_errors, fsync_file, rename

_TYPE = "f16"


def name_mmproj(target: Path) -> Path:
    """Where the towers of a GGUF are: ``mmproj-<its name>`` next to it."""
    return target.with_name(f"mmproj-{target.name}")


def has_towers(base: Path) -> bool:
    """Whether the base's config.json names a vision or audio tower."""
    config = read_config(base)
    return any(isinstance(config.get(f"{kind}_config"), dict) for kind in ("vision", "audio"))


def plan_towers(base: Path, target: Path, *, wanted: bool | None, force: bool) -> tuple[Path | None, tuple[str, ...]]:
    """Where the towers of a GGUF are going to be, if the base has some; nothing is written.

    Args:
        base: The base's folder.
        target: The GGUF of the language model.
        wanted: False: never; None: if llama.cpp's converter is installed already.
        force: Whether an earlier file may be replaced.

    Returns:
        The file for `write_towers`, None without one, and then notes for the user.

    Raises:
        ArchitectureUnsupportedError: ``wanted``, and the converter does not know the towers of this class, or there are
            none.
        OutputTakenError: The file is there already.
        ConverterMissingError: ``wanted``, and the converter can't be installed.
    """
    if wanted is False or (wanted is None and not has_towers(base)):
        return None, ()
    if not has_towers(base) or not converts_vision(read_config(base)):
        why = f"{VIA} does not know its vision tower" if has_towers(base) else "the base has no vision or audio tower"
        if wanted:
            raise ArchitectureUnsupportedError(
                f"there is no mmproj file: {why}", fix="Leave it out: {set:mmproj}", details={"base": str(base)}
            )
        return None, (f"the file understands text only: {why}",)
    path = name_mmproj(target)
    if wanted is None and find_converter() is None:
        return None, ("the file understands text only; {set:mmproj=true} writes the vision tower next to it",)
    require_free_file(path, force=force)
    if wanted:
        ensure_converter()
    return path, ()


def write_towers(base: Path, path: Path, *, wanted: bool | None) -> tuple[Path | None, tuple[str, ...]]:
    """Convert the towers, once the GGUF is there: an export that fails before leaves no file of them.

    Args:
        base: The base's folder.
        path: As from `plan_towers`.
        wanted: As there; None: what fails becomes a note.

    Returns:
        The file, None without one, and notes for the user.

    Raises:
        ConverterMissingError, ConversionFailedError: ``wanted``, and as named.
    """
    try:
        _convert(base, path)
    except ConversionFailedError as error:
        if wanted:
            raise
        return None, (f"the file understands text only: {error.message}: {error.cause}",)
    return path, (f"{path.name} holds the vision tower: Ollama and llama.cpp load both files together",)


def _convert(base: Path, path: Path) -> None:
    converter = ensure_converter()
    with coded_disk_errors(path), tempfile.TemporaryDirectory(prefix=".mmproj-", dir=path.parent) as scratch:
        made = convert_folder(
            converter, base, Path(scratch) / "tower.gguf", type=_TYPE, without_vocabulary=False, vision=True
        )
        fsync_file(made)
        rename(made, path)
