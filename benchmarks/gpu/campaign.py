"""Four questions on a GPU: does it fit 16 GiB, does it recover, are preflight and estimate right, what does it cost?

    uv run python benchmarks/gpu/campaign.py                      every part, as on a 16 GB GPU
    uv run python benchmarks/gpu/campaign.py --parts fit,thermal  some of them
    uv run python benchmarks/gpu/campaign.py --dry                the same course on a CPU with a pico model

Random weights of published shapes, random words; see README.md for what is needed. Each part prints one JSON line, the
end a table. A cap on torch's allocator stands for the smaller GPU: CUDA's context, 0.6 to 0.75 GiB, is outside it.
"""

from __future__ import annotations

import argparse
import gc
import json
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from randommodel import write_model, write_rows

from bp_data.loop.shapes import read_shapes
from bp_runs import Settings, TrainSpec
from bp_runs.errors import CodedError
from bp_runs.events import Event, ModelLoaded, Notice, StepDone
from bp_runs.spec import DataSpec, LoraSpec, ModelSpec, RunFolders, TrainingSpec
from bp_train_cuda import CudaRail
from bp_train_cuda.guards.thermal import find_sensor
from bp_train_cuda.memory.estimate import estimate, read_load

GIB = 2**30
ON_GPU = torch.cuda.is_available()


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One training."""

    shape: str
    mode: str = "qlora"
    r: int = 16
    targets: str = "all-linear"
    batch: int = 1
    accumulation: int = 1
    seq: int = 2048
    steps: int = 3
    gpu_max_temp: int = 88
    method: str = "sft"

    @property
    def name(self) -> str:
        adapter = "" if self.mode == "full" else f" r={self.r}{'' if self.targets == 'all-linear' else ' q,v'}"
        return f"{self.shape} {self.mode}{adapter} {self.batch}×{self.accumulation}×{self.seq}"


# What must run under the cap; the peaks also serve preflight and estimate.
FITS = (
    Case(shape="qwen2.5-7b", batch=2, steps=20),
    Case(shape="qwen2.5-7b", r=256, steps=20),
    Case(shape="llama-3.2-3b", mode="full", steps=10),
    Case(shape="smollm3-3b", mode="full", steps=10),
)
# With those of FITS seventeen configurations, for estimate-vram.
MORE = (
    Case(shape="qwen2.5-7b", seq=8192),
    Case(shape="qwen2.5-7b", seq=16384),
    Case(shape="qwen2.5-7b", batch=2, accumulation=2, r=64),
    Case(shape="llama-3.2-3b", mode="lora", batch=2),
    Case(shape="llama-3.2-3b", mode="lora", batch=2, accumulation=2, r=256),
    Case(shape="smollm3-3b", batch=4, targets="q_proj,v_proj"),
    Case(shape="smollm3-3b", mode="lora", seq=8192, targets="q_proj,v_proj"),
    Case(shape="qwen2.5-1.5b", mode="lora", batch=4, r=64),
    Case(shape="qwen2.5-1.5b", mode="full", batch=2),
    Case(shape="phi-4-mini", batch=2, seq=4096),
    Case(shape="llama-3.2-1b", mode="lora", batch=8, r=8),
    Case(shape="qwen2.5-3b", seq=12288),
    Case(shape="mistral-7b", seq=4096, targets="q_proj,v_proj"),
)


class Bench:
    """A scratch folder with models that are written once, and the runs made in it."""

    def __init__(self, scratch: Path, *, dry: bool) -> None:
        self._scratch = scratch
        self._dry = dry
        self._count = 0
        self.runs: dict[str, dict[str, Any]] = {}

    def shrink(self, case: Case) -> Case:
        """In a dry run: a pico model, short rows, no 4-bit base."""
        if not self._dry:
            return case
        mode = case.mode if case.mode == "full" else "lora"
        return replace(case, shape="pico", mode=mode, r=min(case.r, 8), seq=128, steps=min(case.steps, 4))

    def model(self, shape: str) -> Path:
        folder = self._scratch / shape
        return folder if (folder / "config.json").is_file() else write_model(folder, shape)

    def drop(self, shape: str) -> None:
        """Remove a model that no later part needs; all of them would take 60 GB of disk."""
        shutil.rmtree(self._scratch / shape, ignore_errors=True)

    def rows(self, case: Case) -> Path:
        file = self._scratch / f"{case.shape}-{case.seq}.jsonl"
        return file if file.is_file() else write_rows(file, self.model(case.shape), 64, case.seq)

    def spec(self, case: Case, **training: Any) -> TrainSpec:
        self._count += 1
        run = self._scratch / f"run-{self._count}"
        run.mkdir()
        base = self.model(case.shape)
        loop = {
            "mode": case.mode, "steps": case.steps, "batch_size": case.batch, "method": case.method,
            "gradient_accumulation": case.accumulation, "learning_rate": 1e-5 if case.mode == "full" else 2e-4,
            "warmup_steps": 2, "eval_share": 0.0, "save_steps": 0, "preflight": "on", "gpu_max_temp": case.gpu_max_temp,
        } | training  # fmt: skip
        known = {k: v for k, v in loop.items() if k in TrainingSpec.__dataclass_fields__}
        settings = Settings(
            model=ModelSpec(name=str(base), max_seq_length=case.seq),
            data=DataSpec(path=str(self.rows(case))),
            lora=LoraSpec(r=case.r, target_modules=case.targets),
            training=TrainingSpec(**known),
        )
        return TrainSpec.build(settings, RunFolders(run_id="bench", output=self._scratch, run=run), base)

    def train(self, case: Case, *, most_seconds: float = float("inf"), **training: Any) -> dict[str, Any]:
        """Train once, from a clean allocator, and tell what was seen.

        Args:
            most_seconds: Then it is asked to stop; a pause ends too.
        """
        clean()
        case = self.shrink(case)
        events: list[Event] = []
        began = time.perf_counter()
        spec = self.spec(case, **training)
        outcome = CudaRail().train(spec, events.append, lambda: time.perf_counter() - began > most_seconds)
        shutil.rmtree(spec.folders.run)
        steps = [e for e in events if isinstance(e, StepDone)]
        notices = [e for e in events if isinstance(e, Notice)]
        preflight = next((n.details["preflight"] for n in notices if "preflight" in n.details), None)
        peak = outcome.peak_memory if ON_GPU else 0
        length = preflight["tokens"] // preflight["rows"] if preflight else case.seq
        speeds = [e.tokens_per_second for e in steps[3:]] or [steps[-1].tokens_per_second]
        return {
            "case": case.name,
            "mode": next(e for e in events if isinstance(e, ModelLoaded)).mode,
            "steps": outcome.steps,
            "loss": [round(outcome.first_loss, 3), round(outcome.final_loss, 3)],
            "seconds": round(time.perf_counter() - began, 1),
            "tokens_per_second": round(statistics.median(speeds), 1),
            "tokens_per_second_range": [round(min(speeds), 1), round(max(speeds), 1)],
            "peak_gib": gib(peak),
            "reserved_gib": gib(torch.cuda.max_memory_reserved()) if ON_GPU else 0.0,
            "preflight_gib": gib(preflight["peak_bytes"]) if preflight else None,
            "estimate": estimate_of(spec, case.mode, length),
            "trained": next(e for e in events if isinstance(e, ModelLoaded)).trainable,
            "chunks": max((n.details["chunks"] for n in notices if "chunks" in n.details), default=1),
            "thermal": [[n.details["thermal"], n.details["temperature"]] for n in notices if "thermal" in n.details],
            "hottest": max((e.temperature for e in steps if e.temperature is not None), default=None),
        }


def estimate_of(spec: TrainSpec, mode: str, length: int) -> dict[str, float]:
    """What estimate-vram says of the same run, for rows of ``length`` tokens."""
    load = replace(read_load(spec, mode), seq_length=length, checkpointing=ON_GPU)
    found = estimate(read_shapes(json.loads((spec.base / "config.json").read_text())), load)
    return {
        "in_use_gib": gib(found.in_use),
        "needed_gib": gib(found.needed),
        "paged_gib": gib(found.paged),
        **{k: gib(v) for k, v in found.parts.items()},
    }


def gib(size: float) -> float:
    return round(size / GIB, 3)


def cap_memory(limit: float) -> None:
    """Let torch's allocator have no more than so many GiB; 0: no cap."""
    if ON_GPU and limit:
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, limit * GIB / total))


