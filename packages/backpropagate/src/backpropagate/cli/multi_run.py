"""`backprop multi-run`."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter

from backpropagate.cli.flags import Json, flag_names, keyword, with_settings
from backpropagate.cli.output import open_screen, print_json
from backpropagate.cli.process import open_trainer
from backpropagate.continual.multirun import MultiRunResult
from backpropagate.continual.scorecard import card_html, card_text
from backpropagate.run_hints import resume_line
from backpropagate.settings import all_settings
from bp_runs.files import publish_bytes
from bp_runs.wording import render

Data = Annotated[
    list[str] | None,
    Parameter(
        name=flag_names(all_settings()["data.path"]),
        negative_iterable="",
        help="The data: one file, folder or Hub name, cut into slices; or given several times: one a run.",
    ),
]
Resume = Annotated[
    str | None,
    Parameter(name="--resume", help="Resume this unfinished multi-run; without an id, the newest one."),
]
FILES = inspect.Parameter(
    "files",
    inspect.Parameter.VAR_POSITIONAL,
    annotation=Annotated[str, Parameter(help="The data, as --data.", show_default=False)],
)
Html = Annotated[Path | None, Parameter(name="--html", help="Write the score card as a page to this file.")]


def multi_run(*files: str, **flags: Any) -> int:
    """Train several runs in a row, each from the one before, and leave their merged adapter at OUTPUT/lora."""
    as_json, page = flags.pop("json", False), flags.pop("html", None)
    data, resume = [*files, *(flags.pop("data", None) or ())], flags.pop("resume", None)
    trainer = open_trainer(**flags)
    with open_screen(as_json=as_json) as screen:
        result = trainer.multi_run(data or None, resume=resume, on_event=screen.show)
    if page is not None:
        publish_bytes(page, card_html(result.card, f"Multi-run {result.run_id}").encode())
    if as_json:
        print_json("multi-run", _body(result))
    else:
        _tell_end(result, page, trainer.output)
    return 130 if result.outcome.stopped else 0


def _body(result: MultiRunResult) -> dict[str, Any]:
    return {
        "run_id": result.run_id,
        "status": result.record.status,
        "adapter": str(result.adapter),
        "runs": list(result.members),
        "rejected": list(result.rejected),
        "score_card": result.card.to_dict(),
        "result": result.outcome.to_dict(),
    }


def _tell_end(result: MultiRunResult, page: Path | None, output: Path) -> None:
    left_out = f", {len(result.rejected)} left out by the gate" if result.rejected else ""
    done = "stopped after" if result.outcome.stopped else "done:"
    print(f"\n  multi-run {result.run_id} {done} {len(result.members)} runs merged{left_out}")  # noqa: T201
    if card := card_text(result.card):
        print(f"\n{card}\n")  # noqa: T201
    print(f"  saved     {result.adapter}")  # noqa: T201
    if page is not None:
        print(f"  page      {page}")  # noqa: T201
    if result.outcome.stopped:
        print(f"  next      {render(resume_line(result.run_id, output))}")  # noqa: T201
    print(f"  next      backprop export {result.adapter} --format gguf --quantization q4_k_m")  # noqa: T201


with_settings(
    multi_run,
    leave_out=("data.path", "training.resume"),
    extra=[
        FILES,
        keyword("data", Data, default=None),
        keyword("resume", Resume, default=None),
        keyword("html", Html, default=None),
        keyword("json", Json, default=False),
    ],
)
