"""`backprop train`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter

from backpropagate.cli.flags import FILE, MULTI_RUN, Json, join_data, keyword, with_settings
from backpropagate.cli.hint_wording import command_line
from backpropagate.cli.output import open_screen, print_json
from backpropagate.cli.process import open_trainer
from backpropagate.results import TrainResult
from backpropagate.run_hints import output_setting, resume_line
from bp_runs.wording import render


def train(file: str | None = None, /, **flags: Any) -> int:
    """Train an adapter on your data and leave it at OUTPUT/lora."""
    as_json, run = flags.pop("json", False), flags.pop("resume_run", None)
    trainer = open_trainer(**join_data(file, flags))
    with open_screen(as_json=as_json) as screen:
        result = trainer.train(resume_run=run, on_event=screen.show)
        if plot := screen.plot():
            screen.say(f"\n{plot}\n")
    if as_json:
        print_json("train", document(result))
    else:
        tell_end(result, trainer.output)
    return 130 if result.outcome.stopped else 0


def document(result: TrainResult) -> dict[str, Any]:
    """What a training says under ``--json``."""
    body = {"run_id": result.run_id, "status": result.record.status, "adapter": str(result.adapter)}
    return {**body, "result": result.outcome.to_dict()}


def tell_end(result: TrainResult, output: Path) -> None:
    """How a training ended, and what to type next."""
    outcome = result.outcome
    done = f"stopped after {outcome.steps} steps" if outcome.stopped else f"{outcome.steps} steps"
    lines = [
        f"  run       {result.run_id}: {done}, loss {outcome.first_loss:.3f} → {outcome.final_loss:.3f}",
        f"  saved     {result.adapter}",
        f"  next      backprop export {result.adapter} --format gguf --quantization q4_k_m",
        f"            {command_line('show-run', result.run_id, **output_setting(output))}",
    ]
    if outcome.rows is not None:
        lines.insert(1, f"  rows      {outcome.rows.describe()}")
    if outcome.stopped:
        line = render(resume_line(result.run_id, output, result.record.hardware.get("ranks", 1)))
        lines.insert(-2, f"  go on     {line}")
    print("\n".join(lines))  # noqa: T201


_ResumeRun = Annotated[str | None, Parameter(name="--resume-run", show=False)]

with_settings(
    train,
    leave_out=MULTI_RUN,
    extra=[FILE, keyword("resume_run", _ResumeRun, default=None), keyword("json", Json, default=False)],
)