def clean() -> None:
    gc.collect()
    if ON_GPU:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def part_fit(bench: Bench, cap: float) -> dict[str, Any]:
    """The four training runs that a 16 GB GPU must hold."""
    found = {case.name: tell("fit", bench.train(case)) for case in FITS}
    bench.runs |= found
    return {
        "fits": all(row["reserved_gib"] <= cap for row in found.values()),
        "most_reserved_gib": max(row["reserved_gib"] for row in found.values()),
    }


def part_oom(bench: Bench, cap: float) -> dict[str, Any]:
    """A batch of 16 rows that does not fit: halved, all steps done."""
    case = Case(shape="qwen2.5-7b", batch=16, steps=4)
    row = tell("oom", bench.train(case, preflight="off"))
    return {
        "recovered": row["chunks"] > 1 or not ON_GPU,
        "chunks": row["chunks"],
        "steps": row["steps"],
        "reserved_gib": row["reserved_gib"],
        "fits": row["reserved_gib"] <= cap,
    }


def part_estimate(bench: Bench, _cap: float) -> dict[str, Any]:
    """Estimate and preflight against the measured peak, over all cases."""
    for case in MORE:
        bench.runs[case.name] = tell("estimate", bench.train(case))
    bench.drop("mistral-7b")
    off = {}
    for name, row in bench.runs.items():
        if row["peak_gib"]:
            off[name] = {
                "measured": row["peak_gib"],
                "estimate_off_percent": round(100 * (row["estimate"]["in_use_gib"] / row["peak_gib"] - 1), 1),
                "preflight_off_percent": round(100 * (row["preflight_gib"] / row["peak_gib"] - 1), 1)
                if row["preflight_gib"]
                else None,
            }
    worst = lambda key: max((abs(v[key]) for v in off.values() if v[key] is not None), default=None)  # noqa: E731
    return {
        "cases": len(off),
        "estimate_worst_percent": worst("estimate_off_percent"),
        "preflight_worst_percent": worst("preflight_off_percent"),
        "each": off,
    }


