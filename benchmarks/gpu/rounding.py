"""Stochastic rounding of bfloat16 weights in full fine-tuning: what it costs on a GPU, and what is lost without it.

    uv run python benchmarks/gpu/rounding.py                          the shape of Llama-3.2-3B as on a 16 GB GPU
    uv run python benchmarks/gpu/rounding.py --shape llama-3.2-1b --rates 1e-5,1e-4
    uv run python benchmarks/gpu/rounding.py --model DIR --data FILE  a real model on real rows, also on a CPU
    uv run python benchmarks/gpu/rounding.py --dry                    a pico model on a CPU

Random weights of a published shape, random words. A short training to warm up, then for each learning rate one with the
rounding, one without, and one with it again: loss, tokens/s and the most memory of each, one JSON line a training. A real
model is trained in float32, in bfloat16 without and in bfloat16 with the rounding: the first and last loss of each.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path

import bitsandbytes as bnb
import transformers
from campaign import ON_GPU, Bench, Case, cap_memory
from randommodel import SHAPES

from bp_runs import Settings, TrainSpec
from bp_runs.spec import DataSpec, LoraSpec, ModelSpec, RunFolders, TrainingSpec
from bp_train_cuda import CudaRail
from bp_train_cuda.optim import adamw_8bit


def main() -> int:
    """One line a training."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="llama-3.2-3b")
    parser.add_argument("--rates", default="1e-5", help="learning rates, joined by commas")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--cap-gib", type=float, default=15.2, help="torch's allocator gets no more; 0: no cap")
    parser.add_argument("--scratch", type=Path)
    parser.add_argument("--model", type=Path, help="a model's folder; with --data")
    parser.add_argument("--data", type=Path)
    parser.add_argument("--dry", action="store_true")
    options = parser.parse_args()
    if options.model:
        return compare_types(options)
    cap_memory(options.cap_gib)
    transformers.utils.logging.disable_progress_bar()
    optim = "paged_adamw_8bit"  # what auto takes on a GPU, so that a dry run takes it too
    with tempfile.TemporaryDirectory(dir=options.scratch) as scratch:
        bench = Bench(Path(scratch), dry=options.dry or not ON_GPU)
        case = Case(shape=options.shape, mode="full", steps=options.steps)
        for rate in [None, *map(float, options.rates.split(","))]:
            for is_on in [True] if rate is None else [True, False, True]:
                round_stochastically(is_on)
                steps = 2 if rate is None else case.steps
                row = bench.train(case, steps=steps, learning_rate=rate or 1e-5, optim=optim)
                told = ("loss", "tokens_per_second", "tokens_per_second_range", "peak_gib", "reserved_gib", "seconds")
                line = {"rounding": is_on, "rate": rate or "warm", **{name: row[name] for name in told}}
                print(json.dumps(line), flush=True)
    return 0


STOCHASTIC = adamw_8bit.PagedAdamW8bitStochastic


class Nearest(STOCHASTIC):
    """The same optimizer with bitsandbytes' own update, which rounds to nearest."""

    update_step = bnb.optim.PagedAdamW8bit.update_step


def round_stochastically(is_on: bool) -> None:
    """Which of the two the next training takes."""
    adamw_8bit.PagedAdamW8bitStochastic = STOCHASTIC if is_on else Nearest


def compare_types(options: argparse.Namespace) -> int:
    """Three full fine-tuning runs of a real model, on 4 rows of up to 64 tokens a step."""
    for rate in map(float, options.rates.split(",")):
        for name, dtype in (("float32", "float32"), ("nearest", "bfloat16"), ("by chance", "bfloat16")):
            round_stochastically(name != "nearest")
            with tempfile.TemporaryDirectory(dir=options.scratch) as run:
                settings = Settings(
                    model=ModelSpec(name=str(options.model), max_seq_length=64, dtype=dtype),
                    data=DataSpec(path=str(options.data)),
                    lora=LoraSpec(),
                    training=TrainingSpec(
                        mode="full", steps=options.steps, batch_size=4, gradient_accumulation=1, learning_rate=rate,
                        warmup_steps=5, optim="paged_adamw_8bit", eval_share=0.0, save_steps=0, preflight="off",
                    ),
                )  # fmt: skip
                folders = RunFolders(run_id="bench", output=Path(run), run=Path(run))
                outcome = CudaRail().train(
                    TrainSpec.build(settings, folders, options.model), lambda _: None, lambda: False
                )
            losses = {"loss": [round(outcome.first_loss, 3), round(outcome.final_loss, 3)]}
            print(
                json.dumps({"weights": name, "rate": rate, **losses, "seconds": round(outcome.seconds, 1)}), flush=True
            )
    return 0


if __name__ == "__main__":
    sys.exit(main())
