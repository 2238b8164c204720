"""What several GPUs give: speed next to one GPU, memory of each, equal weights, and how an error on one ends all.

    uv run python benchmarks/gpu/several.py                     every part, on one and on two GPUs
    uv run python benchmarks/gpu/several.py --parts speed,equal some of them
    uv run python benchmarks/gpu/several.py --parts fsdp --ranks 2      only those on two GPUs
    uv run python benchmarks/gpu/several.py --dry               the same course on a CPU with pico models, over gloo

Random weights of published shapes, random words. The script starts its own torchrun for one GPU and for two; each
prints one JSON line a training, and the end compares them. Exit status 1 where weights differ or an error did not end
both processes.

    equal   a pico model: 2 ranks × 2 rows against 1 × 4 rows, for every method, and LoRA and full fine-tuning under FSDP2
    speed   the shape of Qwen2.5-7B, qlora r=16, as many rows a GPU: tokens/s of two GPUs over those of one (DDP)
    fsdp    the shape of Llama-3.2-3B, full fine-tuning, FSDP2; and the 7B's bf16 base under LoRA, sharded
    fail    a rank that runs out of memory: the seconds until the other knows, under DDP and FSDP2, and until both ended
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}

PARTS = ("equal", "speed", "fsdp", "fail")
WORDS = [
    "river",
    "stone",
    "lamp",
    "harbour",
    "bread",
    "window",
    "cloud",
    "paper",
    "ladder",
    "garden",
    "winter",
    "copper",
]
NOISE = 1e-5
"""What weights may differ by: sums in another order."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One training."""

    name: str
    part: str
    shape: str
    ranks: int
    method: str = "sft"
    mode: str = "lora"
    sharded: bool = False
    batch: int = 2
    accumulation: int = 1
    seq: int = 2048
    steps: int = 10
    fails: bool = False


def cases_of(part: str) -> list[Case]:
    match part:
        case "equal":
            plain = Case(name="", part=part, shape="pico", ranks=0, seq=128, steps=4)
            both = [(2, 2), (1, 4)]
            found = [
                replace(plain, name=f"{method}", method=method, ranks=ranks, batch=batch)
                for method in ("sft", "dpo", "orpo", "simpo", "kto")
                for ranks, batch in both
            ]
            for mode in ("lora", "full"):
                found += [
                    replace(plain, name=f"fsdp {mode}", mode=mode, ranks=ranks, batch=batch, sharded=ranks > 1)
                    for ranks, batch in both
                ]
            return found
        case "speed":
            case = Case(name="7B qlora 4×2", part=part, shape="qwen2.5-7b", mode="qlora", ranks=0, batch=4, steps=10)
            one = Case(name="7B qlora 8×1", part=part, shape="qwen2.5-7b", mode="qlora", ranks=0, batch=8, steps=10)
            return [
                replace(c, accumulation=a, ranks=ranks) for c, a in ((case, 2), (one, 1)) for ranks in (2, 1)
            ]  # fmt: skip
        case "fsdp":
            full = Case(name="3B full", part=part, shape="llama-3.2-3b", mode="full", ranks=2, sharded=True, steps=6)
            return [
                full,
                replace(full, ranks=1, sharded=False),
                replace(full, name="7B lora", shape="qwen2.5-7b", mode="lora"),
                replace(full, name="7B lora", shape="qwen2.5-7b", mode="lora", ranks=1, sharded=False),
            ]
        case _:
            case = Case(name="oom on rank 1", part=part, shape="pico", ranks=2, seq=128, steps=4, fails=True)
            return [case, replace(case, name="oom on rank 1, fsdp", sharded=True)]


def shrink(case: Case) -> Case:
    """For a dry run: a pico model, few steps, no 4-bit base."""
    mode = "lora" if case.mode == "qlora" else case.mode
    return replace(case, shape="pico", mode=mode, seq=min(case.seq, 128), steps=min(case.steps, 4))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", default=",".join(PARTS))
    parser.add_argument("--ranks", type=int, choices=(1, 2), help="only the trainings on so many cards")
    parser.add_argument("--dry", action="store_true")
    parser.add_argument("--scratch", type=Path)
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        return work(options.worker)
    scratch = Path(tempfile.mkdtemp(prefix="bench-several-", dir=options.scratch))
    try:
        return drive(scratch, options.parts.split(","), only=options.ranks, dry=options.dry)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def drive(scratch: Path, parts: list[str], *, only: int | None, dry: bool) -> int:
    """Prepare, start a torchrun for one GPU and for two, and compare."""
    cases = [case for part in parts for case in cases_of(part) if only in (None, case.ranks)]
    cases = [shrink(case) for case in cases] if dry else cases
    write_files(scratch, cases)
    rows: list[dict[str, Any]] = []
    for ranks, fails in ((1, False), (2, False), (2, True)):
        chosen = [case for case in cases if case.ranks == ranks and case.fails == fails]
        if chosen:
            rows += launch(scratch, chosen, ranks)
    verdicts = [compare_weights(scratch, rows), compare_speeds(rows), judge_failure(rows)]
    for verdict in verdicts:
        if verdict:
            print(json.dumps(verdict), flush=True)
    done = {(row["name"], row["ranks"]) for row in rows if "name" in row and ("code" in row) == row["fails"]}
    missing = [f"{case.name}, {case.ranks}" for case in cases if (case.name, case.ranks) not in done]
    if missing:
        print(json.dumps({"missing": missing}))
    return int(bool(missing) or any(not verdict.get("holds", True) for verdict in verdicts))


