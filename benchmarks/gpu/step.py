"""The speed of a training step: engines alternate on one GPU, so that its drift hits all of them alike.

    uv run python benchmarks/gpu/step.py                                   7B QLoRA, 8 rows of 2,048 tokens: native and trl
    uv run python benchmarks/gpu/step.py --engines native,unsloth --cases 8x1,2x4
    uv run python benchmarks/gpu/step.py --shape llama-3.2-3b --mode full --cases 1x1 --cap-gib 15.2
    uv run python benchmarks/gpu/step.py --profile --syncs                 also where the time goes, and where the host waits
    uv run python benchmarks/gpu/step.py --dry                             a pico model on a CPU

Each engine is a process of its own. All import at once, then they take turns: one trains its warm-up steps and half of
its timed steps while the others wait, then the next, twice around for each case (``ROWSxACCUMULATION``). A step's time is
what passes between two `StepDone` events, without any wait that training itself does not have; a block ends with one.

Prints one JSON object a line: ``step`` for each engine and case, ``profile`` with ``--profile``: the share of time in
which the GPU computes (from a trace of kernels of 3 steps), the number of kernels, and their milliseconds a step by
kind; and ``ratio``, each engine's tokens/s over those of the last one.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kernel_trace import read_trace

os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}

BLOCKS = 2
PROFILED = 3


def main() -> int:
    """Start one process per engine, pass the turn, print what they measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="qwen2.5-7b", help="a name of randommodel.SHAPES")
    parser.add_argument("--mode", choices=["lora", "qlora", "full"], default="qlora")
    parser.add_argument("--engines", default="native,trl", help="joined by commas: native, trl, unsloth")
    parser.add_argument("--cases", default="8x1", help="rows x accumulation, joined by commas: 8x1,2x4")
    parser.add_argument("--seq", type=int, default=2048)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--optim", default="auto")
    parser.add_argument("--kernels", choices=["auto", "none", "liger"], default="auto")
    parser.add_argument("--warmup", type=int, default=2, help="steps before each block's clock starts; 1 in later ones")
    parser.add_argument("--steps", type=int, default=8, help="timed steps of each of the two blocks")
    parser.add_argument("--cap-gib", type=float, default=0.0, help="torch's allocator gets no more; 0: no cap")
    parser.add_argument("--profile", action="store_true", help=f"a trace of {PROFILED} more steps")
    parser.add_argument("--syncs", action="store_true", help="one more step that reports each wait for the GPU")
    parser.add_argument("--tables", type=Path, help="folder for the traces' full tables of kernels and operators")
    parser.add_argument("--model", type=Path, help="keep the model in this folder, and use it where it is there")
    parser.add_argument("--scratch", type=Path)
    parser.add_argument("--dry", action="store_true")
    parser.add_argument("--engine", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.dry:
        options.shape, options.seq, options.rank = "pico", 128, 8
        options.mode = "full" if options.mode == "full" else "lora"
    if options.engine:
        return run_engine(options)
    with tempfile.TemporaryDirectory(dir=options.scratch) as scratch:
        return run_ring(options, Path(scratch))


# The process that passes the turn.


def run_ring(options: argparse.Namespace, folder: Path) -> int:
    """One child per engine; each result line as it comes, then the ratios."""
    engines = options.engines.split(",")
    ring = Ring(folder, engines)
    children = {
        engine: subprocess.Popen([sys.executable, __file__, *sys.argv[1:], "--engine", engine, "--folder", str(folder)])
        for engine in engines
    }
    from randommodel import write_model, write_rows

    base = options.model or folder / "model"
    if not (base / "config.json").is_file():
        write_model(base, options.shape)
    write_rows(folder / "rows.jsonl", base, 96, options.seq)
    (folder / "base").write_text(str(base))
    ring.give(engines[0])
    while any(child.poll() is None for child in children.values()):
        time.sleep(0.2)
        holder = ring.holder()
        if holder and children[holder].poll() is not None and not ring.is_done(holder):
            ring.leave(holder)  # it died holding the turn
    rows = [json.loads(line) for line in ring.results.read_text().splitlines()] if ring.results.is_file() else []
    for case in options.cases.split(","):
        speeds = {r["engine"]: r["tokens_per_second"] for r in rows if r["case"] == case and "tokens_per_second" in r}
        if len(speeds) > 1:
            last = list(speeds.values())[-1]
            print(json.dumps({"ratio": {e: round(s / last, 4) for e, s in speeds.items()}, "case": case}), flush=True)
    failed = any("failed" in row for row in rows) or any(child.returncode for child in children.values())
    return 1 if failed else 0


@dataclass(frozen=True)
class Ring:
    """Whose turn it is, in a file."""

    folder: Path
    engines: Sequence[str]

    @property
    def results(self) -> Path:
        return self.folder / "results.jsonl"

    def holder(self) -> str:
        """The engine that may use the GPU now; empty before the first turn and after the last."""
        file = self.folder / "turn"
        return file.read_text() if file.is_file() else ""

    def wait(self, engine: str) -> None:
        """Until it is this engine's turn."""
        while self.holder() != engine:
            time.sleep(0.01)

    def give(self, engine: str) -> None:
        """Let this engine run."""
        fresh = self.folder / f"turn-{os.getpid()}"
        fresh.write_text(engine)
        fresh.replace(self.folder / "turn")

    def pass_on(self, engine: str) -> None:
        """Let the next one that is not done run, or the same one if it is the last."""
        start = self.engines.index(engine)
        order = [*self.engines[start + 1 :], *self.engines[: start + 1]]
        self.give(next((one for one in order if not self.is_done(one)), ""))

    def leave(self, engine: str) -> None:
        """This engine takes no more turns."""
        (self.folder / f"done-{engine}").touch()
        self.pass_on(engine)

    def is_done(self, engine: str) -> bool:
        return (self.folder / f"done-{engine}").exists()


# One engine's process.


def run_engine(options: argparse.Namespace) -> int:
    """All cases of one engine, each two blocks of steps."""
    engine = options.engine
    ring = Ring(options.folder, options.engines.split(","))
    begun = time.perf_counter()
    import_stack(engine)
    imported = time.perf_counter() - begun
    ring.wait(engine)
    base = Path((options.folder / "base").read_text())
    failed = False

    def tell(row: dict[str, Any]) -> None:
        line = json.dumps(row)
        print(line, flush=True)
        with ring.results.open("a") as file:
            file.write(line + "\n")

    import torch

    from bp_train_cuda import CudaRail

    if options.cap_gib and torch.cuda.is_available():
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(options.cap_gib * 2**30 / total)
    rail = CudaRail()
    with rail.keep_base():
        for number, case in enumerate(options.cases.split(",")):
            if number:
                ring.wait(engine)
            clear_memory()
            timer = Timer(options, ring, case)
            try:
                outcome = rail.train(timer.spec(base), timer, lambda: False)
                tell({**timer.result(), "import_seconds": round(imported, 1), "final_loss": outcome.final_loss})
            except Exception as error:  # noqa: BLE001  # the other engines continue, and this one's next case too
                traceback.print_exc()
                cause = getattr(error, "cause", "")
                tell({"engine": engine, "case": case, "failed": f"{type(error).__name__}: {error}"[:500], "why": cause})
                failed = True
            for row in timer.profiles():
                tell(row)
            ring.pass_on(engine)
    ring.leave(engine)
    return 1 if failed else 0


def import_stack(engine: str) -> None:
    """What a training imports, before the engine's turn."""
    if engine == "unsloth":
        import unsloth  # noqa: F401  # it wants to be the first
    import torch
    import transformers

    transformers.utils.logging.disable_progress_bar()
    import bp_train_cuda.engines.native  # noqa: F401

    if engine == "trl":
        from trl.trainer import sft_trainer  # noqa: F401
    if torch.cuda.is_available():
        import bitsandbytes  # noqa: F401

        with contextlib.suppress(ImportError):
            import liger_kernel.transformers  # noqa: F401


def clear_memory() -> None:
    """What the case before has left behind."""
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


@dataclass
class Timer:
    """Takes a run's events; times its steps, and passes the turn between its blocks."""

    options: argparse.Namespace
    ring: Ring
    case: str
    times: list[list[float]] = field(default_factory=lambda: [[] for _ in range(BLOCKS)])
    walls: list[float] = field(default_factory=list)
    tokens: int = 0
    first_loss: float = 0.0
    notices: list[str] = field(default_factory=list)
    memory: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        batch, accumulation = map(int, self.case.split("x"))
        self.batch, self.accumulation = batch, accumulation
        warmup, steps = self.options.warmup, self.options.steps
        self.starts = [warmup, warmup + steps + 1]  # the later block has one step to get going again
        self.ends = [start + steps for start in self.starts]
        self.profile_at = self.ends[-1] + 1
        self.syncs_at = self.profile_at + (PROFILED + 1 if self.options.profile else 0)
        self.steps = self.syncs_at + (2 if self.options.syncs else 0)
        self._last = self._block_began = time.perf_counter()
        self._before = 0
        self._profiler: Any = None
        self._rows: list[dict[str, Any]] = []
        self._waits: Counter[str] = Counter()
        self._restore: Any = None

    def spec(self, base: Path) -> Any:
        """The run of this case."""
        from bp_runs import Settings, TrainSpec
        from bp_runs.spec import DataSpec, LoraSpec, ModelSpec, RunFolders, TrainingSpec

        options = self.options
        run = options.folder / f"{options.engine}-{self.case}"
        run.mkdir()
        settings = Settings(
            model=ModelSpec(name=str(base), max_seq_length=options.seq),
            data=DataSpec(path=str(options.folder / "rows.jsonl")),
            lora=LoraSpec(r=options.rank),
            training=TrainingSpec(
                mode=options.mode, engine=options.engine, steps=self.steps, batch_size=self.batch,
                gradient_accumulation=self.accumulation, optim=options.optim, kernels=options.kernels, eval_share=0.0,
                save_steps=0, save_minutes=0.0, preflight="off", learning_rate=1e-5 if options.mode == "full" else 2e-4,
            ),
        )  # fmt: skip
        return TrainSpec.build(settings, RunFolders(run_id="bench", output=run, run=run), base)

    def __call__(self, event: Any) -> None:
        """An event of the run."""
        kind = type(event).__name__
        if kind == "Notice":
            self.notices.append(event.message)
        if kind != "StepDone":
            return
        now = time.perf_counter()
        done = event.step
        if done == 1:
            self.first_loss = event.loss
        for block in range(BLOCKS):
            if self.starts[block] < done <= self.ends[block]:
                self.times[block].append(now - self._last)
                self.tokens += event.tokens - self._before
        if done in self.starts:
            now = wait_for_gpu()
            self._block_began = now
        if done in self.ends:
            self.walls.append(wait_for_gpu() - self._block_began)
            self._note_memory()
            if done != self.ends[-1]:
                self.ring.pass_on(self.options.engine)
                self.ring.wait(self.options.engine)
            now = wait_for_gpu()
        if done == self.profile_at and self.options.profile:
            wait_for_gpu()
            self._profiler = start_profiler()
        if done == self.profile_at + PROFILED and self._profiler is not None:
            self._end_profile()
        if done == self.syncs_at and self.options.syncs:
            self._restore = watch_syncs(self._waits)
        if done == self.syncs_at + 1 and self._restore is not None:
            self._restore()
            self._restore = None
        self._before = event.tokens
        self._last = time.perf_counter() if done in self.ends else now

    def _note_memory(self) -> None:
        import torch

        if torch.cuda.is_available():
            read = {"allocated": torch.cuda.max_memory_allocated(), "reserved": torch.cuda.max_memory_reserved()}
            self.memory = {f"peak_{name}_gib": round(value / 2**30, 3) for name, value in read.items()}

    def _end_profile(self) -> None:
        wait_for_gpu()
        self._profiler.stop()
        file = self.options.folder / f"trace-{self.options.engine}-{self.case}.json"
        self._profiler.export_chrome_trace(str(file))
        self._profiler = None
        found = read_trace(file, PROFILED)
        if self.options.tables:
            self.options.tables.mkdir(parents=True, exist_ok=True)
            table = self.options.tables / f"{self.options.engine}-{self.case}.json"
            table.write_text(json.dumps(found.pop("tables", {}), indent=0))
        found.pop("tables", None)
        self._rows.append({"profile": found})

    def result(self) -> dict[str, Any]:
        """Medians and spreads."""
        times = [one for block in self.times for one in block]
        per_step = self.tokens / len(times)
        median = statistics.median(times)
        self.median = median
        return {
            "engine": self.options.engine,
            "case": self.case,
            "shape": self.options.shape,
            "mode": self.options.mode,
            "tokens_per_step": round(per_step),
            "tokens_per_second": round(per_step / median, 1),
            "seconds": {"median": round(median, 4), "min": round(min(times), 4), "max": round(max(times), 4)},
            "block_medians": [round(per_step / statistics.median(block), 1) for block in self.times],
            "block_tokens_per_second": [round(per_step * self.options.steps / wall, 1) for wall in self.walls],
            "steps": len(times),
            **self.memory,
            "first_loss": self.first_loss,
            "notices": self.notices,
        }

    def profiles(self) -> list[dict[str, Any]]:
        """Rows of the trace and of waits."""
        rows: list[dict[str, Any]] = []
        for row in self._rows:
            found = {"engine": self.options.engine, "case": self.case, **row}
            if "profile" in row and (busy := row["profile"].get("busy_ms_per_step")) and hasattr(self, "median"):
                found["busy_share_of_untraced_step"] = round(busy / 1e3 / self.median, 4)
            rows.append(found)
        if self.options.syncs:
            waits = [{"times": n, "where": where} for where, n in self._waits.most_common()]
            rows.append({"engine": self.options.engine, "case": self.case, "waits_of_one_step": waits})
        return rows


def wait_for_gpu() -> float:
    """The time once the GPU has done all its work."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def start_profiler() -> Any:
    """A trace of the GPU's kernels alone, which slows the host least; of operators on a CPU."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    kinds = [ProfilerActivity.CUDA] if torch.cuda.is_available() else [ProfilerActivity.CPU]
    profiler = profile(activities=kinds)
    profiler.start()
    return profiler


def watch_syncs(found: Counter[str]) -> Any:
    """Count, by place in our sources and in the library, where the host waits for the GPU; returns how to end it."""
    import torch

    if not torch.cuda.is_available():
        return lambda: None
    before = warnings.showwarning, warnings.filters[:]

    def show(message: Any, *_: Any, **__: Any) -> None:
        if "called a synchronizing" not in str(message):
            return
        frames = [f for f in traceback.extract_stack()[:-1] if "warnings.py" not in f.filename]
        places = [f"{short_name(f.filename)}:{f.lineno} {f.name}" for f in frames]
        ours = [place for place in places if place.startswith("bp_")]
        found[" < ".join([places[-1], *reversed(ours[-3:])])] += 1

    warnings.simplefilter("always")
    warnings.showwarning = show
    torch.cuda.set_sync_debug_mode("warn")

    def restore() -> None:
        torch.cuda.set_sync_debug_mode("default")
        warnings.showwarning = before[0]
        warnings.filters[:] = before[1]

    return restore


def short_name(file: str) -> str:
    """``torch/nn/utils/clip_grad.py``, from wherever it is installed."""
    return re.split(r"site-packages/|/src/|dist-packages/", file)[-1]


if __name__ == "__main__":
    sys.exit(main())
