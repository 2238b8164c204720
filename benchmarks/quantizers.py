"""Weights a second of each quantizer on one core, side by side in one run, and what a second core brings.

    uv run python benchmarks/quantizers.py [--rounds 5] [--json]

CPU seconds decide the speeds; the ratio for two cores is of wall times, so it means something only where both are idle. Each round runs everything once; medians.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from bp_export.quant import kernels
from bp_export.quant.kernels import TensorType, quantize_rows
from bp_merge import decode, encode, product

KINDS = (TensorType.Q4_K, TensorType.Q5_K, TensorType.Q6_K, TensorType.Q8_0)
ROWS = (np.random.default_rng(0).standard_normal((512, 2048), np.float32) * np.float32(0.02)).astype(np.float32)


def time_cpu(work: Callable[[], object], weights: int) -> float:
    """Million weights a CPU second."""
    begun = time.process_time()
    work()
    return weights / (time.process_time() - begun) / 1e6


def time_threads(kind: TensorType, threads: int, pieces: int = 96) -> float:
    """Wall seconds of so many pieces."""
    with ThreadPoolExecutor(threads) as pool:
        begun = time.perf_counter()
        list(pool.map(lambda _: quantize_rows(ROWS, kind), range(pieces)))
        return time.perf_counter() - begun


def fold(target: int | None) -> np.ndarray:
    """One chunk of rank 16, decoded, added to and rounded; None for NumPy."""
    b, a = ROWS[:, :16], ROWS[:16]
    raw = np.frombuffer(encode(ROWS, "BF16"), np.uint8)
    rows, best = product.ROWS, product.BEST
    product.ROWS, product.BEST = (None if target is None else rows), (best if target is None else target)
    try:
        found = product.add_in_order(raw, "BF16", b, a, 2.0)
        if found is None:
            found = decode(raw, "BF16").reshape(ROWS.shape) + product.multiply_in_order(b, a) * np.float32(2)
        return found
    finally:
        product.ROWS, product.BEST = rows, best


def run_round() -> dict[str, dict[str, float]]:
    """Everything once."""
    found: dict[str, dict[str, float]] = {}
    for kind in KINDS:
        speeds = {
            engine: time_cpu(lambda kind=kind, engine=engine: quantize_rows(ROWS, kind, engine=engine), ROWS.size)
            for engine in ("ggml", "numpy")
        }
        for i, name in enumerate(kernels.TARGETS):
            speeds[name] = time_cpu(lambda kind=kind, i=i: kernels.quantize_compiled(ROWS, kind, i), ROWS.size)
        found[kind.name] = speeds
        found[f"{kind.name} two cores"] = {"ratio": time_threads(kind, 1) / time_threads(kind, 2)}
    targets = product.ROWS.TARGETS if product.ROWS else ()
    found["fold r 16"] = {"numpy": time_cpu(lambda: fold(None), ROWS.size)}
    for index, name in enumerate(targets):
        found["fold r 16"][name] = time_cpu(lambda index=index: fold(index), ROWS.size)
    return found


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    rounds = [run_round() for _ in range(options.rounds)]
    found = {
        name: {key: statistics.median(each[name][key] for each in rounds) for key in rounds[0][name]}
        for name in rounds[0]
    }
    if options.json:
        print(json.dumps({"rounds": rounds, "medians": found}))
    else:
        for name, values in found.items():
            print(f"{name:<16}" + "".join(f"{key:>9} {value:8.1f}" for key, value in values.items()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
