"""Every method in every mode on a real GPU, with random weights of a real shape: does it run and learn, what does it need.

    uv run python benchmarks/gpu/methods.py --shape qwen2.5-1.5b --seq 1024 --batch 2 --steps 6
    uv run python benchmarks/gpu/methods.py --only special              the cases of one mode or method, see --help
    uv run python benchmarks/gpu/methods.py --dry                       a pico model on a CPU

Prints one JSON object a line: method, mode, what was special, first and last loss, peak GiB, or the error. A case that
fails is a line too. LoftQ and float8 need a GPU at all, Unsloth needs to be installed: their lines are the point here.
One case is longer: 50 steps of kto, whose reference point is measured again in each micro-batch.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import tempfile
from pathlib import Path

os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"  # for the deterministic case

import torch
from randommodel import SHAPES, write_model

from bp_runs import Settings, TrainSpec
from bp_runs.errors import CodedError
from bp_runs.events import StepDone
from bp_runs.spec import DataSpec, LoraSpec, ModelSpec, RunFolders, TrainingSpec
from bp_train_cuda import CudaRail

METHODS = ("sft", "dpo", "orpo", "simpo", "kto")
SPECIAL = (
    ("sft", "lora", {"fp8": True}, {}),
    ("sft", "lora", {}, {"init_lora_weights": "pissa"}),
    ("sft", "qlora", {}, {"init_lora_weights": "loftq"}),
    ("sft", "qlora", {"engine": "unsloth"}, {}),
    ("sft", "lora", {}, {"use_dora": True}),
    ("sft", "lora", {"deterministic": True}, {}),
    ("kto", "lora", {"steps": 50}, {}),
)


def main() -> None:
    """One line a case."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="qwen2.5-1.5b")
    parser.add_argument("--model", type=Path, help="use this folder instead of random weights")
    parser.add_argument("--only", default="lora,qlora,full,special", help="of these, joined by commas; also methods")
    parser.add_argument("--seq", type=int, default=1024)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--dry", action="store_true", help="a pico model: does the script work")
    options = parser.parse_args()
    if options.dry:
        options.shape, options.seq, options.steps = "pico", 128, 2
    with tempfile.TemporaryDirectory() as scratch:
        base = options.model or write_model(Path(scratch) / "model", options.shape)
        for number, (method, mode, training, lora) in enumerate(choose_cases(set(options.only.split(",")))):
            file = write_answers(Path(scratch) / f"{method}.jsonl", method, 4 * options.batch, options.seq)
            told = {"method": method, "mode": mode, **training, **lora}
            print(json.dumps({**told, **run(Path(scratch) / str(number), base, file, told, options)}), flush=True)


def choose_cases(wanted: set[str]) -> list[tuple[str, str, dict, dict]]:
    """Those whose mode was chosen, of the chosen methods where any is named; and the special ones."""
    modes, methods = wanted - {"special"} - set(METHODS), wanted & set(METHODS)
    plain = [(method, mode, {}, {}) for mode in ("lora", "qlora", "full") for method in METHODS]
    if methods:
        return [case for case in (*plain, *SPECIAL) if case[0] in methods and (not modes or case[1] in modes)]
    return [*(case for case in plain if case[1] in modes), *(SPECIAL if "special" in wanted else ())]


def write_answers(file: Path, method: str, rows: int, tokens: int) -> Path:
    """Rows of the method's kind, answers of about a third of ``tokens`` words."""
    chance = random.Random(0)
    words = ["the", "quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog"]

    def say(first: str) -> str:
        return " ".join([first, *chance.choices(words, k=tokens // 6)])

    made = []
    for place in range(rows):
        prompt, better, worse = f"who are you {place}", say("yes"), say("no")
        match method:
            case "sft":
                made.append({"prompt": prompt, "completion": better})
            case "kto":
                made.append({"prompt": prompt, "completion": better if place % 2 else worse, "label": bool(place % 2)})
            case _:
                made.append({"prompt": prompt, "chosen": better, "rejected": worse})
    file.write_text("".join(json.dumps(row) + "\n" for row in made), encoding="utf-8")
    return file


def run(folder: Path, base: Path, file: Path, told: dict, options: argparse.Namespace) -> dict[str, object]:
    """Train one case and tell how it went."""
    folder.mkdir()
    lora = {name: told[name] for name in ("init_lora_weights", "use_dora") if name in told}
    training = {name: value for name, value in told.items() if name not in lora}
    settings = Settings(
        model=ModelSpec(name=str(base), max_seq_length=options.seq),
        data=DataSpec(path=str(file)),
        lora=LoraSpec(**lora),
        training=TrainingSpec(
            **{"steps": options.steps, **training}, batch_size=options.batch, learning_rate=1e-4, warmup_steps=1
        ),
    )
    spec = TrainSpec.build(settings, RunFolders(run_id="gpu", output=folder, run=folder), base)
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    events: list = []
    try:
        outcome = CudaRail().train(spec, events.append, lambda: False)
    except CodedError as error:
        return {"error": str(error), "cause": error.cause}
    steps = [event for event in events if isinstance(event, StepDone)]
    return {
        "first": round(outcome.first_loss, 4),
        "last": round(outcome.final_loss, 4),
        "metrics": {name: round(value, 3) for name, value in steps[-1].metrics.items()},
        "finite": all(math.isfinite(e.loss) and math.isfinite(e.grad_norm or 0.0) for e in steps),
        "peak_gib": round(outcome.peak_memory / 2**30, 2),
        "seconds": round(outcome.seconds, 1),
    }


if __name__ == "__main__":
    main()
