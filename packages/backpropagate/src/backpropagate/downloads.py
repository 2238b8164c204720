"""Base models fetched before a run needs them, and removed again to free the disk."""

from __future__ import annotations

import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from backpropagate import catalogue
from backpropagate.errors import ModelNotFoundError
from backpropagate.presets import find_preset
from backpropagate.quickstart_model import FOLDER_NAME, find_small_model
from backpropagate.system import program_home
from bp_runs.files import coded_disk_errors

SMALL_MODEL = "quickstart"
"""The name of quickstart's small model: unpacked from its package, or fetched from the Hub."""
_REPORT_SECONDS = 1.0


@dataclass(frozen=True, slots=True)
class LocalCopy:
    """A model on this machine.

    Attributes:
        name: As given: a preset, a Hub id, or ``quickstart``.
        folder: The folder that the weights are in.
        size: Bytes on disk.
    """

    name: str
    folder: Path
    size: int


def hub_cache(environ: Mapping[str, str]) -> Path:
    """The folder in which huggingface_hub keeps what it downloads."""
    home = Path(environ.get("HF_HOME") or Path.home() / ".cache/huggingface")
    return Path(environ.get("HF_HUB_CACHE") or home / "hub")


def fetch_model(
    name: str, environ: Mapping[str, str], *, offline: bool, report: Callable[[int, int | None], None]
) -> LocalCopy:
    """Download a model unless it is in the cache; an interrupted download continues where it stopped.

    Args:
        name: A preset, a Hub id, or ``quickstart``.
        environ: Environment variables.
        offline: Use no network.
        report: Called about once per second with the bytes on disk and the total; None if the total is not known.

    Raises:
        CodedError: As `catalogue.find_model`, or `find_small_model`.
    """
    if name == SMALL_MODEL:
        folder = Path(find_small_model(program_home(environ), offline=offline))
        folder = folder if folder.is_dir() else catalogue.find_model(str(folder), offline=True).folder
        return LocalCopy(name, folder, measure(folder))
    preset = find_preset(name)
    repo = preset.model if preset is not None else name
    place = _repo_folder(repo, environ)
    total = None if offline or _is_folder(name) else catalogue.measure_download(repo)
    with _reports(place / "blobs", total, report):
        folder = catalogue.find_model(repo, offline=offline).folder
    return LocalCopy(name, folder, measure(place if place.is_dir() else folder))


def remove_model(name: str, environ: Mapping[str, str]) -> LocalCopy:
    """Remove a downloaded model from the cache; folders of the user's are never touched.

    Raises:
        ModelNotFoundError: The cache doesn't hold it.
        OutputNotWritableError: It can't be deleted.
    """
    preset = find_preset(name)
    folder = _repo_folder(preset.model if preset is not None else name, environ)
    if name == SMALL_MODEL:
        folder = program_home(environ) / "models" / FOLDER_NAME
    if not folder.is_dir() or folder.is_symlink():
        raise ModelNotFoundError(f"{name} is not a downloaded model", fix="Show them: {do:models}")
    found = LocalCopy(name, folder, measure(folder))
    with coded_disk_errors(folder):
        shutil.rmtree(folder)
    return found


def measure(folder: Path) -> int:
    """Bytes of a folder's files; a file that a link points to outside counts too, and each file counts once."""
    sizes: dict[tuple[int, int], int] = {}
    for parent, _, names in os.walk(folder):
        for name in names:
            try:
                found = (Path(parent) / name).stat()
            except OSError:
                continue  # it was renamed while the folder was read
            sizes[(found.st_dev, found.st_ino)] = found.st_size
    return sum(sizes.values())


def _is_folder(name: str) -> bool:
    return Path(name).is_dir()


def _repo_folder(repo: str, environ: Mapping[str, str]) -> Path:
    return hub_cache(environ) / f"models--{repo.replace('/', '--')}"


@contextmanager
def _reports(blobs: Path, total: int | None, report: Callable[[int, int | None], None]) -> Iterator[None]:
    """Report the size of ``blobs`` from another thread until the block ends."""
    ended = threading.Event()

    def look() -> None:
        while not ended.wait(_REPORT_SECONDS):
            report(measure(blobs), total)

    thread = threading.Thread(target=look, daemon=True)
    thread.start()
    began = time.monotonic()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        if time.monotonic() - began > _REPORT_SECONDS:
            report(measure(blobs), total)
