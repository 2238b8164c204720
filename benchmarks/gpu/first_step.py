"""Seconds from the start of a process to the end of its first step, and where they go.

    uv run python benchmarks/gpu/first_step.py --models DIR                    7B qlora, three processes after one to warm up
    uv run python benchmarks/gpu/first_step.py --shape qwen2.5-0.5b --runs 2
    uv run python benchmarks/gpu/first_step.py --dry                           a pico model on a CPU

Each process trains one step of 2 × 4 examples of 2,048 tokens through `CudaRail`, nothing else running. The first one
fills the page cache and compiles Triton's kernels. Prints one JSON object a process: when each event came, in seconds
since the process was started; ``--imports`` lists the slowest imports of one more process.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ |= {"HF_HUB_OFFLINE": "1"}


def main() -> int:
    """Start the processes one after another."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="qwen2.5-7b")
    parser.add_argument("--models", type=Path, help="keep the model here, and use it where it is there")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--imports", action="store_true")
    parser.add_argument("--dry", action="store_true")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        return train_once(Path(options.child[0]), float(options.child[1]), dry=options.dry)
    with tempfile.TemporaryDirectory() as folder:
        base = (options.models or Path(folder)) / ("pico" if options.dry else options.shape)
        write_inputs(base, 128 if options.dry else 2048)
        for number in range(options.runs + 1):
            row = start(base, options, [])
            print(json.dumps({"run": number, "warm": number > 0, **row}), flush=True)
        if options.imports:
            start(base, options, ["-X", "importtime"])
    return 0


def write_inputs(base: Path, tokens: int) -> None:
    from randommodel import write_model, write_rows

    if not (base / "config.json").is_file():
        write_model(base, base.name)
    write_rows(base / "first.jsonl", base, 16, tokens)


def start(base: Path, options: argparse.Namespace, flags: list[str]) -> dict[str, Any]:
    """One process; its times, or the slowest imports."""
    command = [sys.executable, *flags, __file__, *(["--dry"] if options.dry else []), "--child", str(base)]
    done = subprocess.run([*command, repr(time.time())], capture_output=True, text=True, check=False)
    if flags:
        rows = [line[12:].split("|") for line in done.stderr.splitlines() if line.startswith("import time:")][1:]
        for own, both, name in sorted(rows, key=lambda row: -int(row[1]))[:40]:
            print(f"{int(both) / 1e6:7.2f} s {int(own) / 1e6:7.2f} s {name.strip()}", flush=True)
        return {}
    if done.returncode:
        return {"failed": done.stderr[-1500:]}
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def train_once(base: Path, begun: float, *, dry: bool) -> int:
    """One step; prints when what was done."""
    times: dict[str, float] = {}

    def note(name: str) -> None:
        times.setdefault(name, round(time.time() - begun, 2))

    note("python")
    from bp_runs import Settings, TrainSpec
    from bp_runs.spec import DataSpec, LoraSpec, ModelSpec, RunFolders, TrainingSpec
    from bp_train_cuda import CudaRail

    training = TrainingSpec(
        mode="lora" if dry else "qlora", steps=1, batch_size=2, gradient_accumulation=4, eval_share=0.0, save_steps=0
    )
    settings = Settings(
        model=ModelSpec(name=str(base), max_seq_length=128 if dry else 2048),
        data=DataSpec(path=str(base / "first.jsonl")),
        lora=LoraSpec(r=16),
        training=training,
    )
    with tempfile.TemporaryDirectory() as folder:
        spec = TrainSpec.build(settings, RunFolders(run_id="bench", output=Path(folder), run=Path(folder)), base)

        def hear(event: Any) -> None:
            note(type(event).__name__ + (f": {event.message[:40]}" if type(event).__name__ == "Notice" else ""))

        CudaRail().train(spec, hear, lambda: False)
    note("end")
    print(json.dumps(times))
    return 0


if __name__ == "__main__":
    sys.exit(main())
