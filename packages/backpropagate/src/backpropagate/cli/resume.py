"""`backprop resume`, `backprop replay` and `backprop extend`."""

from __future__ import annotations

from typing import Annotated

from cyclopts import Parameter

from backpropagate.cli.flags import Json, Output, output_folder
from backpropagate.cli.output import open_screen, print_json
from backpropagate.cli.process import open_trainer
from backpropagate.cli.train import document, tell_end
from backpropagate.continual.scorecard import Scorecard, card_text
from backpropagate.errors import CommandLineError


def resume(
    run: str | None = None,
    *,
    output: Output = None,
    take_over: Annotated[bool, Parameter(negative="")] = False,
    json: Json = False,
) -> int:
    """Continue an unfinished run, as if it had not been cut off.

    Parameters
    ----------
    run: str
        The run's id, or a part of it that only one run has; default: the newest unfinished run.
    take_over: bool
        Continue although the record says that a process of another machine works on the run.
    """
    trainer = open_trainer(output=output_folder(output))
    with open_screen(as_json=json) as screen:
        result = trainer.resume(run, take_over=take_over, on_event=screen.show)
    if json:
        print_json("resume", document(result))
    else:
        if card := result.record.result.get("score_card"):
            print(f"\n{card_text(Scorecard.from_dict(card))}")  # noqa: T201
        tell_end(result, trainer.output)
    return 130 if result.outcome.stopped else 0


def replay(
    run: str,
    *,
    output: Output = None,
    override: Annotated[list[str] | None, Parameter(negative="")] = None,
    json: Json = False,
) -> int:
    """Do a run again as a new one, with the settings of its record.

    Parameters
    ----------
    run: str
        The run's id, or a part of it that only one run has.
    override: list[str]
        Override a setting: lr=1e-4, lora.r=8. Can be given several times.
    """
    pairs = [_split(text) for text in override or []]
    trainer = open_trainer(output=output_folder(output))
    with open_screen(as_json=json) as screen:
        result = trainer.replay(run, overrides=dict(pairs), on_event=screen.show)
    if json:
        print_json("replay", document(result))
    else:
        tell_end(result, trainer.output)
    return 130 if result.outcome.stopped else 0


def extend(
    run: str,
    *,
    steps: Annotated[str, Parameter(name=("--steps",))],
    output: Output = None,
    json: Json = False,
) -> int:
    """Train a finished run for more steps, as a new run that starts from its newest weights.

    The learning rate warms up and falls again over these steps, and the optimizer starts fresh; a line says so.

    Parameters
    ----------
    run: str
        The run's id, or a part of it that only one run has.
    steps: str
        How many more: +100.
    """
    number = steps.removeprefix("+")
    if not number.isdigit():
        raise CommandLineError(f"--steps {steps!r} is no number of steps", fix="Write it so: --steps +100")
    trainer = open_trainer(output=output_folder(output))
    with open_screen(as_json=json) as screen:
        result = trainer.extend(run, steps=int(number), on_event=screen.show)
    if json:
        print_json("extend", document(result))
    else:
        tell_end(result, trainer.output)
    return 130 if result.outcome.stopped else 0


def _split(text: str) -> tuple[str, str]:
    key, equals, value = text.partition("=")
    if not equals or not key.strip():
        raise CommandLineError(f"--override {text!r} is not key=value", fix="Write it so: --override lr=1e-4")
    return key.strip(), value
