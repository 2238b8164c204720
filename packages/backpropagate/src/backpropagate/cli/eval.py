"""`backprop eval`."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter

from backpropagate.cli.flags import Json, Output, output_folder
from backpropagate.cli.output import open_screen, print_json
from backpropagate.errors import EvalDataError
from backpropagate.evaluation.compare import METRICS, Difference, load_metric, sign_test
from backpropagate.evaluation.evaluate import EvalResult, Gate, evaluate_adapter, gate_refusal

_LEVEL = 0.05
"""A blind test that would come out so by chance more often than this says nothing."""


def eval_(
    target: str | None = None,
    *,
    data: Annotated[Path | None, Parameter(name=("--data", "-d"))] = None,
    against: str | None = None,
    answers: int = 20,
    answer_tokens: int = 128,
    metric: Annotated[list[str] | None, Parameter(negative_iterable="")] = None,
    regex: str | None = None,
    gate: Gate | None = None,
    blind: Annotated[bool, Parameter(negative="")] = False,
    seed: int = 0,
    output: Output = None,
    json: Json = False,
) -> int:
    """Compare an adapter with its base on rows that it was not trained on, and say whether it is better.

    Parameters
    ----------
    target: str
        Adapter folder, a run's id, RUN@50 or RUN@best; default: lora in the output folder.
    data: Path
        Rows that were not trained on; default: those that the adapter's run held out.
    against: str
        Another adapter, selected the same way, to compare with instead of the base.
    answers: int
        So many rows are answered by both models; 0: only the loss is measured.
    answer_tokens: int
        Longest answer, in tokens.
    metric: list
        How answers are scored: exact, f1, contains (default: all three), or your own function: metrics.py:rhymes.
    regex: str
        A regular expression that right answers match: one more metric.
    gate: str
        Exit with 65 where the adapter is clearly worse in any measure, or for better: where it is not clearly better.
    blind: bool
        Let you judge the answers side by side without knowing whose they are.
    seed: int
        Of the bootstrap, and of the order in which answers are shown.
    """
    with open_screen(as_json=json or blind) as screen:
        result = evaluate_adapter(
            target,
            output=output_folder(output),
            data=data,
            against=against,
            answers=answers,
            answer_tokens=answer_tokens,
            metrics=[load_metric(name) for name in metric or METRICS],
            pattern=regex,
            seed=seed,
            emit=screen.show,
        )
    judged = judge_blind(result, seed, ask=_ask) if blind else None
    refusal = None if gate is None else gate_refusal(result, gate)
    if json:
        passed = (
            None if gate is None else {"asked": gate, "passed": refusal is None, "why": refusal and refusal.message}
        )
        print_json("eval", {**result.to_dict(), "blind": judged, "gate": passed})
        return refusal.exit_status if refusal else 0
    print("\n".join(_lines(result, judged)))  # noqa: T201
    if refusal is not None:
        raise refusal
    return 0


def _lines(result: EvalResult, judged: dict[str, Any] | None) -> list[str]:
    which = "held-out rows of" if result.part == "heldout" else "rows of"
    width = max(10, *(len(difference.name) for difference in result.differences))
    lines = [
        f"  rows      {result.rows} {which} {result.data}",
        f"  adapter   {result.adapter}",
        f"  against   {result.against}",
        "",
        f"  {'measure':<{width}} {'against':>8} {'adapter':>8}   95 % interval of the difference",
        *(_row(difference, width) for difference in result.differences),
    ]
    if judged is not None:
        lines += ["", _blind_line(judged)]
    return [*lines, "", f"  verdict   {result.verdict}"]


def _row(d: Difference, width: int) -> str:
    interval = "one row tells nothing" if d.high == float("inf") else f"{d.low:+.3f} to {d.high:+.3f}"
    return f"  {d.name:<{width}} {d.base:>8.3f} {d.tuned:>8.3f}   {interval:<20} {d.verdict} ({d.rows} rows)"


def _blind_line(judged: dict[str, Any]) -> str:
    tally = f"adapter {judged['tuned']}, other {judged['base']}, equal {judged['equal']}"
    return f"  blind     {tally}: {judged['verdict']} (p = {judged['p']:.2f})"


def _ask(question: str) -> str:
    sys.stderr.write(question)
    sys.stderr.flush()
    return sys.stdin.readline()


def judge_blind(result: EvalResult, seed: int, *, ask: Callable[[str], str]) -> dict[str, Any]:
    """Show both answers of each row in a drawn order and tally the choices.

    Args:
        result: With answers.
        seed: Of the order.
        ask: Shows a text and returns what was typed: 1, 2, = or q; an empty line asks again, the end of input ends.

    Raises:
        EvalDataError: No row was answered, or all answers are the same.
    """
    pairs = [
        (b.prompt, {"base": b.answer, "tuned": t.answer})
        for b, t in zip(result.base, result.tuned, strict=True)
        if b.answer is not None and b.answer != t.answer
    ]
    if not pairs:
        raise EvalDataError("both models say the same to every row, or no row was answered: nothing to judge")
    tally = {"base": 0, "tuned": 0, "equal": 0}
    draw = random.Random(seed)  # noqa: S311  # an order that must repeat
    for number, (prompt, said) in enumerate(pairs, 1):
        order = draw.sample(("base", "tuned"), 2)
        text = "\n".join(f"\n[{place}] {said[name]}" for place, name in enumerate(order, 1))
        choice = _choose(f"\n--- {number} of {len(pairs)}\n{prompt}\n{text}\n\nbetter: 1, 2, = or q? ", ask)
        if choice == "q":
            break
        tally["equal" if choice == "=" else order[int(choice) - 1]] += 1
    p = sign_test(tally["tuned"], tally["base"])
    clear = "better" if tally["tuned"] > tally["base"] else "worse"
    return {**tally, "p": p, "verdict": clear if p < _LEVEL else "no clear difference"}


def _choose(question: str, ask: Callable[[str], str]) -> str:
    while True:
        typed = ask(question)
        if not typed or typed.strip() in {"1", "2", "=", "q"}:
            return typed.strip() or "q"
