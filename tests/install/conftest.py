"""Wheels of this tree, and a copy of it from which the sources are gone."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest
from documented import ROOT

TAKEN = ("PIP_", "UV_", "PIPX_", "VIRTUAL_ENV", "PYTHON")


@pytest.fixture(scope="session")
def dist(tmp_path_factory) -> Path:
    """A folder with the wheels of all seven packages, built from this tree."""
    folder = tmp_path_factory.mktemp("dist")
    subprocess.run(["uv", "build", "--all-packages", "--wheel", "--quiet", "--out-dir", folder], cwd=ROOT, check=True)
    assert len(list(folder.glob("*.whl"))) == 7
    return folder


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
