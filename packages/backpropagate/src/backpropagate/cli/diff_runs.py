"""`backprop diff-runs`."""

from __future__ import annotations

from typing import Any

from backpropagate.cli.flags import Json, Output, output_folder
from backpropagate.cli.output import print_json
from bp_runs.diff import Pair, RunDiff
from bp_runs.diff import diff_runs as compare
from bp_runs.evaluations import read_evaluations
from bp_runs.store import RunStore


def diff_runs(run: str, other: str, *, output: Output = None, json: Json = False) -> int:
    """Show what is different between two runs: settings, data, model, versions, and how the loss went.

    Parameters
    ----------
    run: str
        The one run's id, or a part of it.
    other: str
        The other run's id, or a part of it.
    """
    store = RunStore(output_folder(output))
    one, two = store.load(run), store.load(other)
    evaluations = (read_evaluations(store.folder(one.run_id)), read_evaluations(store.folder(two.run_id)))
    found = compare(one, two, store.read_metrics(one.run_id), store.read_metrics(two.run_id), evaluations)
    if json:
        print_json("diff-runs", found.to_dict())
    else:
        print("\n".join(_lines(found)))  # noqa: T201
    return 0


def _lines(found: RunDiff) -> list[str]:
    lines = [f"{'':24}  {found.runs[0]:>22}  {found.runs[1]:>22}", _line("status", found.status)]
    groups = (
        ("settings", found.settings),
        ("data", found.data),
        ("model", found.model),
        ("versions", found.versions),
        ("hardware", found.hardware),
    )
    for title, pairs in groups:
        lines += ["", title if pairs else f"{title}: alike"]
        lines += [_line(name, pair) for name, pair in pairs.items()]
    lines += ["", "result", *(_line(name, pair) for name, pair in found.result.items() if pair != (None, None))]
    if found.evaluation:
        lines += ["", "evaluation", *(_line(name, pair) for name, pair in found.evaluation.items())]
    if found.curve:
        since = found.first_different_step
        told = "equal at every step that both have" if since is None else f"different from step {since} on"
        lines += ["", f"loss: {told}", *(_line(f"step {step}", (one, two)) for step, one, two in found.curve)]
    return lines


def _line(name: str, pair: Pair) -> str:
    one, other = (_spell(value) for value in pair)
    return f"  {name:22}  {one:>22}  {other:>22}"


def _spell(value: Any) -> str:
    text = "" if value is None else f"{value:.6g}" if isinstance(value, float) else str(value)
    return text if len(text) <= _WIDTH else f"{text[:8]}…{text[-(_WIDTH - 9) :]}"


_WIDTH = 22
