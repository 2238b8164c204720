"""Does a run that is killed on a GPU and continues end with the bytes of one that was never cut off?

    uv run python benchmarks/gpu/resume.py                            three cases of the shape of Qwen2.5-0.5B
    uv run python benchmarks/gpu/resume.py --shape llama-3.2-1b --cases full
    uv run python benchmarks/gpu/resume.py --dry                      a pico model on a CPU

Each case trains 8 steps with dropout in deterministic mode: twice in one process without a break (does the GPU itself
give the same bits twice), then in a process that is killed after its sixth step with a checkpoint of the fourth, and in
another one that continues from there. One JSON line a case: whether weights, losses and random states are equal, else how
far apart, and where the optimizer's moments lie. All processes start at once, since importing takes longest.
"""

from __future__ import annotations

import argparse
import gc
import hashlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "CUBLAS_WORKSPACE_CONFIG": ":4096:8"}

import torch
import transformers
from randommodel import SHAPES, write_model, write_rows
from safetensors.torch import load_file

from bp_runs import Settings, TrainSpec
from bp_runs.checkpoint_store import CheckpointFolder
from bp_runs.events import Event, StepDone
from bp_runs.spec import DataSpec, LoraSpec, ModelSpec, TrainingSpec
from bp_runs.store import RunStore
from bp_train_cuda import CudaRail

CASES = {"lora": "adamw_torch", "qlora": "adamw_8bit", "full": "paged_adamw_8bit"}
STEPS, SAVED, KILLED = 8, 4, 6


class Scene:
    """A scratch folder with a model, rows, and a run store for each case and each way through it."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.folder = options.folder
        self.options = options
        self.base = self.folder / "model"
        self.rows = self.folder / "rows.jsonl"

    def prepare(self) -> None:
        """Write model and rows, and leave word for the processes that wait for them."""
        transformers.utils.logging.disable_progress_bar()
        write_model(self.base, self.options.shape)
        write_rows(self.rows, self.base, 24, self.options.seq)
        (self.folder / "ready").touch()

    def settings(self, case: str) -> Settings:
        mode = "lora" if case == "qlora" and not torch.cuda.is_available() else case  # no 4-bit training on a CPU
        return Settings(
            model=ModelSpec(name=str(self.base), max_seq_length=self.options.seq),
            data=DataSpec(path=str(self.rows)),
            lora=LoraSpec(r=16, dropout=0.1),
            training=TrainingSpec(
                mode=mode, optim=CASES[case], steps=STEPS, save_steps=SAVED, batch_size=2, gradient_accumulation=2,
                learning_rate=1e-5 if case == "full" else 2e-4, warmup_steps=1, eval_share=0.0, preflight="off",
                deterministic=True, gpu_max_temp=0,
            ),
        )  # fmt: skip

    def train(self, case: str, way: str, run_id: str = "") -> None:
        """Begin a run, or continue with the one that was killed; leave next to it what cannot be read from it later."""
        store = RunStore(self.folder / case / way)
        checkpoint = CheckpointFolder(store.folder(run_id)).newest_whole()[0] if run_id else None
        writer = (
            store.reopen(run_id, from_step=checkpoint.step, checkpoint=checkpoint.path.name)
            if checkpoint
            else store.start(settings={}, rail="cuda")
        )
        losses: dict[int, float] = {}
        moments: dict[str, int] = {}

        def take(event: Event) -> None:
            run.emit(event)
            if not isinstance(event, StepDone):
                return
            losses[event.step] = event.loss
            if event.step == STEPS:
                moments.update(count_moments())
            if way == "killed" and event.step == KILLED and not run_id:
                os.kill(os.getpid(), signal.SIGKILL)

        with writer as run:
            spec = TrainSpec.build(
                self.settings(case), run.folders, self.base, checkpoint=checkpoint.path if checkpoint else None
            )
            outcome = CudaRail().train(spec, take, lambda: False)
            run.finish(outcome)
        on_gpu = torch.cuda.is_available()
        left = {
            "weights": str(next(outcome.adapter.glob("*model*.safetensors"))),
            "losses": losses,
            "moments": moments,
            "random": digest(torch.get_rng_state()),
            "cuda_random": digest(torch.cuda.get_rng_state()) if on_gpu else None,
            "peak_gib": round(outcome.peak_memory / 2**30, 3),
        }
        (self.folder / f"{case}-{way}.json").write_text(json.dumps(left))


def count_moments() -> dict[str, int]:
    """Tensors of the living optimizers' moments, by where they lie."""
    found: Counter[str] = Counter()
    for optimizer in (o for o in gc.get_objects() if isinstance(o, torch.optim.Optimizer)):
        for state in optimizer.state.values():
            for name, value in state.items():
                if torch.is_tensor(value) and name in ("state1", "state2", "exp_avg", "exp_avg_sq"):
                    found["paged" if getattr(value, "is_paged", False) else value.device.type] += 1
    return dict(found)


