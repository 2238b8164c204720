"""`backprop train`."""

from __future__ import annotations

import sys
from typing import Any

from backpropagate.cli.flags import MULTI_RUN, Json, keyword, with_settings
from backpropagate.cli.screen import open_screen, print_json
from backpropagate.trainer import Trainer


def train(**flags: Any) -> int:
    """Train an adapter on your data and leave it at OUTPUT/lora."""
    as_json = flags.pop("json", False)
    trainer = Trainer(command=["backprop", *sys.argv[1:]], **flags)
    with open_screen(as_json=as_json) as screen:
        result = trainer.train(on_event=screen.show)
        if plot := screen.plot():
            screen.say(f"\n{plot}\n")
    if as_json:
        body = {"run_id": result.run_id, "status": result.record.status, "adapter": str(result.adapter)}
        print_json("train", {**body, "result": result.outcome.to_dict()})
    else:
        _tell_end(result, str(trainer.output))
    return 130 if result.outcome.stopped else 0


def _tell_end(result: Any, output: str) -> None:
    outcome = result.outcome
    done = f"stopped after {outcome.steps} steps" if outcome.stopped else f"{outcome.steps} steps"
    print(f"  run       {result.run_id}: {done}, loss {outcome.first_loss:.3f} → {outcome.final_loss:.3f}")  # noqa: T201
    print(f"  saved     {result.adapter}")  # noqa: T201
    where = "" if output == "./output" else f" --output {output}"
    print(f"  next      backprop export {result.adapter} --format gguf --quantization q4_k_m")  # noqa: T201
    print(f"            backprop show-run {result.run_id}{where}")  # noqa: T201


with_settings(train, leave_out=MULTI_RUN, extra=[keyword("json", Json, default=False)])
