"""The whole stream benchmark on one GPU: a grid of learning rates, then three seeds in two orders, side by side.

    python benchmarks/continual/run_all.py --data stream.npz --model model.pack --out FOLDER [--seeds 3] [any of stream.py]

The rate is the one with which sequential LoRA learns each task best (its mean R[j][j], seed 0, order 1), the same for
every arm, so that none is favoured. Prints the tables, and what SLAO and seq reach over the grid.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

from table import build_table, learning_accuracy, measures

GRID = (5e-4, 1e-3, 2e-3)


def start(
    options: argparse.Namespace, rest: list[str], *, seed: int, order: int, lr: float
) -> tuple[Path, subprocess.Popen]:
    out = options.out / f"lr{lr:g}-seed{seed}-order{order}.json"
    script = Path(__file__).with_name("stream.py")
    command = [
        sys.executable,
        str(script),
        "--data",
        str(options.data),
        "--model",
        str(options.model),
        "--out",
        str(out),
    ]
    command += ["--seed", str(seed), "--order", str(order), "--lr", str(lr), *rest]
    threads = {"OMP_NUM_THREADS": "2", "OPENBLAS_NUM_THREADS": "2", "MKL_NUM_THREADS": "2"}
    log = out.with_suffix(".log").open("w")
    return out, subprocess.Popen(command, env={**os.environ, **threads}, stdout=log, stderr=subprocess.STDOUT)


def finish(started: list[tuple[Path, subprocess.Popen]]) -> list[dict]:
    found = []
    for out, process in started:
        if process.wait():
            sys.exit(f"{out.name} failed:\n{out.with_suffix('.log').read_text()[-3000:]}")
        found.append(json.loads(out.read_text()))
        print(f"{out.name}: {found[-1]['seconds']:.0f} s, {found[-1]['train_seconds']:.0f} s of training", flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=3)
    options, rest = parser.parse_known_args()
    options.out.mkdir(parents=True, exist_ok=True)
    grid = finish([start(options, rest, seed=0, order=1, lr=lr) for lr in GRID])
    best = max(range(len(GRID)), key=lambda place: learning_accuracy(grid[place]))
    print(
        "\n| learning rate | LA seq | AA seq | AA slao | AA slao_no_qr | AA joint |\n| --- | --- | --- | --- | --- | --- |"
    )
    for lr, result in zip(GRID, grid, strict=True):
        cells = [
            100 * measures(result, arm, 0)[name]
            for arm, name in (("seq", "LA"), ("seq", "AA"), ("slao", "AA"), ("slao_no_qr", "AA"), ("joint", "AA"))
        ]
        print(f"| {lr:g} | " + " | ".join(f"{cell:.1f}" for cell in cells) + " |")
    print(f"\nchosen: {GRID[best]:g}\n", flush=True)
    others = [(s, o) for s in range(options.seeds) for o in (1, 2) if (s, o) != (0, 1)]
    results = [grid[best], *finish([start(options, rest, seed=s, order=o, lr=GRID[best]) for s, o in others])]
    for score in ("free", "ranked"):
        print(build_table(results, score), end="\n\n", flush=True)


if __name__ == "__main__":
    main()
