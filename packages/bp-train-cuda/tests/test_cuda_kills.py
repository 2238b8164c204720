"""A real training under fire: killed at random moments and in its saves, it loses nothing and ends with the same bytes."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.skipif(not hasattr(os, "fork"), reason="a child for each life is forked")
@pytest.mark.parametrize("kills", [20, pytest.param(200, marks=pytest.mark.slow)])
def test_a_training_that_is_killed_goes_on(pico_model, chat_file, tmp_path, kills):
    # A kill does not need the disk; in memory the saves cost nothing but the CPU.
    folder = Path("/dev/shm") / f"bp-kills-{os.getpid()}-{kills}" if Path("/dev/shm").is_dir() else tmp_path / "kills"
    folder.mkdir()
    try:
        script = Path(__file__).with_name("killing.py")
        command = [sys.executable, script, pico_model, chat_file, folder, str(kills), "7"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-3000:]
        seen = json.loads(done.stdout.splitlines()[-1])
        assert seen["kills"] == kills
        assert seen["while saving"] >= kills / 10
        assert seen["runs to their end, same bytes"] >= kills / 8
    finally:
        shutil.rmtree(folder)
