"""How close `backprop prove` comes on a GPU: the difference of losses in each mode and method, against its tolerance.

    uv run python benchmarks/gpu/prove.py                          the shape of Qwen2.5-0.5B, ten steps a case
    uv run python benchmarks/gpu/prove.py --shape llama-3.2-1b
    uv run python benchmarks/gpu/prove.py --dry                    a pico model on a CPU

Each case trains a model of random weights on random words, then replays every step in the independent loop. One JSON
line a case; the exit status is 1 if a difference is larger than the tolerance.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import transformers
from randommodel import SHAPES, write_model, write_rows

from bp_runs import Settings, TrainSpec
from bp_runs.events import DataReady, Event, ModelLoaded, StepDone
from bp_runs.proof import Proof
from bp_runs.record import RunRecord
from bp_runs.spec import DataSpec, LoraSpec, ModelSpec, RunFolders, TrainingSpec
from bp_train_cuda import CudaRail

# mode, dtype, method, optimizer
CASES = [
    ("lora", "float32", "sft", "auto"),
    ("full", "float32", "sft", "adamw_torch"),
    *(("lora", "bfloat16", method, "auto") for method in ("sft", "dpo", "orpo", "simpo", "kto")),
    ("qlora", "bfloat16", "sft", "auto"),
    ("qlora", "bfloat16", "kto", "auto"),
    ("full", "bfloat16", "sft", "auto"),
]
DRY = [case for case in CASES if case[1] == "float32"]


def main() -> int:
    """One line a case."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="qwen2.5-0.5b")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--tokens", type=int, default=256, help="longest row")
    parser.add_argument("--cases", default="", help="names such as qlora-bfloat16-sft-auto; default: all")
    parser.add_argument("--scratch", type=Path)
    parser.add_argument("--dry", action="store_true")
    options = parser.parse_args()
    transformers.utils.logging.disable_progress_bar()
    is_dry, passed = options.dry or not torch.cuda.is_available(), True
    with tempfile.TemporaryDirectory(dir=options.scratch) as scratch:
        base = write_model(Path(scratch) / "base", "pico" if is_dry else options.shape)
        files = write_files(Path(scratch), base, options.tokens)
        for number, case in enumerate(DRY if is_dry else CASES):
            if options.cases and "-".join(case) not in options.cases.split(","):
                continue
            run = Path(scratch) / f"run{number}"
            run.mkdir()
            row = prove(case, base, files, run, options)
            print(json.dumps(row), flush=True)
            passed &= row["passed"]
    return 0 if passed else 1


def write_files(folder: Path, base: Path, tokens: int) -> dict[str, Path]:
    """The same random chats as rows, as preferences and as judged answers."""
    files = {"rows": write_rows(folder / "rows.jsonl", base, 64, tokens)}
    answers = [json.loads(line)["messages"][1]["content"] for line in files["rows"].open()]
    pairs = [
        {"prompt": "Go on.", "chosen": a, "rejected": b[: len(b) // 2]}
        for a, b in zip(answers, reversed(answers), strict=True)
    ]
    judged = [{"prompt": f"Go on {n}.", "completion": a, "label": n % 3 > 0} for n, a in enumerate(answers)]
    for name, rows in (("pairs", pairs), ("judged", judged)):
        files[name] = folder / f"{name}.jsonl"
        files[name].write_text("".join(json.dumps(row) + "\n" for row in rows))
    return files


def prove(
    case: tuple[str, str, str, str], base: Path, files: dict[str, Path], run: Path, options: Any
) -> dict[str, Any]:
    """Train a case and replay it."""
    mode, dtype, method, optim = case
    file = files[{"sft": "rows", "kto": "judged"}.get(method, "pairs")]
    spec = TrainSpec.build(
        Settings(
            model=ModelSpec(name=str(base), max_seq_length=options.tokens, dtype=dtype),
            data=DataSpec(path=str(file)),
            lora=LoraSpec(r=16),
            training=TrainingSpec(
                method=method, mode=mode, optim=optim, steps=options.steps, batch_size=4, gradient_accumulation=2,
                eval_share=0.0, save_steps=0, preflight="off",
            ),
        ),
        RunFolders(run_id="20260101-000000-abcdef", output=run, run=run),
        base,
    )  # fmt: skip
    events: list[Event] = []
    CudaRail().train(spec, events.append, lambda: False)
    model, data = (asdict(next(e for e in events if isinstance(e, kind))) for kind in (ModelLoaded, DataReady))
    record = RunRecord(run_id=spec.folders.run_id, rail="cuda", model=model, data=data)
    begun = time.perf_counter()
    replay = CudaRail().replay_steps(spec, record, options.steps)
    losses = tuple(e.loss for e in events if isinstance(e, StepDone))
    proof = Proof(
        run_id=record.run_id, at="", recorded=losses, replayed=replay.losses, tolerance=replay.tolerance, why=replay.why
    )
    found = {name: proof.to_dict()[name] for name in ("largest", "largest_relative", "tolerance", "passed", "steps")}
    first, last = losses[0], losses[-1]
    return {"case": "-".join(case), **found, "losses": [first, last], "seconds": time.perf_counter() - begun}


if __name__ == "__main__":
    sys.exit(main())
