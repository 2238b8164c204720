"""A model looked at row by row: the loss of each, and what the model says where the row has an answer."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from bp_data import Prepared, TokenRow
from bp_runs.rail import RowOutcome
from bp_train_cuda.answers import go_on
from bp_train_cuda.batches import RowSet
from bp_train_cuda.guards.oom import Batch


def examine_rows(
    model: Any,
    prepared: Prepared,
    *,
    measure: Callable[[Batch], Mapping[str, float]],
    collate: Callable[[Any], Batch],
    answers: int,
    answer_tokens: int,
) -> list[RowOutcome]:
    """Measure every row of ``prepared`` by itself and answer the first ``answers`` that have a prompt.

    Args:
        model: The PEFT model.
        measure: As `bp_train_cuda.guarded.Guarded.measure` of supervised fine-tuning.
        collate: Rows to a batch.
        answers: Most answers.
        answer_tokens: Longest answer, in tokens.
    """
    outcomes: list[RowOutcome] = []
    items = RowSet(prepared.rows)
    was_training = model.training
    model.eval()
    try:
        for place, row in enumerate(prepared.rows):
            batch = {name: value.to(model.device) for name, value in collate([items[place]]).items()}  # (1, T)
            with torch.no_grad():
                loss = measure(batch)["loss"]
            outcome = RowOutcome(loss=loss / max(1, row.trained), tokens=row.trained)
            if answers > 0 and (turn := last_turn(row)) is not None:
                prompt, reference, answer = _answer(model, prepared, row.ids, turn, answer_tokens)
                outcome = replace(outcome, prompt=prompt, reference=reference, answer=answer)
                answers -= 1
            outcomes.append(outcome)
    finally:
        model.train(was_training)
    return outcomes


def last_turn(row: TokenRow) -> tuple[int, int] | None:
    """Where the last trained stretch of a row begins and ends; None where nothing stands before it.

    A truncated row's last turn may be cut off, so it is no reference either.
    """
    end = row.mask.rfind(1) + 1
    begin = row.mask.rfind(0, 0, end) + 1 if end else 0
    return (begin, end) if row.kind == "chat" and not row.truncated and 0 < begin < end else None


def _answer(
    model: Any, prepared: Prepared, ids: Sequence[int], turn: tuple[int, int], longest: int
) -> tuple[str, str, str]:
    """Prompt, reference and answer as text."""
    begin, end = turn
    ends = prepared.facts.stop_ids
    decode = prepared.tokenizer.decode
    said = go_on(model, ids[:begin], max_tokens=longest, ends=ends)
    reference = [token for token in ids[begin:end] if token not in ends]
    return decode(list(ids[:begin])), decode(reference).strip(), decode(said).strip()
