"""The whole stream benchmark on one GPU: a grid of learning rates, then three seeds in two orders, side by side.

    python benchmarks/continual/run_all.py --data stream.npz --model model.pack [--out FOLDER] [--seeds 3]
        [--rates 5e-4 …] [any of stream.py]

The rate is the one with which sequential LoRA learns each task best (its mean R[j][j], seed 0, order 1), the same for
every arm, so that none is favored. Prints the tables, and what SLAO and seq reach over the grid. With ``--rates``
nothing is chosen: all seeds and orders at each of them, one rate after the other.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

from table import SCORES, build_pairs, build_table, learning_accuracy, measures

RESULTS = Path(__file__).parents[1] / "results" / "continual"
GRID = (5e-4, 1e-3, 2e-3)
GRID_COLUMNS = (("seq", "LA"), ("seq", "AA"), ("slao", "AA"), ("ftba_mb", "AA"), ("joint", "AA"))


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


def choose_rate(options: argparse.Namespace, rest: list[str]) -> tuple[float, dict]:
    """The grid's rate with the highest learning accuracy, and its run."""
    grid = finish([start(options, rest, seed=0, order=1, lr=lr) for lr in GRID])
    known = [(arm, name) for arm, name in GRID_COLUMNS if arm in grid[0]["R"]]
    print("\n| learning rate | " + " | ".join(f"{name} {arm}" for arm, name in known))
    print("| --- |" + " --- |" * len(known))
    for lr, result in zip(GRID, grid, strict=True):
        cells = [f"{100 * measures(result, arm, 0)[name]:.1f}" for arm, name in known]
        print(f"| {lr:g} | {' | '.join(cells)} |")
    best = max(range(len(GRID)), key=lambda place: learning_accuracy(grid[place]))
    print(f"\nchosen: {GRID[best]:g}\n", flush=True)
    return GRID[best], grid[best]


def tell(results: list[dict]) -> None:
    for score in SCORES:
        print(build_table(results, score), build_pairs(results, score), sep="\n\n", end="\n\n", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the raw JSON; commit it with the log")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rates", type=float, nargs="+", default=[], help="learning rates; default: chosen by a grid")
    options, rest = parser.parse_known_args()
    options.out.mkdir(parents=True, exist_ok=True)
    runs = [(seed, order) for seed in range(options.seeds) for order in (1, 2)]
    for lr in options.rates:
        print(f"learning rate {lr:g}", flush=True)
        tell(finish([start(options, rest, seed=s, order=o, lr=lr) for s, o in runs]))
    if not options.rates:
        lr, first = choose_rate(options, rest)
        tell([first, *finish([start(options, rest, seed=s, order=o, lr=lr) for s, o in runs[1:]])])


if __name__ == "__main__":
    main()
