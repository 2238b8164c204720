"""Measuring a model without training it: the loss over rows, and row by row with answers. Rails bring the model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Protocol

from bp_data import Prepared, TokenRow
from bp_data.loop.protocols import OneProcess
from bp_data.loop.rows import last_turn
from bp_data.loop.validation import Validator
from bp_runs.events import Emit
from bp_runs.rail import EvalOutcome, RowOutcome
from bp_runs.spec import TrainingSpec


class Complete(Protocol):
    """How a rail's model continues a prompt."""

    def __call__(self, ids: Sequence[int], *, max_tokens: int, ends: Sequence[int]) -> Sequence[int]:
        """The tokens that the model greedily adds to ``ids``, without those that end a turn."""
        ...


def measure_rows(framework: Any, training: TrainingSpec, emit: Emit) -> EvalOutcome:
    """The loss on the whole validation set, as a validation in training measures it.

    Args:
        framework: A `bp_data.loop.framework.ExampleFramework` with a ``reader``.
        training: The method and its batch size.
        emit: Receives warnings.
    """
    validator = Validator(
        framework, framework.heldout.count, training, emit, guard=framework.reader, group=OneProcess(), eval_steps=1
    )
    loss, tokens, _ = validator.measure()
    return EvalOutcome(loss=loss, tokens=tokens, rows=framework.heldout.count)


def examine_rows(
    framework: Any, prepared: Prepared[TokenRow], complete: Complete, *, answers: int, answer_tokens: int
) -> list[RowOutcome]:
    """Each row's loss in nats a token, and answers to the first ``answers`` rows that have a prompt.

    Args:
        framework: As for `measure_rows`, over the same rows.
        prepared: The rows.
        complete: Continues a prompt.
        answers: Rows to answer.
        answer_tokens: Most tokens of an answer.
    """
    outcomes = []
    for place, row in enumerate(prepared.rows):
        loss = framework.measure([place], None)["loss"]
        outcome = RowOutcome(loss=loss / max(1, row.trained), tokens=row.trained)
        if answers > 0 and (turn := last_turn(row)) is not None:
            prompt, reference, answer = _answer(prepared, row.ids, turn, complete, answer_tokens)
            outcome = replace(outcome, prompt=prompt, reference=reference, answer=answer)
            answers -= 1
        outcomes.append(outcome)
    return outcomes


def _answer(
    prepared: Prepared[TokenRow], ids: Sequence[int], turn: tuple[int, int], complete: Complete, longest: int
) -> tuple[str, str, str]:
    """Prompt, reference and answer as text."""
    begin, end = turn
    prompt, ends, decode = list(ids[:begin]), prepared.facts.stop_ids, prepared.tokenizer.decode
    reference = [token for token in ids[begin:end] if token not in ends]
    said = complete(prompt, max_tokens=longest, ends=ends)
    return decode(prompt), decode(reference).strip(), decode(list(said)).strip()
