"""Disks that are small, and folders that cannot be written, for root as for anybody."""

import contextlib
import os
import shutil
import subprocess
from pathlib import Path

import pytest

IS_ROOT = hasattr(os, "geteuid") and os.geteuid() == 0


@contextlib.contextmanager
def small_disk(folder: Path, size: str):
    """A tmpfs of ``size``; skips where it cannot be mounted."""
    folder.mkdir()
    _mount("-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder)
    try:
        yield folder
    finally:
        subprocess.run(["umount", folder], check=True)


@contextlib.contextmanager
def read_only(path: Path):
    """A folder, or for root a file too, that cannot be written while the context lasts."""
    if not IS_ROOT:
        if path.is_file():
            pytest.skip("only root can mount a file read-only")
        mode = path.stat().st_mode
        path.chmod(0o500)
        try:
            yield
        finally:
            path.chmod(mode)
        return
    _mount("--bind", path, path)
    try:
        _mount("-o", "remount,bind,ro", path)
        yield
    finally:
        subprocess.run(["umount", path], check=True)


def _mount(*arguments) -> None:
    program = shutil.which("mount")
    done = program and subprocess.run([program, *arguments], check=False, capture_output=True)
    if not done or done.returncode:
        pytest.skip("mounting needs root on Linux")
