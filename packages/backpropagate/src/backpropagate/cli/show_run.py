"""`backprop show-run`."""

from __future__ import annotations

import shlex
from typing import Any

from backpropagate.cli.flags import Json, Output, output_folder
from backpropagate.cli.screen import loss_plot, print_json
from bp_runs.record import RunRecord
from bp_runs.store import RunStore


def show_run(run: str, *, output: Output = None, json: Json = False) -> int:
    """Show one run in full: what was asked, with what, how it went and how it ended.

    Parameters
    ----------
    run: str
        The run's id, or a part of it that only one run has.
    """
    store = RunStore(output_folder(output))
    record = store.load(run)
    metrics = store.read_metrics(record.run_id)
    if json:
        print_json("show-run", {"record": record.to_dict(), "metrics": metrics})
    else:
        print("\n".join(_lines(record, metrics)))  # noqa: T201
    return 0


def _lines(record: RunRecord, metrics: list[dict[str, Any]]) -> list[str]:
    seconds = record.result.get("seconds")
    lines = [
        f"run {record.run_id}: {record.status}",
        f"  started   {record.created_at}   ended {record.ended_at or 'not yet'}",
        f"  rail      {record.rail} on {record.host} (pid {record.pid})",
    ]
    if record.command:
        lines.append(f"  command   {shlex.join(record.command)}")
    if record.model:
        lines.append(f"  model     {record.model['name']} ({record.model['dtype']} on {record.model['device']})")
    if record.data:
        d = record.data
        counts = f"{d['read']} read = {d['trained']} trained + {d['truncated']} truncated + {d['dropped']} dropped"
        lines.append(f"  data      {d['path']}: {counts}")
    if record.result:
        r = record.result
        lines.append(
            f"  result    {r['steps']} steps in {seconds:.0f} s, loss {r['first_loss']:.3f} → {r['final_loss']:.3f}"
        )
        if r.get("eval_loss") is not None:
            lines.append(f"  validation loss {r['eval_loss']:.3f}, the lowest, after step {r['best_step']}")
    if record.error:
        lines.append(f"  error     [{record.error['code']}]: {record.error['message']}")
        lines.append(f"  do        {record.error['way_out']}")
    lines += [f"  {a['kind']:<9} {a['path']}" for a in record.artifacts]
    changed = {k: v for k, v in record.settings.items() if v["source"] != "default"}
    lines += [f"  set       {k} = {v['value']} ({v['source']})" for k, v in changed.items()]
    plot = loss_plot([m["loss"] for m in metrics if m.get("event") == "step" and m.get("loss") is not None])
    return [*lines, "", plot] if plot else lines