def write_files(scratch: Path, cases: list[Case]) -> None:
    """Models and rows, in a process of its own: it leaves no memory on a GPU."""
    (scratch / "shapes.json").write_text(json.dumps(sorted({(case.shape, case.seq) for case in cases})))
    code = "import sys, several; from pathlib import Path; several.write_models(Path(sys.argv[1]))"
    subprocess.run([sys.executable, "-c", code, str(scratch)], check=True, cwd=Path(__file__).parent)


def write_models(scratch: Path) -> None:
    import transformers
    from randommodel import write_model, write_rows

    transformers.utils.logging.disable_progress_bar()
    for shape, seq in json.loads((scratch / "shapes.json").read_text()):
        folder = scratch / shape
        if not folder.is_dir():
            write_model(folder, shape)
        write_rows(scratch / f"{shape}-{seq}.jsonl", folder, 64, seq)
    write_pairs(scratch)


def write_pairs(scratch: Path) -> None:
    """Rows that compare answers, and judged ones; 41, so that the last step of an epoch is not whole."""
    pairs, judged = [], []
    for number in range(41):
        prompt, answer = f"{WORDS[number % 12]} {number}?", " ".join(WORDS[number % 7 : number % 7 + 4])
        worse = " ".join(WORDS[number % 5 : number % 5 + 3])
        pairs.append({"prompt": prompt, "chosen": answer, "rejected": worse})
        judged.append({"prompt": prompt, "completion": answer, "label": number % 3 > 0})
    for name, rows in (("pairs", pairs), ("judged", judged)):
        (scratch / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def launch(scratch: Path, cases: list[Case], ranks: int) -> list[dict[str, Any]]:
    """Run the cases in one torchrun of so many processes; what it printed, by line."""
    order = scratch / "order.json"
    order.write_text(json.dumps([asdict(case) for case in cases]))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    began = time.perf_counter()
    child = subprocess.Popen(
        [*command, __file__, "--worker", str(order)], stdout=subprocess.PIPE, text=True, env=environment()
    )
    rows = []
    for line in child.stdout or []:
        print(line, end="", flush=True)
        if line.startswith("{"):
            rows.append(json.loads(line))
    status = child.wait()
    end = {"torchrun": ranks, "status": status, "seconds": round(time.perf_counter() - began, 1)}
    print(json.dumps(end), flush=True)
    if any(case.fails for case in cases):
        rows.append({"part": "fail", "end": time.time(), "status": status})
    return rows


def environment() -> dict[str, str]:
    """Ours, with the packages of this checkout where they are not installed."""
    sources = [str(path) for path in sorted(Path(__file__).parents[2].glob("packages/*/src"))]
    return os.environ | {"PYTHONPATH": os.pathsep.join([*sources, os.environ.get("PYTHONPATH", "")])}


def compare_weights(scratch: Path, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The farthest that a weight of two ranks lies from the same of one."""
    import torch
    from safetensors.torch import load_file

    far: dict[str, float] = {}
    for name in {row["name"] for row in rows if row.get("part") == "equal"}:
        files = [scratch / f"{name} {ranks}.safetensors" for ranks in (1, 2)]
        if all(file.is_file() for file in files):
            one, two = (load_file(file) for file in files)
            far[name] = max(float((one[key].float() - two[key].float()).abs().max()) for key in one)
    limit = NOISE if not torch.cuda.is_available() else 1e-3  # a GPU's own sums move with the number of rows
    return {"part": "equal", "farthest": far, "limit": limit, "holds": max(far.values()) <= limit} if far else {}


def compare_speeds(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Tokens/s of two GPUs over those of one; 2 would be perfect."""
    speeds = {(row["name"], row["ranks"]): row["tokens_per_second"] for row in rows if "tokens_per_second" in row}
    pairs = {name: speeds[name, 2] / speeds[name, 1] for name, ranks in speeds if ranks == 2 and (name, 1) in speeds}
    found = {row["name"] for row in rows if row.get("part") in ("speed", "fsdp")}
    return {"part": "speed", "scaling": {name: round(ratio, 3) for name, ratio in pairs.items() if name in found}}


def judge_failure(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Whether both processes ended by the code of the one that failed, and how soon."""
    told = [row for row in rows if row.get("fails")]
    end = next((row for row in rows if "end" in row), None)
    if end is None:
        return {}
    codes = {row["name"]: row.get("code") for row in told}
    seconds = round(end["end"] - told[-1]["failed_at"], 1) if told else None
    wanted = {"oom on rank 1": "RUNTIME_OOM_RECOVERY_EXHAUSTED", "oom on rank 1, fsdp": "RUNTIME_GPU_OOM"}
    return {
        "part": "fail",
        "codes": codes,
        "seconds_to_the_end": seconds,
        "holds": codes == wanted and end["status"] != 0,
    }


def work(order: Path) -> int:
    """One process of a torchrun: rank 0 trains the cases in turn, the others follow."""
    from backpropagate.distributed import launchers
    from bp_train_cuda import CudaRail

    ranks = launchers.take_ranks(os.environ)
    rail = CudaRail()
    cases = [Case(**case) for case in json.loads(order.read_text())]
    if ranks is not None and ranks.rank:
        if any(case.fails for case in cases):
            break_memory()
        rail.follow(ranks, lambda: False)
        return 0
    for case in cases:
        train(order.parent, case, rail, ranks)
    if any(case.fails for case in cases):
        return 2  # as the command line would; the launcher ends the others
    if ranks is not None:
        rail.release(ranks)
    return 0


def break_memory() -> None:
    """Let every forward pass of this process that is trained on be out of memory."""
    import torch

    whole = torch.nn.functional.scaled_dot_product_attention

    def forward(*args: Any, **more: Any) -> Any:
        if torch.is_grad_enabled():
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 EiB")
        return whole(*args, **more)

    torch.nn.functional.scaled_dot_product_attention = forward


def train(scratch: Path, case: Case, rail: Any, ranks: Any) -> None:
    from bp_runs.errors import CodedError
    from bp_runs.events import Event, Notice, StepDone

    events: list[Event] = []
    spec = build_spec(scratch, case, ranks and replace(ranks, sharded=case.sharded))
    clean()
    began = time.perf_counter()
    try:
        outcome = rail.train(spec, events.append, lambda: False)
    except CodedError as error:
        failed = {"code": error.code, "message": error.message, "cause": error.cause, "failed_at": time.time()}
        seconds = round(time.perf_counter() - began, 1)
        print(json.dumps({**asdict(case), **failed, "seconds": seconds}), flush=True)
        return
    steps = [event for event in events if isinstance(event, StepDone)]
    speeds = [event.tokens_per_second for event in steps[3:]] or [steps[-1].tokens_per_second]
    peaks = next((e.details["peaks"] for e in events if isinstance(e, Notice) and "peaks" in e.details), None)
    weights = next(outcome.adapter.glob("*model*.safetensors"))
    if case.part == "equal":
        shutil.copyfile(weights, scratch / f"{case.name} {case.ranks}.safetensors")
    row = {
        **asdict(case),
        "loss": [round(outcome.first_loss, 4), round(outcome.final_loss, 4)],
        "seconds": round(time.perf_counter() - began, 1),
        "tokens_per_second": round(statistics.median(speeds), 1),
        "tokens_per_second_range": [round(min(speeds), 1), round(max(speeds), 1)],
        "peak_gib": [round(peak / 2**30, 3) for peak in peaks or [outcome.peak_memory]],
    }
    print(json.dumps(row), flush=True)
    shutil.rmtree(spec.folders.run)


def build_spec(scratch: Path, case: Case, ranks: Any) -> Any:
    from bp_runs import Settings, TrainSpec
    from bp_runs.spec import DataSpec, LoraSpec, ModelSpec, RunFolders, TrainingSpec

    base = scratch / case.shape
    file = {"sft": f"{case.shape}-{case.seq}", "kto": "judged"}.get(case.method, "pairs")
    run = Path(tempfile.mkdtemp(prefix="run-", dir=scratch))
    is_equal = case.part == "equal"
    settings = Settings(
        model=ModelSpec(name=str(base), max_seq_length=case.seq, dtype="float32" if is_equal else "auto"),
        data=DataSpec(path=str(scratch / f"{file}.jsonl")),
        lora=LoraSpec(r=16),
        training=TrainingSpec(
            method=case.method, mode=case.mode, steps=case.steps, batch_size=case.batch,
            gradient_accumulation=case.accumulation, learning_rate=1e-5 if case.mode == "full" else 2e-4,
            optim="adamw_torch" if is_equal else "auto", warmup_steps=2, eval_share=0.25 if is_equal else 0.0,
            eval_min_rows=2, eval_steps=2, save_steps=0, preflight="off", gpu_max_temp=0,
        ),
    )  # fmt: skip
    folders = RunFolders(run_id="bench", output=scratch, run=run)
    return TrainSpec.build(settings, folders, base, ranks=ranks)


def clean() -> None:
    import gc

    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


if __name__ == "__main__":
    sys.exit(main())
