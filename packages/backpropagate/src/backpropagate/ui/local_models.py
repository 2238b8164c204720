"""Models on this machine: in the Hub's cache, of the quickstart, and in folders that the page may read."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from backpropagate.downloads import SMALL_MODEL, hub_cache, measure
from backpropagate.system import program_home
from backpropagate.ui.folders import Places

_MOST_FOLDERS = 200  # folders of each readable place that are looked at


@dataclass(frozen=True, slots=True)
class LocalModel:
    """A model that needs no download."""

    name: str
    """What to give as the model: a Hub id, or a folder."""
    folder: Path
    source: str
    """``Hub cache``, ``quickstart`` or ``folder``."""

    @property
    def removal(self) -> str | None:
        """What `backprop download --remove` calls it; None for a folder of the user's."""
        return {"Hub cache": self.name, "quickstart": SMALL_MODEL}.get(self.source)

    @property
    def size(self) -> int:
        """Bytes on disk."""
        return measure(self.folder)


def find_local_models(places: Places, environ: Mapping[str, str]) -> list[LocalModel]:
    """Models with weights, each once; nothing is loaded and nothing is asked of the network."""
    found = [*_in_hub_cache(environ), *_of_quickstart(environ)]
    for place in places.readable:
        found += [LocalModel(_shown(folder), folder, "folder") for folder in _folders(place) if _is_model(folder)]
    return list({model.folder: model for model in found}.values())


def _in_hub_cache(environ: Mapping[str, str]) -> list[LocalModel]:
    found = []
    for entry in _folders(hub_cache(environ)):
        owner_and_name = entry.name.removeprefix("models--").split("--", 1)
        if not entry.name.startswith("models--") or len(owner_and_name) != 2:
            continue
        snapshots = [folder for folder in _folders(entry / "snapshots") if _is_model(folder)]
        if snapshots:
            found.append(LocalModel("/".join(owner_and_name), snapshots[-1], "Hub cache"))
    return found


def _of_quickstart(environ: Mapping[str, str]) -> list[LocalModel]:
    return [
        LocalModel(str(folder), folder, "quickstart")
        for folder in _folders(program_home(environ) / "models")
        if _is_model(folder)
    ]


def _is_model(folder: Path) -> bool:
    return (folder / "config.json").is_file() and any(folder.glob("*.safetensors"))


def _folders(parent: Path) -> list[Path]:
    try:
        with os.scandir(parent) as entries:
            found = [Path(e.path) for e in entries if e.is_dir() and not e.name.startswith(".")]
    except OSError:
        return []
    return sorted(found)[:_MOST_FOLDERS]


def _shown(folder: Path) -> str:
    here = Path.cwd()
    return f"./{folder.relative_to(here)}" if folder.is_relative_to(here) else str(folder)