def part_thermal(bench: Bench, _cap: float) -> dict[str, Any]:
    """See how hot the GPU gets in a training run, then train with a limit below that: it must pause, cool and continue."""
    sensor, why = find_sensor() if ON_GPU else (None, "no GPU")
    if sensor is None:
        return {"skipped": why}
    idle = int(sensor.read() or 0)
    case = Case(shape="qwen2.5-7b", batch=4, steps=24)
    free = tell("thermal/free", bench.train(replace(case, gpu_max_temp=105), preflight="off"))
    limit = min(free["hottest"] - 1, max(free["hottest"] - 5, idle + 9))  # it resumes 8 degrees lower
    row = tell("thermal", bench.train(replace(case, gpu_max_temp=limit), most_seconds=180, preflight="off"))
    states = [state for state, _ in row["thermal"]]
    return {
        "idle": idle, "hottest_without_limit": free["hottest"], "limit": limit, "states": states, "steps": row["steps"],
        "paused_and_went_on": {"pause", "resume"} <= set(states), "hottest": row["hottest"],
        "seconds": [free["seconds"], row["seconds"]],
    }  # fmt: skip


def part_trl(bench: Bench, _cap: float) -> dict[str, Any]:
    """Ours and plain TRL + PEFT in turns, the same model, rows, settings and float32 adapters.

    Four long rows at once, so that the GPU and not Python sets the pace.
    """
    case = bench.shrink(Case(shape="qwen2.5-7b", batch=4, steps=12))
    rows: dict[str, list[dict[str, Any]]] = {"ours": [], "trl": []}
    if ON_GPU:  # whatever is compiled or read for the first time is not timed
        bench.train(replace(case, steps=3), preflight="off", kernels="none")
    for _ in range(3 if ON_GPU else 1):
        rows["ours"].append(tell("trl/ours", bench.train(case, preflight="off", kernels="none")))
        rows["trl"].append(tell("trl/trl", train_with_trl(bench, case)))
    rows["trl_bf16_adapters"] = [tell("trl/bf16", train_with_trl(bench, case, adapters=torch.bfloat16))]
    middle = {
        k: {f: statistics.median(r[f] for r in v) for f in ("tokens_per_second", "peak_gib", "reserved_gib")}
        for k, v in rows.items()
    }
    spread = {
        k: [min(r["tokens_per_second"] for r in v), max(r["tokens_per_second"] for r in v)] for k, v in rows.items()
    }
    ours, trl = middle["ours"], middle["trl"]
    return {
        "speed_ratio": round(ours["tokens_per_second"] / trl["tokens_per_second"], 4),
        "memory_ratio": round(ours["peak_gib"] / trl["peak_gib"], 4) if trl["peak_gib"] else None,
        "medians": middle,
        "tokens_per_second_spread": spread,
        "first_losses": {k: v[0]["loss"] for k, v in rows.items()},
    }


