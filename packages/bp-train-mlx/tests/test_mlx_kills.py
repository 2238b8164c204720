"""A real run of the MLX rail under fire: killed at random moments and in its saves, it ends with the same bytes."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "bp-train-cuda" / "tests" / "killing.py"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="a child for each life is forked")
@pytest.mark.parametrize("kills", [6, pytest.param(25, marks=pytest.mark.slow)])
def test_a_run_that_is_killed_resumes(pico_model, chat_file, tmp_path, kills):
    folder = (
        Path("/dev/shm") / f"bp-mlx-kills-{os.getpid()}-{kills}" if Path("/dev/shm").is_dir() else tmp_path / "kills"
    )
    folder.mkdir()
    try:
        command = [sys.executable, SCRIPT, pico_model, chat_file, folder, str(kills), "7", "mlx"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-3000:]
        seen = json.loads(done.stdout.splitlines()[-1])
        assert seen["kills"] == kills
        assert seen["runs to their end, same bytes"] >= 1
    finally:
        shutil.rmtree(folder)
