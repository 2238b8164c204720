"""Rounding by chance of all weights in bfloat16: what it costs on a card, and what is lost without it.

    uv run python benchmarks/gpu/rounding.py                          the shape of Llama-3.2-3B as on a 16 GB card
    uv run python benchmarks/gpu/rounding.py --shape llama-3.2-1b --rates 1e-5,1e-4
    uv run python benchmarks/gpu/rounding.py --dry                    a pico model on a CPU

Random weights of a published shape, random words. A short training to warm up, then for each learning rate one with the
rounding, one without, and one with it again: loss, tokens/s and the most memory of each, one JSON line a training.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path

import torch
import transformers
from campaign import GIB, ON_GPU, Bench, Case
from randommodel import SHAPES

from bp_train_cuda import guarded


def main() -> int:
    """One line a training."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="llama-3.2-3b")
    parser.add_argument("--rates", default="1e-5", help="learning rates, joined by commas")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--cap-gib", type=float, default=15.2, help="torch's allocator gets no more; 0: no cap")
    parser.add_argument("--scratch", type=Path)
    parser.add_argument("--dry", action="store_true")
    options = parser.parse_args()
    if ON_GPU and options.cap_gib:
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, options.cap_gib * GIB / total))
    transformers.utils.logging.disable_progress_bar()
    rounds = guarded.round_by_chance
    optim = "paged_adamw_8bit"  # what auto takes on a card, so that a dry run takes it too
    with tempfile.TemporaryDirectory(dir=options.scratch) as scratch:
        bench = Bench(Path(scratch), dry=options.dry or not ON_GPU)
        case = Case(shape=options.shape, mode="full", steps=options.steps)
        for rate in [None, *map(float, options.rates.split(","))]:
            for is_on in [True] if rate is None else [True, False, True]:
                guarded.round_by_chance = rounds if is_on else lambda *_: True
                steps = 2 if rate is None else case.steps
                row = bench.train(case, steps=steps, learning_rate=rate or 1e-5, optim=optim)
                told = ("loss", "tokens_per_second", "tokens_per_second_range", "peak_gib", "reserved_gib", "seconds")
                line = {"rounding": is_on, "rate": rate or "warm", **{name: row[name] for name in told}}
                print(json.dumps(line), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