class Stamps(transformers.TrainerCallback):
    """The time of each log, which waits for the step's loss."""

    def __init__(self) -> None:
        self.times = [0.0]
        self.losses: list[float] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.times = [time.perf_counter()]

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        if "loss" in logs:
            self.times.append(time.perf_counter())
            self.losses.append(float(logs["loss"]))


def train_with_trl(bench: Bench, case: Case, adapters: torch.dtype = torch.float32) -> dict[str, Any]:
    """TRL's SFTTrainer as its documentation shows it, on the rows' tokens."""
    from datasets import Dataset
    from peft import LoraConfig
    from trl import SFTConfig, SFTTrainer

    from bp_data import PrepareRequest, prepare

    clean()
    base = bench.model(case.shape)
    prepared = prepare(PrepareRequest(bench.rows(case), base, case.seq))
    in_4bit = case.mode == "qlora"
    quantization = (
        transformers.BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
        )
        if in_4bit
        else None
    )
    model = transformers.AutoModelForCausalLM.from_pretrained(
        base,
        dtype=torch.bfloat16 if ON_GPU else torch.float32,
        quantization_config=quantization,
        device_map={"": "cuda" if ON_GPU else "cpu"},
    )
    core = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(base / "tokenizer.json"), pad_token="<|endoftext|>", eos_token="<|im_end|>"
    )
    stamps = Stamps()
    trainer = SFTTrainer(
        model=model,
        args=SFTConfig(
            output_dir=str(base.parent / "trl"), max_steps=case.steps, per_device_train_batch_size=case.batch,
            gradient_accumulation_steps=case.accumulation, learning_rate=2e-4, optim="adamw_8bit" if in_4bit else "adamw_torch_fused",
            max_grad_norm=1.0, seed=42, use_cpu=not ON_GPU, bf16=ON_GPU, gradient_checkpointing=ON_GPU, max_length=None,
            dataset_kwargs={"skip_prepare_dataset": True}, logging_steps=1, disable_tqdm=True, report_to="none", save_strategy="no",
        ),
        train_dataset=Dataset.from_list([{"input_ids": [int(i) for i in row.ids], "labels": [int(i) for i in row.labels()]} for row in prepared.rows]),
        processing_class=core,
        peft_config=LoraConfig(r=case.r, lora_alpha=2 * case.r, target_modules="all-linear", task_type="CAUSAL_LM"),
        callbacks=[stamps],
    )  # fmt: skip
    for weight in trainer.model.parameters():
        if weight.requires_grad:
            weight.data = weight.data.to(adapters)
    trainer.remove_callback(transformers.PrinterCallback)
    if ON_GPU:
        torch.cuda.reset_peak_memory_stats()
    trainer.train()
    trainer.accelerator.free_memory()
    tokens = sum(len(row.ids) for row in prepared.rows) / len(prepared.rows) * case.batch * case.accumulation
    speeds = [tokens / (b - a) for a, b in zip(stamps.times[3:], stamps.times[4:], strict=False)] or [0.0]
    return {
        "case": case.name,
        "loss": [round(stamps.losses[0], 3), round(stamps.losses[-1], 3)],
        "tokens_per_second": round(statistics.median(speeds), 1),
        "tokens_per_second_range": [round(min(speeds), 1), round(max(speeds), 1)],
        "peak_gib": gib(torch.cuda.max_memory_allocated()) if ON_GPU else 0.0,
        "reserved_gib": gib(torch.cuda.max_memory_reserved()) if ON_GPU else 0.0,
    }


