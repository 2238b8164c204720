"""Kill a piece of work between any two of its system calls (Linux: by ptrace). No part of a test: run as a script.

    python dying.py FOLDER [EVERY]

In FOLDER a run of `FakeRail` is killed at each system call's entry and exit (or at every EVERY-th), and looked at after
each kill: the store opens, the newest checkpoint is whole and no older than the last completed one, and the run goes on.
Prints the number of kills as its last line; any fault ends it with a traceback.
"""

import ctypes
import os
import signal
import sys
import traceback
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from bp_runs import Settings, TrainSpec
from bp_runs.checkpoint_store import CheckpointFolder
from bp_runs.spec import DataSpec, TrainingSpec
from bp_runs.store import RunStore
from bp_runs.testing import FakeRail

_TRACEME, _SYSCALL = 0, 24


def die_at(work: Callable[[], None], call: int) -> bool:
    """Fork and do ``work``, killed at its ``call``-th entry or exit of a system call; False where it ended before."""
    libc = ctypes.CDLL(None, use_errno=True)
    pid = os.fork()
    if pid == 0:
        libc.ptrace(_TRACEME, 0, None, None)
        os.kill(os.getpid(), signal.SIGSTOP)
        status = 1
        try:
            work()
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    _, status = os.waitpid(pid, 0)
    for _ in range(call):
        if libc.ptrace(_SYSCALL, pid, None, None) != 0:
            raise OSError(ctypes.get_errno(), "ptrace")
        _, status = os.waitpid(pid, 0)
        if not os.WIFSTOPPED(status):
            assert os.WEXITSTATUS(status) == 0, "the work failed by itself"
            return False
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return True


class Victim:
    """A run of three steps with a checkpoint after the first and the second, over and over in one output folder."""

    def __init__(self, folder: Path) -> None:
        self.store = RunStore(folder / "out")
        data = folder / "data.jsonl"
        data.write_text('{"text": "a"}\n')
        training = TrainingSpec(steps=3, save_steps=1, keep_checkpoints=2)
        self.settings = Settings(data=DataSpec(path=str(data)), training=training)
        self.run_id = ""

    def begin(self) -> None:
        """A run with one completed checkpoint, cut off."""
        with self.store.start(settings={}, rail="fake") as run:
            spec = TrainSpec.build(self.settings, run.folders, base=self.store.output)
            FakeRail().train(spec, run.emit, lambda: True)
        self.run_id = run.run_id

    def go_on(self) -> None:
        """Resume it to the end, publish and finish."""
        newest, _ = CheckpointFolder(self.store.folder(self.run_id)).newest_whole()
        with self.store.reopen(self.run_id, from_step=newest.step, checkpoint=newest.path.name) as run:
            spec = TrainSpec.build(self.settings, run.folders, base=self.store.output, checkpoint=newest.path)
            outcome = FakeRail().train(replace(spec), run.emit, lambda: False)
            self.store.publish_adapter(run.run_id)
            run.finish(outcome)

    def look(self) -> None:
        """What must hold after any kill."""
        row = next(r for r in self.store.list_runs() if r["run_id"] == self.run_id)
        record = self.store.load(self.run_id)
        assert row["status"] == record.status != "running", (row, record)
        newest, damaged = CheckpointFolder(self.store.folder(self.run_id)).newest_whole()
        assert newest is not None
        assert not damaged, damaged
        steps = [e["step"] for e in self.store.read_metrics(self.run_id) if e["event"] == "step"]
        assert steps == list(range(1, len(steps) + 1)), steps
        assert newest.step <= len(steps)


def kill_everywhere(folder: Path, every: int) -> int:
    victim = Victim(folder)
    call = kills = 0
    is_killed = True
    while is_killed:
        call += every
        victim.begin()
        is_killed = die_at(victim.go_on, call)
        victim.look()
        if is_killed:
            kills += 1
            if victim.store.load(victim.run_id).status != "completed":
                victim.go_on()
        assert victim.store.load(victim.run_id).status == "completed"
        victim.look()
        victim.store.remove(victim.run_id)
    return kills


if __name__ == "__main__":
    print(kill_everywhere(Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 1))
