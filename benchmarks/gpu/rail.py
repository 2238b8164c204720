"""The CUDA rail on a real GPU, with random weights of a real configuration: does it fit, does it learn, how fast.

    uv run python benchmarks/gpu/rail.py --shape qwen2.5-7b --mode qlora --seq 2048 --steps 8 --cap-gib 16

No download: the model is built from its published shape with random weights, rows are random words. A cap on torch's
allocator stands for a smaller GPU; on a real one the context takes 0.6 to 0.8 GiB more, so aim at 15.2 GiB reserved.
Speed is a ratio to nothing here: compare runs of the same GPU only.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from pathlib import Path

import torch
import transformers
from randommodel import SHAPES, write_model, write_rows

from bp_runs import Settings, TrainSpec
from bp_runs.events import Event, ModelLoaded, Notice, StepDone
from bp_runs.spec import DataSpec, LoraSpec, ModelSpec, RunFolders, TrainingSpec
from bp_train_cuda import CudaRail


def main() -> None:
    """Run once and print one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="qwen2.5-1.5b")
    parser.add_argument("--mode", choices=["auto", "lora", "qlora"], default="auto")
    parser.add_argument("--seq", type=int, default=2048)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--accumulation", type=int, default=1)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--cap-gib", type=float, default=0.0)
    parser.add_argument("--model", type=Path, help="keep the model in this folder, and use it where it is there")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        base = options.model or Path(scratch) / "model"
        if not (base / "config.json").is_file():
            write_model(base, options.shape)
        if options.cap_gib and torch.cuda.is_available():
            total = torch.cuda.get_device_properties(0).total_memory
            torch.cuda.set_per_process_memory_fraction(options.cap_gib * 2**30 / total)
        print(json.dumps(measure(Path(scratch), base, options), indent=2))


def measure(scratch: Path, base: Path, options: argparse.Namespace) -> dict[str, object]:
    """Train and tell."""
    write_rows(scratch / "rows.jsonl", base, 4 * options.batch * options.accumulation, options.seq)
    training = TrainingSpec(
        mode=options.mode,
        steps=options.steps,
        batch_size=options.batch,
        gradient_accumulation=options.accumulation,
        learning_rate=1e-3,
    )
    settings = Settings(
        model=ModelSpec(name=str(base), max_seq_length=options.seq),
        data=DataSpec(path=str(scratch / "rows.jsonl")),
        lora=LoraSpec(r=options.rank),
        training=training,
    )
    run = scratch / "run"
    run.mkdir()
    events: list[Event] = []
    spec = TrainSpec.build(settings, RunFolders(run_id="bench", output=scratch, run=run), base)
    outcome = CudaRail().train(spec, events.append, lambda: False)
    steps = [e for e in events if isinstance(e, StepDone)]
    loaded = next(e for e in events if isinstance(e, ModelLoaded))
    speeds = [e.tokens_per_second for e in steps[2:]] or [0.0]
    gpu = torch.cuda.is_available()
    return {
        "card": torch.cuda.get_device_name(0) if gpu else "none",
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "options": {k: str(v) for k, v in vars(options).items()},
        "notices": [e.message for e in events if isinstance(e, Notice)],
        "mode": loaded.mode,
        "dtype": loaded.dtype,
        "parameters": loaded.parameters,
        "trainable": loaded.trainable,
        "first_loss": outcome.first_loss,
        "final_loss": outcome.final_loss,
        "tokens": outcome.tokens,
        "tokens_per_second_median": round(statistics.median(speeds), 1),
        "tokens_per_second_range": [round(min(speeds), 1), round(max(speeds), 1)],
        "peak_allocated_gib": round(outcome.peak_memory / 2**30, 2),
        "peak_reserved_gib": round(torch.cuda.max_memory_reserved() / 2**30, 2) if gpu else None,
        "adapter_bytes": (outcome.adapter / "adapter_model.safetensors").stat().st_size,
    }


if __name__ == "__main__":
    main()