PARTS: Mapping[str, Callable[[Bench, float], dict[str, Any]]] = {
    "fit": part_fit,
    "estimate": part_estimate,
    "oom": part_oom,
    "thermal": part_thermal,
    "trl": part_trl,
}


def tell(part: str, row: dict[str, Any]) -> dict[str, Any]:
    print(json.dumps({"part": part, **row}), flush=True)
    return row


def run_part(name: str, bench: Bench, cap: float) -> dict[str, Any]:
    """A part's result; a failure is reported and costs only the part."""
    began = time.perf_counter()
    try:
        row = PARTS[name](bench, cap)
    except CodedError as error:
        row = {"failed": str(error), "cause": error.cause}
    except (RuntimeError, ValueError, TypeError, AttributeError, ImportError, OSError) as error:
        row = {"failed": f"{type(error).__name__}: {error}"[:500]}
    return tell(f"{name}/end", {**row, "part_seconds": round(time.perf_counter() - began, 1)})


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--parts", default=",".join(PARTS), help="joined by commas; estimate also judges the runs of fit"
    )
    parser.add_argument("--cap-gib", type=float, default=15.2, help="torch's allocator gets no more; 0: no cap")
    parser.add_argument("--dry", action="store_true", help="pico model, few steps: does the script work")
    parser.add_argument(
        "--scratch", type=Path, help="where models are written, up to 50 GB; default: the system's temporary folder"
    )
    options = parser.parse_args()
    cap_memory(options.cap_gib)
    card = torch.cuda.get_device_name(0) if ON_GPU else "none"
    tell(
        "start",
        {
            "card": card,
            "cap_gib": options.cap_gib,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    )
    transformers.utils.logging.disable_progress_bar()
    if options.scratch:
        options.scratch.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=options.scratch) as scratch:
        bench = Bench(Path(scratch), dry=options.dry or not ON_GPU)
        ends = {name: run_part(name, bench, options.cap_gib) for name in options.parts.split(",")}
    print_table(bench, ends)
    return 1 if any("failed" in end for end in ends.values()) else 0


def print_table(bench: Bench, ends: dict[str, dict[str, Any]]) -> None:
    print(f"\n{'case':<46} {'peak':>7} {'reserved':>9} {'preflight':>10} {'estimate':>9} {'tok/s':>8}")
    for name, row in bench.runs.items():
        print(
            f"{name:<46} {row['peak_gib']:>7} {row['reserved_gib']:>9} {row['preflight_gib']!s:>10} {row['estimate']['in_use_gib']:>9} {row['tokens_per_second']:>8}"
        )
    for name, end in ends.items():
        print(f"{name}: " + ", ".join(f"{k} {v}" for k, v in end.items() if not isinstance(v, dict)))


if __name__ == "__main__":
    sys.exit(main())
