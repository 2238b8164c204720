"""Wheels of this tree."""

import subprocess
from pathlib import Path

import pytest
from documented import ROOT


@pytest.fixture(scope="session")
def dist(tmp_path_factory) -> Path:
    """A folder with the wheels of all seven packages, built from this tree."""
    folder = tmp_path_factory.mktemp("dist")
    subprocess.run(["uv", "build", "--all-packages", "--wheel", "--quiet", "--out-dir", folder], cwd=ROOT, check=True)
    assert len(list(folder.glob("*.whl"))) == 7
    return folder
