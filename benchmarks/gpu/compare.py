"""Backpropagate next to TRL, TRL with Liger, and Unsloth: one GPU, all alive at once, taking turns.

    uv run python benchmarks/gpu/compare.py                               every cell, every stack
    uv run python benchmarks/gpu/compare.py --cells 7b-2x4,7b-8x1 --stacks ours,unsloth
    uv run python benchmarks/gpu/compare.py --cells 7b-2x4 --profile      also a trace of each stack's kernels
    uv run python benchmarks/gpu/compare.py --dry                         the same course on a CPU with pico models

Each stack is a process of its own. All import in parallel; then a token goes around: each runs a block of steps of a
cell while the others wait, twice, so that the host's drift hits all alike. A cell's number is the median step. First
losses must agree within 2 %. ``--cap-gib`` lets torch have no more, and shows stacks that plan a GPU of that size.

Weights and words are random, so losses say nothing of quality. Needs trl, unsloth and liger-kernel; none is a dependency
of this project but trl and liger-kernel. Prints a JSON object a line, then a table with ratios to the last stack.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from kernel_trace import read_trace
from step import Ring, start_profiler, wait_for_gpu

os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "WANDB_DISABLED": "true"}
GIB = 2**30
BLOCKS = 2
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
OPTIMIZERS = {"qlora": "adamw_8bit", "lora": "adamw_torch_fused", "full": "paged_adamw_8bit"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """One row of the table."""

    name: str
    shape: str = "qwen2.5-7b"
    mode: str = "qlora"
    r: int = 16
    batch: int = 2
    accumulation: int = 4
    seq: int = 2048
    short: bool = False
    """Chats of 40 to 1,900 tokens, 301 on average; peers pack them, ours runs with default flags."""
    cap: float = 15.2
    """GiB that torch may have, of ours; the others get at least 15.2."""
    steps: int = 4
    """Timed, of each block."""
    warmup: int = 2
    stacks: str = ""
    """Only these; empty: all."""


CELLS = {
    cell.name: cell
    for cell in (
        Cell(name="7b-2x4"),
        Cell(name="7b-8x1", batch=8, accumulation=1, cap=8.2),
        Cell(name="7b-8x1-free", batch=8, accumulation=1, cap=15.2),
        Cell(name="7b-r256", r=256, cap=10.6),
        Cell(name="7b-short", short=True, steps=6),
        Cell(name="7b-1x8192", batch=1, accumulation=1, seq=8192, stacks="ours,unsloth"),
        Cell(name="7b-49152", batch=1, accumulation=1, seq=49152, steps=1, warmup=1, stacks="ours"),
        Cell(name="7b-65536", batch=1, accumulation=1, seq=65536, steps=1, warmup=1, stacks="ours"),
        Cell(name="3b-lora", shape="llama-3.2-3b", mode="lora"),
        Cell(name="3b-lora-tight", shape="llama-3.2-3b", mode="lora", cap=7.4),
        Cell(name="3b-full-1x1", shape="llama-3.2-3b", mode="full", batch=1, accumulation=1, steps=6, cap=14.0),
        Cell(name="3b-full-2x4", shape="llama-3.2-3b", mode="full", cap=14.9),
    )
}


def main() -> int:
    """Start one process per stack, pass the turn, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cells", default=",".join(CELLS))
    parser.add_argument("--stacks", default="ours,liger,unsloth", help="of ours, trl, liger, unsloth; the last is 1.0")
    parser.add_argument("--cap-gib", type=float, help="for every cell, instead of its own")
    parser.add_argument("--models", type=Path, help="keep models here, and use those that are there")
    parser.add_argument("--profile", action="store_true", help="one more step of each stack and cell, traced")
    parser.add_argument("--seconds", type=float, default=3600, help="stop after so long")
    parser.add_argument("--tables", type=Path, help="folder for results, and the traces' full tables")
    parser.add_argument("--dry", action="store_true")
    parser.add_argument("--stack", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.stack:
        return Worker(options).run()
    with tempfile.TemporaryDirectory() as folder:
        return run_ring(options, Path(folder))


def choose_cells(options: argparse.Namespace) -> list[Cell]:
    """In the given order; those of one model next to each other load it once."""
    cells = [CELLS[name] for name in options.cells.split(",")]
    if options.cap_gib is not None:
        cells = [replace(cell, cap=options.cap_gib) for cell in cells]
    if options.dry:
        cells = [
            replace(cell, shape="pico", mode="full" if cell.mode == "full" else "lora", r=8, seq=128, steps=1, warmup=1)
            for cell in cells
        ]
    return cells


# The process that passes the turn.


def run_ring(options: argparse.Namespace, folder: Path) -> int:
    """Write models and rows while the stacks import; then let them take turns."""
    began = time.perf_counter()
    stacks, cells = options.stacks.split(","), choose_cells(options)
    ring = Ring(folder, stacks)
    logs = [(folder / f"{stack}.log").open("w") for stack in stacks]
    children = {
        stack: subprocess.Popen(
            [sys.executable, __file__, *sys.argv[1:], "--stack", stack, "--folder", str(folder)],
            stdout=log, stderr=subprocess.STDOUT,
        )
        for stack, log in zip(stacks, logs, strict=True)
    }  # fmt: skip
    models = options.models or folder
    for shape in dict.fromkeys(cell.shape for cell in cells):
        write_inputs(models / shape, shape, [cell for cell in cells if cell.shape == shape])
        say(f"{shape} written", began)
    (folder / "models").write_text(str(models))
    while not all((folder / f"ready-{s}").exists() or children[s].poll() is not None for s in stacks):
        time.sleep(0.1)
    say("all imported", began)
    ring.give(stacks[0])
    shown = 0
    while any(child.poll() is None for child in children.values()):
        time.sleep(0.2)
        shown = show_rows(ring, shown)
        holder = ring.holder()
        if holder and children[holder].poll() is not None and not ring.is_done(holder):
            ring.leave(holder)  # it died holding the turn
        if time.perf_counter() - began > options.seconds:
            for child in children.values():
                child.kill()
            say("out of time", began)
            break
    show_rows(ring, shown)
    rows = [json.loads(line) for line in ring.results.read_text().splitlines()] if ring.results.is_file() else []
    for stack in stacks:
        if children[stack].returncode:
            print(f"--- {stack}\n{(folder / f'{stack}.log').read_text()[-1500:]}", flush=True)
    if options.tables:
        options.tables.mkdir(parents=True, exist_ok=True)
        (options.tables / "results.json").write_text(json.dumps(rows, indent=1))
    return report(rows, stacks)


def show_rows(ring: Ring, shown: int) -> int:
    """Print the results that have come since; returns how many there are."""
    lines = ring.results.read_text().splitlines() if ring.results.is_file() else []
    for line in lines[shown:]:
        print(line[:1200], flush=True)
    return len(lines)


def say(what: str, began: float) -> None:
    print(f"[{time.perf_counter() - began:6.1f} s] {what}", flush=True)


def write_inputs(base: Path, shape: str, cells: list[Cell]) -> None:
    """A model, and of each length of the cells chats for ours and token ids for the peers."""
    from randommodel import write_model

    from bp_data import PrepareRequest, prepare

    if not (base / "config.json").is_file():
        write_model(base, shape)
    for cell in cells:
        chats = base / rows_name(cell)
        if chats.is_file():
            continue
        write_chats(chats, base, cell)
        rows = prepare(PrepareRequest(chats, base, cell.seq)).rows
        chats.with_suffix(".json").write_text(json.dumps([[int(i) for i in row.ids] for row in rows]))


def rows_name(cell: Cell) -> str:
    return "short.jsonl" if cell.short else f"full{cell.seq}.jsonl"


def write_chats(file: Path, base: Path, cell: Cell) -> None:
    """Rows of exactly ``cell.seq`` tokens, or of many lengths."""
    from tokenizers import Tokenizer

    from bp_data import PrepareRequest, prepare

    core, draw = Tokenizer.from_file(str(base / "tokenizer.json")), random.Random(0)
    words = ["river", "stone", "lamp", "bread", "window", "cloud", "paper", "garden", "winter", "copper"]
    cost = {word: len(core.encode(" " + word).ids) for word in words}
    ones = [word for word, tokens in cost.items() if tokens == 1]

    def text(tokens: int) -> str:
        return " ".join(draw.choice(ones) for _ in range(tokens))

    def dump(where: Path, lengths: list[int]) -> None:
        turns = [[{"role": "user", "content": "Go on."}, {"role": "assistant", "content": text(n)}] for n in lengths]
        where.write_text("\n".join(json.dumps({"messages": one}) for one in turns))

    dump(file, [40] * 4)
    over = max(len(row.ids) for row in prepare(PrepareRequest(file, base, 2048)).rows) - 40
    if cell.short:
        lengths = [min(1900, max(40, int(draw.lognormvariate(5.45, 0.75)))) for _ in range(600)]
    else:
        lengths = [cell.seq] * (180 if cell.seq <= 2048 else 4)
    dump(file, [length - over for length in lengths])


def report(rows: list[dict[str, Any]], stacks: list[str]) -> int:
    """Print every row, a table, and whether losses agree."""
    done = [row for row in rows if "tokens_per_second" in row]
    status = 0
    print("\n| cell | " + " | ".join(f"{s}: tok/s (ratio), GiB" for s in stacks) + " |", flush=True)
    for cell in dict.fromkeys(row["cell"] for row in rows):
        found = {row["stack"]: row for row in done if row["cell"] == cell}
        last = found.get(stacks[-1], {}).get("tokens_per_second")
        texts = []
        for stack in stacks:
            row = found.get(stack)
            ratio = f" ({row['tokens_per_second'] / last:.2f})" if row and last else ""
            texts.append(
                f"{row['tokens_per_second']:,.0f}{ratio}, {row['allocated']}/{row['reserved']}" if row else "–"
            )
        print(f"| {cell} | " + " | ".join(texts) + " |", flush=True)
        losses = [row["first_loss"] for row in found.values() if not row["short"]]
        if losses and max(losses) > 1.02 * min(losses):
            print(f"losses of {cell} disagree: {losses}", flush=True)
            status = 1
    return status if not any("failed" in row for row in rows) else 1


# One stack's process.


@dataclass
class Clock:
    """Times the steps of a cell, and passes the turn between its blocks."""

    cell: Cell
    worker: Worker
    steps: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    profile: dict[str, Any] = field(default_factory=dict)
    memory: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        cell = self.cell
        self.first = cell.warmup
        self.second = cell.warmup + cell.steps + 1  # a later block has one step to get going again
        self.total = self.second + cell.steps + (1 if self.worker.options.profile else 0)
        self.count, self._profiler, self.begun = 0, None, time.perf_counter()
        self.first_step = 0.0
        self._last = self.begun

    def begin(self) -> None:
        """The first step starts now."""
        self.begun = self._last = wait_for_gpu()

    def end_step(self) -> None:
        """A step is done."""
        now = wait_for_gpu()
        self.count += 1
        if self.count == 1:
            self.first_step = now - self.begun
        if self._profiler is not None:
            self._end_profile(now - self._last)
            return
        self.steps.append(now - self._last)
        self.memory = read_memory()
        if self.count == self.second - 1:
            self.worker.yield_turn()
        if self.worker.options.profile and self.count == self.total - 1:
            self._profiler = start_profiler()
        self._last = wait_for_gpu()

    def _end_profile(self, seconds: float) -> None:
        self._profiler.stop()
        file = self.worker.options.folder / f"trace-{self.worker.stack}-{self.cell.name}.json"
        self._profiler.export_chrome_trace(str(file))
        self._profiler = None
        self.profile = {"seconds": round(seconds, 4), **read_trace(file, 1)}
        tables = self.profile.pop("tables", None)
        if self.worker.options.tables and tables:
            self.worker.options.tables.mkdir(parents=True, exist_ok=True)
            (self.worker.options.tables / f"{file.stem}.json").write_text(json.dumps(tables))

    def result(self) -> dict[str, Any]:
        """Medians; of rows of many lengths the tokens over the time."""
        places = [*range(self.first, self.first + self.cell.steps), *range(self.second, self.second + self.cell.steps)]
        times = [self.steps[place] for place in places if place < len(self.steps)]
        tokens = [self.tokens[place] for place in places if place < len(self.tokens)]
        full = self.cell.batch * self.cell.accumulation * self.cell.seq
        speed = sum(tokens) / sum(times) if self.cell.short else full / statistics.median(times)
        return {
            "tokens_per_second": round(speed, 1), "median": round(statistics.median(times), 4),
            "least": round(min(times), 4), "most": round(max(times), 4), "count": len(times),
            "first_step": round(self.first_step, 2), "first_loss": round(self.losses[0], 4),
            "last_loss": round(self.losses[-1], 4), **self.memory, "notes": self.notes[:6],
            **({"profile": self.profile} if self.profile else {}),
        }  # fmt: skip


def read_memory() -> dict[str, float]:
    """Peaks in GiB."""
    import torch

    if not torch.cuda.is_available():
        return {"allocated": 0.0, "reserved": 0.0}
    read = {"allocated": torch.cuda.max_memory_allocated(), "reserved": torch.cuda.max_memory_reserved()}
    return {name: round(value / GIB, 3) for name, value in read.items()}


class Worker:
    """One stack: imports, then its cells, turn by turn."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.stack = options, options.stack
        self.ring = Ring(options.folder, options.stacks.split(","))
        self._base: Any = None
        self._loaded: tuple[str, str] | None = None

    def run(self) -> int:
        """All cells; 1 if one failed."""
        import_stack(self.stack)
        import torch

        self.on_gpu = torch.cuda.is_available()
        if self.on_gpu:
            self._real_info = torch.cuda.mem_get_info
            torch.cuda.mem_get_info = torch.cuda.memory.mem_get_info = self._read_memory
        self._limit = 0
        (self.options.folder / f"ready-{self.stack}").touch()
        self.ring.wait(self.stack)
        self.models, failed = Path((self.options.folder / "models").read_text()), False
        for number, cell in enumerate(choose_cells(self.options)):
            if number:
                self.ring.wait(self.stack)
            if not cell.stacks or self.stack in cell.stacks.split(","):
                failed |= not self._run_cell(cell)
            self.ring.pass_on(self.stack)
        self.ring.leave(self.stack)
        sys.stdout.flush()
        os._exit(1 if failed else 0)  # Unsloth's threads would keep it alive

    def _read_memory(self, device: Any = None) -> tuple[int, int]:
        """Free and total bytes of a GPU as large as the cap."""
        import torch

        free, total = self._real_info(device)
        if not self._limit:
            return free, total
        return max(0, self._limit - torch.cuda.memory_reserved()), self._limit

    def yield_turn(self) -> None:
        """Let the others run a block."""
        self.ring.pass_on(self.stack)
        self.ring.wait(self.stack)

    def _run_cell(self, cell: Cell) -> bool:
        import torch

        gc.collect()
        if self.on_gpu:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            self._limit = int((cell.cap if self.stack == "ours" else max(cell.cap, 15.2)) * GIB)
            torch.cuda.set_per_process_memory_fraction(self._limit / self._real_info()[1])
        row: dict[str, Any] = {"cell": cell.name, "stack": self.stack, "short": cell.short}
        try:
            clock = Clock(cell, self)
            self._train_ours(cell, clock) if self.stack == "ours" else self._train_peer(cell, clock)
            row |= clock.result()
        except BaseException as error:  # noqa: BLE001  # the other stacks continue, and this one's next cell too
            traceback.print_exc()
            cause = getattr(error, "cause", "")
            row |= {"failed": f"{type(error).__name__}: {error}"[:400], "why": str(cause)[:300], **read_memory()}
        line = json.dumps(row)
        with self.ring.results.open("a") as file:
            file.write(line + "\n")
        print(line, flush=True)
        return "failed" not in row

    def _train_ours(self, cell: Cell, clock: Clock) -> None:
        from bp_runs import Settings, TrainSpec
        from bp_runs.spec import DataSpec, LoraSpec, ModelSpec, RunFolders, TrainingSpec
        from bp_train_cuda import CudaRail
        from bp_train_cuda.model.load import BaseCache

        base, run = self.models / cell.shape, self.options.folder / f"ours-{cell.name}"
        run.mkdir()
        training = TrainingSpec(
            mode=cell.mode, steps=clock.total, batch_size=cell.batch, gradient_accumulation=cell.accumulation,
            eval_share=0.0, save_steps=0, save_minutes=0.0, preflight="off", scheduler="constant", warmup_steps=5,
            learning_rate=2e-5 if cell.mode == "full" else 2e-4,
        )  # fmt: skip
        settings = Settings(
            model=ModelSpec(name=str(base), max_seq_length=cell.seq),
            data=DataSpec(path=str(base / rows_name(cell))),
            lora=LoraSpec(r=cell.r),
            training=training,
        )
        before = 0

        def hear(event: Any) -> None:
            nonlocal before
            kind = type(event).__name__
            if kind == "StepDone":
                clock.tokens.append(event.tokens - before)
                before = event.tokens
                clock.losses.append(event.loss)
                clock.end_step()
            elif kind == "Notice":
                clock.notes.append(event.message)

        rail = CudaRail()
        if self._loaded != (cell.shape, cell.mode):
            self._base, self._loaded = BaseCache(), (cell.shape, cell.mode)  # the base before is freed
        rail._cache = self._base  # noqa: SLF001  # one base for all cells, as in `keep_base`
        rail.train(
            TrainSpec.build(settings, RunFolders(run_id="bench", output=run, run=run), base), hear, lambda: False
        )

    def _load_peer(self, cell: Cell) -> None:
        import torch

        if self._loaded == (cell.shape, cell.mode) and cell.mode != "full":
            return
        self._base = None
        gc.collect()
        if self.on_gpu:
            torch.cuda.empty_cache()
        path = str(self.models / cell.shape)
        if self.stack == "unsloth":
            from unsloth import FastLanguageModel

            self._base, self._tokenizer = FastLanguageModel.from_pretrained(
                path, max_seq_length=2048, dtype=torch.bfloat16, load_in_4bit=cell.mode == "qlora",
                full_finetuning=cell.mode == "full", use_gradient_checkpointing="unsloth",
            )  # fmt: skip
        else:
            from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedTokenizerFast

            more: dict[str, Any] = {"device_map": {"": 0}} if self.on_gpu else {}
            if cell.mode == "qlora":
                more["quantization_config"] = BitsAndBytesConfig(
                    load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
                    bnb_4bit_compute_dtype=torch.bfloat16,
                )  # fmt: skip
            self._base = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16, **more)
            self._tokenizer = PreTrainedTokenizerFast(
                tokenizer_file=f"{path}/tokenizer.json", eos_token="<|im_end|>", pad_token="<|endoftext|>"
            )
        self._loaded = (cell.shape, cell.mode)

    def _train_peer(self, cell: Cell, clock: Clock) -> None:
        from datasets import Dataset
        from peft import LoraConfig
        from transformers import TrainerCallback
        from trl import SFTConfig, SFTTrainer

        class Timer(TrainerCallback):  # type: ignore[misc]
            def on_train_begin(self, *_: Any, **__: Any) -> None:
                clock.begin()

            def on_step_end(self, *_: Any, **__: Any) -> None:
                clock.end_step()

            def on_log(self, *_: Any, logs: dict[str, float] | None = None, **__: Any) -> None:
                if logs and "loss" in logs:
                    clock.losses.append(logs["loss"])

        self._load_peer(cell)
        file = (self.models / cell.shape / rows_name(cell)).with_suffix(".json")
        rows = Dataset.from_dict({"input_ids": json.loads(file.read_text())})
        options: dict[str, Any] = {
            "output_dir": str(self.options.folder / f"out-{self.stack}"), "per_device_train_batch_size": cell.batch,
            "gradient_accumulation_steps": cell.accumulation, "max_steps": clock.total, "warmup_steps": 5,
            "learning_rate": 2e-5 if cell.mode == "full" else 2e-4, "lr_scheduler_type": "constant_with_warmup",
            "optim": OPTIMIZERS[cell.mode] if self.on_gpu else "adamw_torch", "bf16": self.on_gpu, "logging_steps": 1,
            "report_to": "none", "save_strategy": "no", "seed": 1, "disable_tqdm": True, "packing": cell.short,
            "max_length": cell.seq, "use_cpu": not self.on_gpu, "use_liger_kernel": self.stack == "liger",
        }  # fmt: skip
        if self.stack != "unsloth":
            options["gradient_checkpointing"] = True
        model, config = self._base, None
        if cell.mode != "full" and self.stack == "unsloth":
            from unsloth import FastLanguageModel

            model = FastLanguageModel.get_peft_model(
                self._base, r=cell.r, lora_alpha=2 * cell.r, lora_dropout=0, bias="none", target_modules=TARGETS,
                use_gradient_checkpointing="unsloth", random_state=1,
            )  # fmt: skip
        elif cell.mode != "full":
            config = LoraConfig(r=cell.r, lora_alpha=2 * cell.r, target_modules=TARGETS, task_type="CAUSAL_LM")
        trainer = SFTTrainer(
            model=model, processing_class=self._tokenizer, train_dataset=rows, callbacks=[Timer()], peft_config=config,
            args=SFTConfig(**options),
        )  # fmt: skip
        plain = trainer.get_batch_samples

        def samples(*args: Any, **kwargs: Any) -> Any:
            found = plain(*args, **kwargs)
            masks = [(batch["input_ids"], batch.get("attention_mask")) for batch in found[0]]
            clock.tokens.append(
                sum(int(m.sum()) if m is not None and m.shape == i.shape else i.numel() for i, m in masks)
            )
            return found

        trainer.get_batch_samples = samples
        trainer.train()
        model = trainer.model
        trainer.optimizer = trainer.model = trainer.model_wrapped = trainer.callback_handler = None
        if cell.mode != "full" and hasattr(model, "unload"):
            self._base = model.unload()


def import_stack(stack: str) -> None:
    """What a training imports, before the stack's turn."""
    if stack == "unsloth":
        import unsloth  # noqa: F401  # it wants to be the first
    import torch

    if stack == "ours":
        pass
    else:
        import trl.trainer.sft_trainer  # noqa: F401
    if torch.cuda.is_available():
        import bitsandbytes  # noqa: F401

        if stack in ("ours", "liger"):
            import liger_kernel.transformers  # noqa: F401


if __name__ == "__main__":
    sys.exit(main())