def digest(state: torch.Tensor) -> str:
    """A random state in short."""
    return hashlib.sha256(state.numpy().tobytes()).hexdigest()[:16]


def wait_for(file: Path, seconds: float = 240.0) -> None:
    """Until ``file`` is there."""
    end = time.monotonic() + seconds
    while not file.exists():
        if time.monotonic() > end:
            raise SystemExit(f"{file} did not come")
        time.sleep(0.05)


def run_stage(scene: Scene, stage: str) -> None:
    """The part of one child process."""
    wait_for(scene.folder / "ready")
    cases = scene.options.cases.split(",")
    if stage == "straight":
        for case in cases:
            scene.train(case, "straight")
            scene.train(case, "again")
    elif stage == "resumed":
        for case in cases:
            wait_for(scene.folder / f"{case}-is-killed")
            [row] = RunStore(scene.folder / case / "killed").list_runs()
            scene.train(case, "killed", row["run_id"])
    else:
        scene.train(stage, "killed")


def compare(folder: Path, case: str) -> dict[str, Any]:
    """What the three ways through a case have left."""
    told = {way: json.loads((folder / f"{case}-{way}.json").read_text()) for way in ("straight", "again", "killed")}
    straight, again, resumed = told["straight"], told["again"], told["killed"]
    after = {step: loss for step, loss in straight["losses"].items() if int(step) > SAVED}
    return {
        "case": case,
        "optimizer": CASES[case],
        "resumed_equals_straight": difference(straight, resumed) == 0.0 and resumed["losses"] == after,
        "straight_equals_itself": difference(straight, again) == 0.0 and straight["losses"] == again["losses"],
        "greatest_difference": difference(straight, resumed),
        "greatest_difference_of_itself": difference(straight, again),
        "losses_equal": resumed["losses"] == after,
        "greatest_loss_difference": max(abs(after[step] - resumed["losses"].get(step, 1e9)) for step in after),
        "cuda_random_equal": straight["cuda_random"] == resumed["cuda_random"],
        "random_equal": straight["random"] == resumed["random"],
        "moments": {way: told[way]["moments"] for way in ("straight", "killed")},
        "peak_gib": {way: told[way]["peak_gib"] for way in ("straight", "killed")},
        "losses": list(straight["losses"].values()),
    }


def difference(one: dict[str, Any], other: dict[str, Any]) -> float:
    """Greatest absolute difference of two runs' weights; 0.0: the same bytes."""
    first, second = load_file(one["weights"]), load_file(other["weights"])
    if first.keys() != second.keys():
        return float("inf")
    return max(float((first[name].float() - second[name].float()).abs().max()) for name in first)


def main() -> int:
    """Start all processes, wait, compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="qwen2.5-0.5b")
    parser.add_argument("--cases", default=",".join(CASES))
    parser.add_argument("--seq", type=int, default=512)
    parser.add_argument("--dry", action="store_true", help="a pico model: does the script work")
    parser.add_argument("--stage", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.dry:
        options.shape, options.seq = "pico", 128
    if options.stage:
        run_stage(Scene(options), options.stage)
        return 0
    with tempfile.TemporaryDirectory() as scratch:
        options.folder = Path(scratch)
        rows = list(carry_out(options))
    print(json.dumps({"equal": all(row.get("resumed_equals_straight") for row in rows), "cases": len(rows)}))
    return 0 if all(row.get("resumed_equals_straight") for row in rows) else 1


def carry_out(options: argparse.Namespace) -> Any:
    """One line a case."""
    began = time.perf_counter()
    scene, cases = Scene(options), options.cases.split(",")
    call = [
        sys.executable,
        __file__,
        "--shape",
        options.shape,
        "--seq",
        str(options.seq),
        "--folder",
        str(scene.folder),
    ]
    children = {
        stage: subprocess.Popen([*call, "--cases", options.cases, "--stage", stage])
        for stage in ("straight", "resumed", *cases)
    }
    scene.prepare()
    for case in cases:
        status = children[case].wait()
        if status == -signal.SIGKILL:
            (scene.folder / f"{case}-is-killed").touch()
        else:
            children["resumed"].kill()
            print(json.dumps({"case": case, "failed": f"ended with {status} before it was to be killed"}), flush=True)
    status = {name: children[name].wait() for name in ("straight", "resumed")}
    card = torch.cuda.get_device_name(0) if torch.cuda.is_available() else "none"
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    seconds = round(time.perf_counter() - began, 1)
    print(json.dumps({"card": card, "shape": options.shape, **versions, "ended": status, "seconds": seconds}))
    for case in cases:
        try:
            row = compare(scene.folder, case)
        except FileNotFoundError as error:
            row = {"case": case, "failed": str(error)}
        print(json.dumps(row), flush=True)
        yield row


if __name__ == "__main__":
    sys.exit(main())
