"""`backprop quickstart`."""

from __future__ import annotations

import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from backpropagate.cli.flags import Json
from backpropagate.cli.output import open_screen, print_json
from backpropagate.cli.plots import loss_plot
from backpropagate.cli.process import stop_on_interrupt
from backpropagate.cli.progress import Screen
from backpropagate.quickstart import QuickstartResult, run_quickstart
from bp_data.preview import PreviewToken


def quickstart(
    *,
    output: Annotated[Path, Parameter(name=("--output", "-o"))] = Path("output"),
    model: Annotated[str | None, Parameter(name=("--model", "-m"))] = None,
    steps: int | None = None,
    json: Json = False,
) -> int:
    """Train, export and talk to a small model with the example data: a few minutes on two CPU cores.

    Parameters
    ----------
    output: Path
        Output folder for the run, the adapter and the GGUF.
    model: str
        A Hugging Face folder or Hub id instead of the small model.
    steps: int
        Optimizer steps; default: 64.
    """
    with open_screen(as_json=json) as screen:
        screen.say("quickstart")
        result = run_quickstart(
            output=output,
            model=model,
            steps=steps,
            say=screen.say,
            on_event=screen.show,
            on_preview=lambda tokens: screen.say(_preview(tokens)),
            command=["backprop", *sys.argv[1:]],
            interrupts=stop_on_interrupt(),
        )
        _tell_end(screen, result, output)
    if json:
        print_json("quickstart", _body(result))
    return 0


def _body(result: QuickstartResult) -> dict[str, object]:
    return {
        "run_id": result.training.run_id,
        "status": result.training.record.status,
        "adapter": str(result.training.adapter),
        "gguf": str(result.export.path),
        "result": result.training.outcome.to_dict(),
        "answers": [asdict(a) for a in result.answers],
        "losses": list(result.losses),
        "seconds": result.seconds,
    }


def _tell_end(screen: Screen, result: QuickstartResult, output: Path) -> None:
    screen.say("")
    for answer in result.answers:
        screen.say(f"  {answer.prompt}")
        for stage, text in (("before", answer.before), ("after", answer.after), ("gguf", answer.gguf)):
            screen.say(f"    {stage:<7} {' '.join(text.split())}")
    screen.say("")
    screen.say(loss_plot(result.losses))
    screen.say("")
    outcome = result.training.outcome
    times = ", ".join(f"{stage} {seconds:.0f} s" for stage, seconds in result.seconds.items())
    screen.say(f"  run       {result.training.run_id}: loss {outcome.first_loss:.2f} → {outcome.final_loss:.2f}")
    screen.say(f"  adapter   {result.training.adapter}")
    screen.say(f"  gguf      {result.export.path}  ({result.export.outcome.bytes / 2**20:,.0f} MiB)")
    screen.say(f"  times     {times}")
    screen.say(f"  next      backprop show-run {result.training.run_id} --output {output}")
    screen.say("            backprop train --data my_data.jsonl --model OWNER/NAME")


def _preview(tokens: list[PreviewToken]) -> str:
    """The first row's trained text, so that a person sees what is learned."""
    trained = "".join(t.text for t in tokens if t.trained)
    masked = sum(not t.trained for t in tokens)
    return f"  learns    {trained!r}; {masked} tokens of the prompt are only read"
