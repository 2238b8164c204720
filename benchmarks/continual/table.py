"""The stream's results as tables: mean ± sample SD over seeds and orders, and paired differences.

python benchmarks/continual/table.py results/*.json
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np

SCORES = {"free": 0, "ranked": 1}
ARMS = {
    "seq": "seq", "replay": "replay", "joint": "joint", "ema": "seq", "ftba_mb": "seq", "slao": "slao",
    "slao_preserving": "slao_preserving", "slao_merged_b": "slao_merged_b", "olora": "olora", "mean": "independent",
    "cat": "independent", "ties_20": "independent", "ties_50": "independent", "magmax": "seq",
}  # fmt: skip
"""Arms of the stream, each with the chain of training runs whose adapters it ships or merges."""
PAIRS = (("ftba_mb", "slao"), ("slao_preserving", "slao"), ("slao_preserving", "ftba_mb"))
"""Arms to compare run by run, next to each arm with seq."""


def measures(result: dict, arm: str, score: int) -> dict[str, float]:
    """Of one run: R[i][j] is the score on task j after task i, both in the run's order."""
    r = np.array(result["R"][arm])[:, :, score]
    count = len(r)
    diagonal = np.diagonal(r)
    last = r[-1]
    found = {"AA": last.mean(), "BWT": (last - diagonal)[:-1].mean(), "LA": diagonal.mean()}
    found["forgetting"] = np.mean([r[j:-1, j].max() - last[j] for j in range(count - 1)])
    chain = ARMS[arm]
    if chain in result["before_merge"]:
        before = np.array(result["before_merge"][chain])[:, :, score]
        found["merge cost"] = (np.diagonal(before) - diagonal).mean()
    return found


def spread(values: list[float]) -> str:
    sd = np.std(values, ddof=1) if len(values) > 1 else float("nan")
    return f"{100 * np.mean(values):.1f} ± {100 * sd:.1f}"


def build_table(results: list[dict], score: str) -> str:
    """Markdown: one row an arm, in per cent."""
    names = ("AA", "BWT", "forgetting", "LA", "merge cost")
    head = f"| {score} | {' | '.join(names)} | AA - seq | in SDs |\n|{' --- |' * (len(names) + 3)}"
    place = SCORES[score]
    seq = [measures(result, "seq", place)["AA"] for result in results]
    zero = spread([float(np.array(result["zero_shot"])[:, place].mean()) for result in results])
    lines = [head, f"| zero-shot | {zero} |{' |' * (len(names) + 1)}"]
    for arm in results[0]["R"]:
        found = [measures(result, arm, place) for result in results]
        cells = [spread([f[n] for f in found]) if n in found[0] else "" for n in names]
        paired = [f["AA"] - s for f, s in zip(found, seq, strict=True)]
        sd = np.std(paired, ddof=1) if len(paired) > 1 else 0.0
        cells += ["", ""] if arm == "seq" else [spread(paired), f"{np.mean(paired) / sd:+.1f}" if sd else ""]
        lines.append(f"| {arm} | {' | '.join(cells)} |")
    return "\n".join(lines)


def build_pairs(results: list[dict], score: str) -> str:
    """One line for each of `PAIRS` that the runs hold: the differences of AA, run by run, in points."""
    lines = []
    for one, other in PAIRS:
        if {one, other} <= results[0]["R"].keys():
            found = [measures(r, one, SCORES[score])["AA"] - measures(r, other, SCORES[score])["AA"] for r in results]
            lines.append(f"{score}: {one} - {other}: {spread(found)}: {', '.join(f'{100 * d:.1f}' for d in found)}")
    return "\n".join(lines)


def learning_accuracy(result: dict) -> float:
    """Of seq, free: what the learning rate is chosen by."""
    return measures(result, "seq", SCORES["free"])["LA"]


def main() -> None:
    results = [json.loads(Path(name).read_text()) for name in sys.argv[1:]]
    first = results[0]
    print(f"{len(results)} runs on {first['machine']}, torch {first['torch']}: {first['options']}\n")
    for score in SCORES:
        print(build_table(results, score), build_pairs(results, score), sep="\n\n", end="\n\n")
    for order in sorted({r["options"]["order"] for r in results}):
        some = [r for r in results if r["options"]["order"] == order]
        print(f"order {order}: {', '.join(some[0]['tasks'])}; AA (free)", end="")
        for arm in [name for name in ("seq", "slao", "ftba_mb", "joint") if name in some[0]["R"]]:
            print(f"  {arm} {spread([measures(r, arm, 0)['AA'] for r in some])}", end="")
        print()


if __name__ == "__main__":
    main()
