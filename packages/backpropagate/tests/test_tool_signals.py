"""Signals that end a run: a closed terminal, a lost ssh, a service manager."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest

from bp_runs.checkpoint_store import CheckpointFolder
from bp_runs.store import RunStore

pty = pytest.importorskip("pty", reason="Windows has neither terminals of this kind nor SIGHUP")

STEPS = 150
TRAIN = """
import time
from backpropagate import rails
from backpropagate.cli import main
from bp_runs.testing import FakeRail

class SlowRail(FakeRail):
    def train(self, spec, emit, stop):
        def emit_slowly(event):
            emit(event)
            if event.kind == "step":
                time.sleep(0.01)
        return FakeRail.train(self, spec, emit_slowly, stop)

with rails.use(SlowRail()):
    main()
"""


@pytest.fixture
def command(tmp_path, monkeypatch):
    """A training run of two seconds, as a command line."""
    (tmp_path / "m").mkdir()
    (tmp_path / "m/config.json").write_text("{}")
    (tmp_path / "m/model.safetensors").write_bytes(b"")
    (tmp_path / "d.jsonl").write_text('{"text": "a"}\n')
    monkeypatch.chdir(tmp_path)
    words = f"train -d d.jsonl -m m --output o --steps {STEPS} --eval-share 0 --save-steps 0 --report-to none"
    return [sys.executable, "-c", TRAIN, *words.split()]


def wait_for_steps(output, child):
    """Wait until a run has recorded a step; returns its id."""
    until = time.monotonic() + 30
    while time.monotonic() < until and child.poll() is None:
        for metrics in output.glob("runs/*/metrics.jsonl"):
            if b'"step"' in metrics.read_bytes():
                return metrics.parent.name
        time.sleep(0.02)
    raise AssertionError(f"no step was recorded; exit status {child.poll()}")


def require_stopped(output, run_id):
    """The step was finished and saved, before the last."""
    record = RunStore(output).load(run_id)
    checkpoint, _ = CheckpointFolder(RunStore(output).folder(run_id)).newest_whole()
    assert record.status == "stopped"
    assert checkpoint.reason == "stop"
    assert checkpoint.step == record.result["steps"] < STEPS


def test_a_closed_terminal_finishes_the_step_and_saves(command, tmp_path):
    terminal, theirs = pty.openpty()
    child = subprocess.Popen(  # our own program
        ["setsid", "--ctty", *command], stdin=theirs, stdout=theirs, stderr=theirs
    )
    os.close(theirs)
    run_id = wait_for_steps(tmp_path / "o", child)
    os.close(terminal)  # the kernel sends SIGHUP; every later write to the terminal fails
    assert child.wait(timeout=30) == 130
    require_stopped(tmp_path / "o", run_id)


@pytest.mark.parametrize("sent", [[signal.SIGHUP], [signal.SIGHUP, signal.SIGHUP], [signal.SIGTERM]])
def test_a_hangup_ends_a_run_as_sigterm_does(command, tmp_path, sent):
    child = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    run_id = wait_for_steps(tmp_path / "o", child)
    for number in sent:
        child.send_signal(number)
        time.sleep(0.05)
    assert child.wait(timeout=30) == 130
    require_stopped(tmp_path / "o", run_id)


def test_under_nohup_a_hangup_is_ignored(command, tmp_path):
    child = subprocess.Popen(["nohup", *command], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    run_id = wait_for_steps(tmp_path / "o", child)
    child.send_signal(signal.SIGHUP)
    assert child.wait(timeout=30) == 0
    assert RunStore(tmp_path / "o").load(run_id).status == "completed"
