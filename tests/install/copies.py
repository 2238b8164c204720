"""A copy of this tree, and an environment without this one's programs."""

import os
import shutil
import subprocess
from pathlib import Path

from documented import ROOT

TAKEN = ("PIP_", "UV_", "PIPX_", "VIRTUAL_ENV", "PYTHON")


def copy_tree(folder: Path, *, sources: bool) -> Path:
    """Copy the tracked files, and those to be tracked, into a folder; without sources no package can be imported."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    ).stdout.splitlines()  # fmt: skip
    for name in listed:
        if (ROOT / name).is_file() and (sources or "/src/" not in name):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)
    return folder


def clean_environment(**more: str) -> dict[str, str]:
    """The environment without settings of installers, and without this environment's programs."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(TAKEN) or k in {"PIP_CERT", "UV_CACHE_DIR"}}
    paths = [p for p in os.environ["PATH"].split(os.pathsep) if not (Path(p) / "backprop").exists()]
    return kept | {"PATH": os.pathsep.join(paths)} | more
