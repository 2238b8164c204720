"""Mixtures of experts under QLoRA: peak memory and tokens/s of published shapes against the estimate.

    uv run python benchmarks/gpu/experts.py                                  # gpt-oss-20b and Qwen3-30B-A3B
    uv run python benchmarks/gpu/experts.py --shapes gpt-oss-20b --layers 12 # half of it, on a smaller disk
    uv run python benchmarks/gpu/experts.py --dry                            # pico models on a CPU

Each shape is written once with random weights and trained twice: with an adapter on the attention alone, and on experts
and routers as well. Experts are parameters, which a 4-bit base leaves in 16 bits. One JSON object a run.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import tempfile
from dataclasses import replace
from pathlib import Path

import torch
from randommodel import SHAPES, write_model, write_rows

from bp_data.loop.shapes import read_shapes
from bp_runs import Settings, TrainSpec
from bp_runs.events import Event, ModelLoaded, StepDone
from bp_runs.spec import DataSpec, LoraSpec, ModelSpec, RunFolders, TrainingSpec
from bp_train_cuda import CudaRail
from bp_train_cuda.memory.estimate import estimate, read_load

PUBLISHED, PICO = ("gpt-oss-20b", "qwen3-30b-a3b"), ("pico-gpt-oss", "pico-moe")
TARGETS = ("q_proj,k_proj,v_proj,o_proj", "q_proj,k_proj,v_proj,o_proj,experts,router")


def main() -> None:
    """Run all shapes and targets."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=PUBLISHED)
    parser.add_argument("--layers", type=int, help="instead of the shape's")
    parser.add_argument("--seq", type=int, default=2048)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--scratch", type=Path, help="a folder with room for a model: 42 or 61 GB")
    parser.add_argument("--dry", action="store_true")
    options = parser.parse_args()
    for shape in PICO if options.dry else options.shapes:
        with tempfile.TemporaryDirectory(dir=options.scratch) as scratch:
            changes = {"num_hidden_layers": options.layers} if options.layers else {}
            base = write_model(Path(scratch) / "model", shape, **changes)
            for targets in TARGETS:
                print(json.dumps(measure(Path(scratch), base, shape, targets, options)), flush=True)


def measure(scratch: Path, base: Path, shape: str, targets: str, options: argparse.Namespace) -> dict[str, object]:
    """Train a few steps; memory in GiB."""
    gpu = torch.cuda.is_available()
    rows = write_rows(scratch / "rows.jsonl", base, 8, 128 if options.dry else options.seq)
    settings = Settings(
        model=ModelSpec(name=str(base), max_seq_length=128 if options.dry else options.seq),
        data=DataSpec(path=str(rows)),
        lora=LoraSpec(r=options.rank, target_modules=targets),
        training=TrainingSpec(
            mode="qlora" if gpu else "lora",
            steps=options.steps,
            batch_size=1,
            gradient_accumulation=1,
            learning_rate=1e-4,
            packing=False,
        ),
    )
    run = scratch / "run"
    shutil.rmtree(run, ignore_errors=True)
    run.mkdir()
    events: list[Event] = []
    spec = TrainSpec.build(settings, RunFolders(run_id="bench", output=scratch, run=run), base)
    if gpu:
        torch.cuda.reset_peak_memory_stats()
    outcome = CudaRail().train(spec, events.append, lambda: False)
    loaded = next(event for event in events if isinstance(event, ModelLoaded))
    speeds = [event.tokens_per_second for event in events if isinstance(event, StepDone)][2:] or [0.0]
    config = json.loads((base / "config.json").read_text())
    shapes, load = read_shapes(config), read_load(settings, settings.training.mode)
    expected = estimate(shapes, load)
    least = sum(expected.parts.values())
    # With memory to spare, every layer keeps its activations.
    used = sum(estimate(shapes, replace(load, checkpointing=False)).parts.values())
    return {
        "shape": shape,
        "layers": config["num_hidden_layers"],
        "targets": targets,
        "mode": loaded.mode,
        "parameters": loaded.parameters,
        "trainable": loaded.trainable,
        "estimated_trainable": expected.trained,
        "tokens_per_second": round(statistics.median(speeds), 1),
        "peak_allocated": round(outcome.peak_memory / 2**30, 2),
        "estimated_least": round(least / 2**30, 2),
        "estimated": round(used / 2**30, 2),
        "estimated_over_measured": round(used / outcome.peak_memory, 3) if outcome.peak_memory else None,
        "parts": {name: round(value / 2**30, 2) for name, value in expected.parts.items()},
        "card": torch.cuda.get_device_name(0) if gpu else "none",
    }


if __name__ == "__main__":
    main()
