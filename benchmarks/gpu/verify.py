"""Runs that must agree on a GPU: fast paths with plain ones, killed with whole ones, packed, and engine trl.

    uv run python benchmarks/gpu/verify.py            a 0.5B model, two minutes
    uv run python benchmarks/gpu/verify.py --dry      the same course on a CPU with a pico model

Prints a JSON object a line. ``curves`` compares the losses of a run that uses every fast path with one that uses none:
PEFT's own products, padded rows, every layer recomputed, micro-batches as set.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

os.environ |= {"HF_HUB_OFFLINE": "1", "CUBLAS_WORKSPACE_CONFIG": ":4096:8"}

import torch
from randommodel import WORDS, write_model
from safetensors.torch import load_file

from bp_runs import Settings, TrainSpec
from bp_runs.checkpoint_store import CheckpointFolder
from bp_runs.errors import CodedError
from bp_runs.events import Event, Notice, StepDone
from bp_runs.spec import DataSpec, LoraSpec, ModelSpec, RunFolders, TrainingSpec
from bp_train_cuda import CudaRail
from bp_train_cuda.engines import native
from bp_train_cuda.memory import estimate


class KilledError(Exception):
    """Ends a run as a kill would."""


class Scene:
    """A model, rows of many lengths, and runs on them."""

    def __init__(self, folder: Path, *, dry: bool) -> None:
        self.folder, self.dry, self.count = folder, dry, 0
        self.base = write_model(folder / "base", "pico" if dry else "qwen2.5-0.5b")
        self.rows, draw = folder / "rows.jsonl", random.Random(0)
        texts = [" ".join(draw.choice(WORDS.split()) for _ in range(draw.randrange(5, 120))) for _ in range(96)]
        turns = [[{"role": "user", "content": "Go on."}, {"role": "assistant", "content": text}] for text in texts]
        self.rows.write_text("\n".join(json.dumps({"messages": one}) for one in turns))

    def spec(self, r: int = 16, **training: Any) -> TrainSpec:
        self.count += 1
        run = self.folder / f"run-{self.count}"
        run.mkdir()
        common = {"mode": "lora" if self.dry else "qlora", "batch_size": 2, "gradient_accumulation": 4}
        common |= {"eval_share": 0.0, "save_steps": 0, "preflight": "off", "learning_rate": 2e-4, "warmup_steps": 5}
        settings = Settings(
            model=ModelSpec(name=str(self.base), max_seq_length=512, dtype="bfloat16" if r > 16 else "auto"),
            data=DataSpec(path=str(self.rows)),
            lora=LoraSpec(r=r),
            training=TrainingSpec(**common | training),
        )
        return TrainSpec.build(settings, RunFolders(run_id="bench", output=run, run=run), self.base)


def train(spec: TrainSpec, kill_at: int | None = None) -> tuple[list[float], list[str], dict[str, torch.Tensor]]:
    """Losses, notices and the adapter's weights."""
    losses, notes = [], []

    def hear(event: Event) -> None:
        if isinstance(event, StepDone):
            losses.append(event.loss)
            if event.step == kill_at:
                raise KilledError
        elif isinstance(event, Notice):
            notes.append(event.message)

    try:
        outcome = CudaRail().train(spec, hear, lambda: False)
    except KilledError:
        return losses, notes, {}
    return losses, notes, load_file(outcome.adapter / "adapter_model.safetensors")


def curves(scene: Scene) -> dict[str, Any]:
    """A hundred steps with every fast path, and with none."""
    steps = 20 if scene.dry else 100
    fast, notes, _ = train(scene.spec(steps=steps))
    names = {"use_fast_lora": lambda _: 0, "use_varlen": lambda _: None}
    before = {name: getattr(native, name) for name in names}
    plan = native.planner.plan_activations
    for name, value in names.items():
        setattr(native, name, value)
    native.planner.plan_activations = lambda *_: None
    try:
        plain, _, _ = train(scene.spec(steps=steps))
    finally:
        for name, value in before.items():
            setattr(native, name, value)
        native.planner.plan_activations = plan
    off = [abs(a - b) for a, b in zip(fast, plain, strict=True)]
    return {"largest": max(off), "mean": sum(off) / len(off), "ends": [fast[0], fast[-1], plain[-1]], "notes": notes}


def ranks(scene: Scene) -> dict[str, Any]:
    """A hundred steps at r=256: a bfloat16 adapter with stochastic rounding, a float32 one, and that one drawn again."""
    change = {"steps": 20 if scene.dry else 100, "optim": "adamw_8bit"}
    limit = estimate.HIGH_RANK
    runs = {}
    for name, least, seed in (("bfloat16", 64, 42), ("float32", 2**20, 42), ("other seed", 2**20, 43)):
        estimate.HIGH_RANK = least
        try:
            runs[name] = train(scene.spec(r=256, seed=seed, **change))
        finally:
            estimate.HIGH_RANK = limit
    off = [abs(a - b) for a, b in zip(runs["bfloat16"][0], runs["float32"][0], strict=True)]
    kinds = {name: str(next(iter(run[2].values())).dtype) for name, run in runs.items()}
    tail = {name: sum(run[0][-10:]) / 10 for name, run in runs.items()}
    return {"largest": max(off), "mean": sum(off) / len(off), "mean_of_last_10": tail, "dtypes": kinds}


def killed(scene: Scene) -> dict[str, Any]:
    """Twelve steps; and five, a kill after the seventh, and the rest."""
    change = {"steps": 12, "save_steps": 5, "deterministic": True}
    whole, _, expected = train(scene.spec(**change))
    spec = scene.spec(**change)
    train(spec, kill_at=7)
    newest = CheckpointFolder(spec.folders.run).newest_whole()[0]
    rest, _, found = train(replace(spec, checkpoint=newest.path))
    off = max(float((found[name].float() - expected[name].float()).abs().max()) for name in expected)
    return {"resumed_after": newest.step, "weights_off": off, "losses_equal": rest == whole[newest.step :]}


def packed(scene: Scene) -> dict[str, Any]:
    """Packing learns what it is given."""
    losses, notes, _ = train(scene.spec(steps=20, packing=True))
    return {"losses": [losses[0], losses[-1]], "learns": losses[-1] < losses[0], "notes": notes[-1:]}


def engine_trl(scene: Scene) -> dict[str, Any]:
    """Engine trl against native, the same five steps."""
    native_losses, _, _ = train(scene.spec(steps=5))
    losses, _, _ = train(scene.spec(steps=5, engine="trl"))
    return {"trl": losses, "native": native_losses}


def main() -> int:
    """One line a part."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--parts", default="killed,packed,ranks,curves", help="also engine_trl, from transformers 5.19 on"
    )
    parser.add_argument("--dry", action="store_true")
    options = parser.parse_args()
    failed = False
    with tempfile.TemporaryDirectory() as folder:
        scene = Scene(Path(folder), dry=options.dry or not torch.cuda.is_available())
        parts: tuple[Callable[[Scene], dict[str, Any]], ...] = (killed, packed, ranks, curves, engine_trl)
        for part in [one for one in parts if one.__name__ in options.parts.split(",")]:
            begun = time.perf_counter()
            try:
                row = part(scene)
            except (CodedError, RuntimeError, ValueError) as error:
                row, failed = {"failed": f"{type(error).__name__}: {error}"[:400]}, True
            print(
                json.dumps({"part": part.__name__, **row, "seconds": round(time.perf_counter() - begun, 1)}), flush=True
            )
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
