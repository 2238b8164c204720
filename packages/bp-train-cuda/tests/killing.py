"""Kill a real training at random moments, and go on. No part of a test: run as a script.

    python killing.py BASE DATA FOLDER KILLS [SEED] [cuda|mlx]

One process imports the framework once and forks a child for each life of a run; a child trains the model in BASE on DATA for
real and is killed with SIGKILL: at a random moment of its life, or within a save. After each
kill the store must open, the newest checkpoint be whole and no older than before, and the run go on; a run that comes
to its end must have the bytes of one that was never killed. Prints what happened as its last line, as JSON; any fault
ends it with a traceback.
"""

import json
import os
import random
import signal
import sys
import time
import traceback
from collections import Counter
from pathlib import Path

os.environ |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}

from bp_runs import Settings, TrainSpec
from bp_runs.checkpoint_store import CheckpointFolder
from bp_runs.spec import DataSpec, LoraSpec, ModelSpec, TrainingSpec
from bp_runs.store import RunStore

if "mlx" in sys.argv[6:]:
    import bp_train_mlx.train  # the children find it imported
    from bp_train_mlx import MlxRail as Rail

    assert bp_train_mlx.train
else:
    import torch

    import bp_train_cuda.engines.native
    from bp_train_cuda import CudaRail as Rail

    assert bp_train_cuda.engines.native
    torch.set_num_threads(1)

SHARE_AT_RANDOM = 0.4
"""Of the kills; the others strike within a save, or just after one."""
MOST_KILLS = 4  # of one run; then it is let go to its end


class Campaign:
    def __init__(self, base: Path, data: Path, folder: Path, seed: int) -> None:
        self.random = random.Random(seed)
        self.base = base
        self.store = RunStore(folder / "out")
        training = TrainingSpec(
            steps=6, save_steps=1, batch_size=2, gradient_accumulation=2, learning_rate=1e-2, warmup_steps=1,
            eval_share=0.25, eval_min_rows=2, eval_steps=2, early_stop=0,
        )  # fmt: skip
        self.settings = Settings(
            model=ModelSpec(name=str(base), max_seq_length=64),
            data=DataSpec(path=str(data)),
            lora=LoraSpec(r=4, dropout=0.2),
            training=training,
        )
        self.seen = Counter()
        self.run_id = ""
        self.newest = 0

    def live(self) -> None:
        """One life of a run, from its newest checkpoint to its end; in a child."""
        store = self.store
        if self.run_id:
            checkpoint, _ = CheckpointFolder(store.folder(self.run_id)).newest_whole()
            step, name = (checkpoint.step, checkpoint.path.name) if checkpoint else (0, None)
            writer = store.reopen(self.run_id, from_step=step, checkpoint=name)
        else:
            checkpoint = None
            writer = store.start(settings={}, rail=Rail.name)
        with writer as run:
            path = checkpoint.path if checkpoint else None
            spec = TrainSpec.build(self.settings, run.folders, self.base, checkpoint=path)
            outcome = Rail().train(spec, run.emit, lambda: False)
            store.publish_adapter(run.run_id)
            run.finish(outcome)

    def fork(self) -> int:
        pid = os.fork()
        if pid:
            return pid
        status = 1
        try:
            self.live()
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)

    def let_live(self) -> float:
        """A life that nobody ends; returns its seconds."""
        began = time.perf_counter()
        _, status = os.waitpid(self.fork(), 0)
        assert os.waitstatus_to_exitcode(status) == 0, "a life failed by itself"
        return time.perf_counter() - began

    def kill(self, seconds: float) -> bool:
        """A life that is ended; False where it was over before."""
        pid = self.fork()
        if self.random.random() < SHARE_AT_RANDOM:
            time.sleep(self.random.uniform(0, seconds))
        else:
            self.wait_for_save(pid, self.random.randrange(1, 4))
            time.sleep(self.random.uniform(0, 0.01))
        is_saving = bool(self.partials())
        os.kill(pid, signal.SIGKILL)
        _, status = os.waitpid(pid, 0)
        if os.waitstatus_to_exitcode(status) == 0:
            return False
        assert os.waitstatus_to_exitcode(status) == -signal.SIGKILL, "a life failed by itself"
        self.seen["while saving"] += is_saving
        return True

    def partials(self) -> list[Path]:
        return list(self.store.output.glob("runs/*/checkpoints/.*.partial"))

    def wait_for_save(self, pid: int, saves: int) -> None:
        """Until so many saves have begun, or the life is over."""
        known: set[Path] = set()
        while len(known) < saves and os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
            known |= set(self.partials())
            time.sleep(0.0005)

    def look(self) -> str:
        """What must hold after a kill; returns the run's status."""
        rows = self.store.list_runs()
        if not self.run_id:
            new = [row["run_id"] for row in rows if row["status"] != "completed"]
            self.run_id = new[0] if new else ""
        if not self.run_id:
            self.seen["before the run was there"] += 1
            return "absent"
        record = self.store.load(self.run_id)
        newest, damaged = CheckpointFolder(self.store.folder(self.run_id)).newest_whole()
        assert not damaged, damaged
        step = newest.step if newest else 0
        assert step >= self.newest, f"the checkpoint of step {self.newest} is lost: {step}"
        self.newest = step
        steps = [e["step"] for e in self.store.read_metrics(self.run_id) if e["event"] == "step"]
        assert steps == list(range(1, len(steps) + 1)), steps
        assert step <= len(steps)
        assert record.status in ("interrupted", "completed"), record.status
        self.seen["before the first checkpoint" if not step else "after one"] += 1
        return record.status

    def go(self, kills: int) -> Counter:
        self.let_live()
        straight = self.weights(self.store.list_runs()[0]["run_id"])
        seconds = self.let_live()
        for row in self.store.list_runs():
            assert self.weights(row["run_id"]) == straight, "the same run twice is not the same"
        while self.seen["kills"] < kills:
            self.run_id, self.newest = "", 0
            for _ in range(MOST_KILLS):
                if self.seen["kills"] == kills or not self.kill(seconds):
                    break
                self.seen["kills"] += 1
                if self.look() == "completed":
                    break
            if not self.run_id:
                continue
            if self.store.load(self.run_id).status != "completed":
                self.let_live()
            assert self.store.load(self.run_id).status == "completed"
            assert self.weights(self.run_id) == straight, "a run that was killed has other weights"
            self.seen["runs to their end, same bytes"] += 1
        return self.seen

    def weights(self, run_id: str) -> bytes:
        return (self.store.folder(run_id) / "lora" / "adapter_model.safetensors").read_bytes()


if __name__ == "__main__":
    base, data, folder = (Path(argument) for argument in sys.argv[1:4])
    print(json.dumps(Campaign(base, data, folder, int((sys.argv[5:] or ["0"])[0])).go(int(sys.argv[4]))))
