"""The MLX rail on mlx's CUDA build, next to the CUDA rail: same examples, same initial adapter, one loss curve.

    uv run python benchmarks/gpu/mlx_rail.py                                     SmolLM2-135M and a 1.5B shape, 100 steps
    uv run python benchmarks/gpu/mlx_rail.py --shapes pico --steps 6 --dry       the same on a CPU

Each rail trains in a process of its own, one after the other: LoRA of rank 16, bfloat16 (float32 with ``--dry``), rows of
512 tokens, 4 at a time. Weights are random. Before all else it prints whether mlx sees the GPU, and a product of it.
Prints one JSON object a line: ``run`` for each rail and shape, and ``compare``: the largest difference of losses at a
step, and tokens/s of MLX over CUDA.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from bp_runs import Settings, TrainSpec
from bp_runs.events import Event, Notice, StepDone
from bp_runs.spec import DataSpec, LoraSpec, ModelSpec, RunFolders, TrainingSpec

SEQ, BATCH = 512, 4


def train_once(rail: str, folder: Path, start: Path | None, steps: int, dtype: Any) -> dict[str, Any]:
    """One run in this process."""
    if rail == "mlx":
        from bp_train_mlx import MlxRail as Rail
    else:
        from bp_train_cuda import CudaRail as Rail  # type: ignore[assignment]
    run = folder / f"{rail}-{steps}"
    run.mkdir()
    settings = Settings(
        model=ModelSpec(name=str(folder / "model"), max_seq_length=SEQ, dtype=dtype),
        data=DataSpec(path=str(folder / "rows.jsonl")),
        lora=LoraSpec(r=16),
        training=TrainingSpec(
            mode="lora", steps=steps, batch_size=BATCH, gradient_accumulation=1, save_steps=0, save_minutes=0.0,
            learning_rate=1e-9 if start is None else 2e-4, eval_share=0.0, preflight="off",
        ),
    )  # fmt: skip
    spec = TrainSpec.build(
        settings, RunFolders(run_id=rail, output=folder, run=run), folder / "model", initial_adapter=start
    )
    events: list[Event] = []
    outcome = Rail().train(spec, events.append, lambda: False)
    done = [e for e in events if isinstance(e, StepDone)]
    expected = 0
    if rail == "mlx":
        expected = Rail().estimate(settings, json.loads((folder / "model" / "config.json").read_text())).in_use
    return {
        "estimated_gib": expected / 2**30,
        "rail": rail,
        "adapter": str(outcome.adapter),
        "losses": [e.loss for e in done],
        "tokens_per_second": statistics.median([e.tokens_per_second for e in done[5:]] or [0.0]),
        "peak_gib": outcome.peak_memory / 2**30,
        "notices": [e.message for e in events if isinstance(e, Notice)],
    }


def show_mlx(side: int) -> None:
    """Whether mlx computes on the GPU; a CPU would take an hour for a large product."""
    import mlx.core as mx

    one = mx.random.normal((side, side)).astype(mx.bfloat16)
    mx.eval(one @ one)
    began = time.perf_counter()
    for _ in range(10):
        mx.eval(one @ one)
    rate = 10 * 2 * side**3 / (time.perf_counter() - began) / 1e12
    found = {"device": dict(mx.device_info()), "cuda": mx.cuda.is_available(), "tflops": round(rate, 1)}
    print(json.dumps({"part": "mlx", **found}, default=str), flush=True)


def run_child(rail: str, folder: Path, start: Path | None, steps: int, dtype: str) -> dict[str, Any]:
    """One run in a process of its own."""
    command = [sys.executable, __file__, "--child", rail, str(folder), str(start or ""), str(steps), dtype]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        print(json.dumps({"part": "run", "rail": rail, "failed": done.stderr[-1500:]}), flush=True)
        raise SystemExit(1)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def compare(shape: str, steps: int, dtype: str) -> None:
    """Both rails on one shape."""
    from randommodel import write_model, write_rows

    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        write_model(folder / "model", shape)
        write_rows(folder / "rows.jsonl", folder / "model", 4 * BATCH, SEQ)
        start = Path(run_child("mlx", folder, None, 1, dtype)["adapter"])
        found = {}
        for rail in ("mlx", "cuda"):
            found[rail] = run_child(rail, folder, start, steps, dtype)
            shown = {**found[rail], "losses": found[rail]["losses"][::10], "last": found[rail]["losses"][-1]}
            print(json.dumps({"part": "run", "shape": shape, **shown}), flush=True)
        pairs = list(zip(found["mlx"]["losses"], found["cuda"]["losses"], strict=True))
        result = {
            "first_difference": abs(pairs[0][0] - pairs[0][1]),
            "largest_difference": max(abs(a - b) for a, b in pairs),
            "speed_ratio": found["mlx"]["tokens_per_second"] / found["cuda"]["tokens_per_second"],
        }
        print(json.dumps({"part": "compare", "shape": shape, "steps": steps, **result}), flush=True)


def main() -> None:
    if sys.argv[1:2] == ["--child"]:
        rail, folder, start, steps, dtype = sys.argv[2:]
        print(json.dumps(train_once(rail, Path(folder), Path(start) if start else None, int(steps), dtype)))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", default="smollm2-135m,qwen2.5-1.5b")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--dry", action="store_true", help="float32, on whatever there is")
    given = parser.parse_args()
    show_mlx(256 if given.dry else 8192)
    for shape in given.shapes.split(","):
        compare(shape, given.steps, "float32" if given.dry else "bfloat16")


if __name__ == "__main__":
    main()
