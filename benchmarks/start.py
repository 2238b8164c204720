"""Start-up times as ratios to `python -c pass`, measured in turn in one run.

    uv run python benchmarks/start.py [--runs 9] [--json]

Cases: `backprop --help`, `import backpropagate`, `import cyclopts` (what a help page costs at least), and
`backprop list-runs` and `show-run` in the folder of 10,000 recorded runs that `runs.py` writes.
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

from runs import fill


def measure(cases: dict[str, list[str]], runs: int) -> dict[str, list[float]]:
    """Seconds of each case, the cases taking turns so that a slow minute hits all of them."""
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    for turn in range(runs + 1):
        for name, command in cases.items():
            began = time.perf_counter()
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            if turn:  # the first turn warms the caches
                seconds[name].append(time.perf_counter() - began)
    return seconds


def main() -> None:
    """Measure and print a table, or JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=9)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "output"
        run_id = fill(output)
        python, backprop = [sys.executable, "-c"], [str(Path(sys.executable).with_name("backprop"))]
        cases = {
            "python -c pass": [*python, "pass"],
            "import cyclopts": [*python, "import cyclopts"],
            "import backpropagate": [*python, "import backpropagate"],
            "backprop --help": [*backprop, "--help"],
            "list-runs, 10,000 runs": [*backprop, "list-runs", "--output", str(output)],
            "show-run, 10,000 runs": [*backprop, "show-run", run_id, "--output", str(output)],
        }
        seconds = measure(cases, options.runs)
    base = statistics.median(seconds["python -c pass"])
    rows = {
        name: {
            "median_ms": round(1000 * statistics.median(values), 1),
            "min_ms": round(1000 * min(values), 1),
            "max_ms": round(1000 * max(values), 1),
            "ratio": round(statistics.median(values) / base, 1),
        }
        for name, values in seconds.items()
    }
    if options.json:
        print(json.dumps(rows, indent=2))
        return
    print("| case | median ms | min–max ms | × python -c pass |\n| --- | --- | --- | --- |")
    for name, row in rows.items():
        print(f"| {name} | {row['median_ms']} | {row['min_ms']}–{row['max_ms']} | {row['ratio']} |")


if __name__ == "__main__":
    main()
