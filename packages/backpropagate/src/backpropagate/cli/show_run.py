"""The page of `backprop show-run`; light, see `backpropagate.cli.fast_path`."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from backpropagate.cli.output import print_json
from backpropagate.cli.plots import loss_plot
from backpropagate.run_hints import UNFINISHED, resume_line
from bp_runs.checkpoint_store import Checkpoint, CheckpointFolder
from bp_runs.errors import RunNotFoundError
from bp_runs.evaluations import read_evaluations
from bp_runs.paths import PROOF_FILE
from bp_runs.record import RunRecord
from bp_runs.store import RunStore
from bp_runs.wording import render

if TYPE_CHECKING:
    from bp_runs.proof import Proof


def print_run(folder: Path, run: str | None, *, json: bool) -> int:
    """Print one run in full: its settings, what it used, how it went and how it ended."""
    store = RunStore(folder)
    record = store.load(run or _newest(store))
    metrics = store.read_metrics(record.run_id)
    saved = CheckpointFolder(store.folder(record.run_id))
    checkpoints, damaged = saved.read(), saved.read_damaged()
    proof, evaluations = _read_proof(store.folder(record.run_id)), read_evaluations(store.folder(record.run_id))
    if json:
        told = [_checkpoint(found) for found in checkpoints]
        body = {"record": record.to_dict(), "metrics": metrics, "checkpoints": told, "damaged": damaged}
        body |= {"evaluations": evaluations} if evaluations else {}
        print_json("show-run", {**body, "proof": proof.to_dict()} if proof else body)
        return 0
    lines = [*_asked(record), *_went(record, metrics), *(_checkpoint_line(found) for found in checkpoints)]
    lines += [f"  proof     {proof.summary()}"] if proof else []
    lines += _evaluation_lines(evaluations[-1]) if evaluations else []
    lines += [f"  damaged   the checkpoint {name}: {wrong}" for name, wrong in damaged.items()]
    if record.status in UNFINISHED and not record.is_imported:
        lines.append(f"  go on     {render(resume_line(record.run_id, store.output, record.hardware.get('ranks', 1)))}")
    changed = {k: v for k, v in record.settings.items() if v["source"] != "default"}
    lines += [f"  set       {k} = {v['value']} ({v['source']})" for k, v in changed.items()]
    if plot := loss_plot([m["loss"] for m in metrics if m.get("event") == "step" and m.get("loss") is not None]):
        lines += ["", plot]
    print("\n".join(lines))  # noqa: T201
    return 0


def _read_proof(folder: Path) -> Proof | None:
    if not (folder / PROOF_FILE).exists():
        return None
    from bp_runs.proof import read_proof  # few runs have one

    return read_proof(folder)


def _evaluation_lines(found: Mapping[str, Any]) -> list[str]:
    """The newest evaluation, a line a measure."""
    head = f"  evaluated on {found['rows']} rows of {found['data']}, against {found['against']}: {found['verdict']}"
    width = max((len(measure["name"]) for measure in found["measures"]), default=0)
    return [
        head,
        *(
            f"            {m['name']:<{width}}  {_number(m['base'])} → {_number(m['tuned'])}  {m.get('verdict', '')}"
            for m in found["measures"]
        ),
    ]


def _newest(store: RunStore) -> str:
    rows, _ = store.list_newest(1)
    if not rows:
        raise RunNotFoundError(f"no runs in {store.output}", fix="Start one: {do:train data.path=my_data.jsonl}")
    return str(rows[0]["run_id"])


def _asked(record: RunRecord) -> list[str]:
    """What was asked, when and where."""
    ended = record.ended_at or ("not yet" if record.status == "running" else "unknown")
    lines = [f"run {record.run_id}: {record.status}", f"  started   {record.created_at}   ended {ended}"]
    if not record.is_imported:
        lines.append(f"  rail      {record.rail} on {record.host} (pid {record.pid})")
    for before, session in pairwise(record.sessions):
        ended = f"; it was {before['status']}" if "status" in before else ""
        lines.append(f"  went on   {session['at']} from step {session['from_step']} (pid {session['pid']}){ended}")
    if record.parent:
        lines.append(f"  parent    {record.parent['run_id']} ({record.parent['relation']})")
    if record.title:
        lines.append(f"  name      {record.title}")
    if record.tags:
        lines.append(f"  tags      {', '.join(record.tags)}")
    if record.note:
        lines.append(f"  note      {record.note}")
    if record.command:
        lines.append(f"  command   {shlex.join(record.command)}")
    if record.model:
        lines.append(f"  model     {record.model['name']} ({record.model['dtype']} on {record.model['device']})")
    return lines


def _went(record: RunRecord, metrics: list[dict[str, Any]]) -> list[str]:
    """How it went and ended; an imported record has less to tell."""
    lines = []
    data, result = record.data, record.result
    if data.get("path"):
        lines.append(f"  data      {data['path']}{_describe_data(data)}")
    told = {"plan": record.describe_plan(), "rows": record.describe_rows()}
    lines += [f"  {name:<9} {text}" for name, text in told.items() if text]
    if result:
        losses = f"{_number(result['first_loss'])} → {_number(result['final_loss'])}"
        lines.append(f"  result    {result['steps']} steps in {_number(result['seconds'], 0)} s, loss {losses}")
        if result.get("best_step") is not None:
            best = f"the lowest, after step {result['best_step']}"
            lines.append(f"  validation loss {_number(result['eval_loss'])}, {best}")
        if result.get("score_card"):
            from backpropagate.continual.scorecard import Scorecard, card_text  # of multi-runs only

            lines.append(card_text(Scorecard.from_dict(result["score_card"])))
    else:
        done = next((m for m in reversed(metrics) if m.get("event") == "step"), record.progress)
        if done.get("step"):
            loss = "not finite" if done.get("loss") is None else _number(done["loss"])
            lines.append(f"  so far    step {done['step']} of {done.get('steps', '?')}, loss {loss}")
    if record.error:
        lines.append(f"  error     [{record.error['code']}]: {record.error['message']}")
        lines.append(f"  do        {record.describe_fix()}")
    files = [(f"{file['kind']:<9} {file['path']}", record.describe_artifact(file)) for file in record.artifacts]
    return lines + [f"  {line}  ({step})" if step else f"  {line}" for line, step in files]


def _describe_data(data: Mapping[str, Any]) -> str:
    """What was read and can be trained on; empty for an imported record, which does not say."""
    counts = ("read", "whole", "truncated", "dropped")
    if "read" not in data:
        return ""
    return ": {} read = {} whole + {} truncated + {} dropped".format(*(data.get(name, "?") for name in counts))


def _number(value: float | None, digits: int = 3) -> str:
    return "?" if value is None else f"{value:.{digits}f}"


def _checkpoint(found: Checkpoint) -> dict[str, Any]:
    names = ("step", "saved_at", "reason", "score", "bytes")
    return {**{n: getattr(found, n) for n in names}, "path": str(found.path), "protected": found.is_protected}


def _checkpoint_line(found: Checkpoint) -> str:
    kept = ", protected" if found.is_protected else ""
    score = "" if found.score is None else f", validation loss {found.score:.3f}"
    return f"  saved     step {found.step}, {found.bytes / 2**20:,.1f} MiB ({found.reason}{score}{kept})"
