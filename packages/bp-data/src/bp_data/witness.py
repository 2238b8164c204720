"""Where a trained model is measured for its witness (`bp_runs.witness`): the same places on every rail.

A rail calls `build_witness` once, after the last step and before anything is saved, with a function that measures the
model in memory. No framework is imported.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import islice
from typing import Any, Final, TypeAlias

from bp_data.token_rows import JudgedRow, PairRow, TokenRow
from bp_runs.witness import BaseFacts, PromptKind, Witness, WitnessPrompt

PLACES: Final = 64
"""Places over all rows."""
ROWS: Final = 16
ROW_TOKENS: Final = 512
"""Tokens read of a row; the rest is left out."""
EARLY_TOKENS: Final = 64
"""Of the first row, places are measured within so many tokens too: a check of a large model can't read more."""
LONG_PLACES: Final = 8
_EARLY_STEP = 8
_CANDIDATES = 64
_PAST_WINDOW = 32
"""Tokens by which the long prompt exceeds the window."""
LONGEST: Final = 8192
"""Tokens of the long prompt at most; models with larger windows get none."""

Measured: TypeAlias = tuple[Sequence[Sequence[int]], Sequence[Sequence[float]], Sequence[Sequence[float]] | None]
"""By place: the likeliest next tokens best first, their log-probabilities in nats, and those of the base without the
adapter (None if there is no adapter)."""
Measure: TypeAlias = Callable[[Sequence[int], Sequence[int]], Measured]
"""Token ids and places in them to what the model says after those places; `bp_runs.witness.TOP_TOKENS` a place."""


def build_witness(
    validation: Sequence[Any],
    training: Sequence[Any],
    measure: Measure,
    *,
    run_id: str,
    base: BaseFacts,
    config: Mapping[str, Any],
    longest: int = LONGEST,
) -> Witness | None:
    """Measure the model in memory; None without any rows.

    Args:
        validation: Rows held out, of any method.
        training: Rows trained on, which fill up where too few were held out.
        measure: Measures the model as it was trained, without dropout.
        run_id: The run's.
        base: How the base is held.
        config: The base's config.json, which tells the window.
        longest: Tokens of the long prompt at most; a slow device asks for fewer.
    """
    rows: list[tuple[PromptKind, TokenRow]] = [("validation", row) for row in _read_rows(validation)]
    trained = _read_rows(training)
    rows += [("training", row) for row in trained[: ROWS - len(rows)] if _count_places(row for _, row in rows) < PLACES]
    if not rows:
        return None
    chosen = [(kind, list(row.ids[:ROW_TOKENS]), _choose_places(row, PLACES // len(rows))) for kind, row in rows]
    chosen[0] = (*chosen[0][:2], _add_early(chosen[0][1], chosen[0][2]))
    if (length := read_long_length(config)) is not None and length <= longest:
        ids = _join([*trained, *(row for _, row in rows)], length)
        chosen.append(("long", ids, list(range(length - LONG_PLACES, length))))
    prompts = tuple(_measure_prompt(measure, kind, ids, places) for kind, ids, places in chosen)
    return Witness(run_id=run_id, base=base, prompts=prompts)


def read_long_length(config: Mapping[str, Any]) -> int | None:
    """Tokens of a prompt that no window of the model holds; None without a window, or if no text can exceed it.

    Args:
        config: The base's config.json.
    """
    words = {**config, **(config.get("text_config") or {})}
    window = words.get("sliding_window")
    if not isinstance(window, int) or window < 1 or words.get("use_sliding_window") is False:
        return None
    length = window + _PAST_WINDOW
    context = words.get("max_position_embeddings")
    return None if isinstance(context, int) and length > context else length


def _read_rows(rows: Sequence[Any]) -> list[TokenRow]:
    """The rows to measure: of some spread over the data those that are read soonest, since the check costs by token."""
    step = max(1, len(rows) // _CANDIDATES)
    order = [*range(0, len(rows), step), *(place for place in range(len(rows)) if place % step)]
    found = (_to_row(rows[place]) for place in order[: 4 * _CANDIDATES])
    usable = list(islice((row for row in found if row.mask.find(1, 1, ROW_TOKENS) > 0), _CANDIDATES))
    return sorted(usable, key=lambda row: row.mask.rfind(1, 0, ROW_TOKENS))[:ROWS]


def _to_row(found: Any) -> TokenRow:
    """The row of a pair's better answer, of a judged answer, or the row itself."""
    row: TokenRow = found.chosen if isinstance(found, PairRow) else found.row if isinstance(found, JudgedRow) else found
    return row


def _count_places(rows: Iterable[TokenRow]) -> int:
    return sum(row.mask[:ROW_TOKENS].count(1, 1) for row in rows)


def _choose_places(row: TokenRow, count: int) -> list[int]:
    """Places before trained tokens, spread over the row; the last is before the last trained token, often an end."""
    trained = [place for place in range(len(row.mask[:ROW_TOKENS]) - 1) if row.mask[place + 1]]
    count = min(count, len(trained))
    return sorted({trained[-1 - len(trained) * i // count] for i in range(count)})


def _add_early(ids: Sequence[int], places: Sequence[int]) -> list[int]:
    early = range(_EARLY_STEP - 1, min(EARLY_TOKENS, len(ids)), _EARLY_STEP)
    return sorted({*places, *early})


def _join(rows: Sequence[TokenRow], length: int) -> list[int]:
    """Rows one after another, again and again, up to a length."""
    ids: list[int] = []
    while len(ids) < length:
        for row in rows:
            ids += row.ids
            if len(ids) >= length:
                break
    return ids[:length]


def _measure_prompt(measure: Measure, kind: PromptKind, ids: Sequence[int], places: Sequence[int]) -> WitnessPrompt:
    tokens, logprobs, base = measure(ids, places)
    return WitnessPrompt(
        kind=kind,
        ids=tuple(ids),
        places=tuple(places),
        tokens=_to_table(tokens, int),
        logprobs=_to_table(logprobs, float),
        base_logprobs=None if base is None else _to_table(base, float),
    )


def _to_table(rows: Sequence[Sequence[Any]], kind: type) -> tuple[tuple[Any, ...], ...]:
    return tuple(tuple(kind(value) for value in row) for row in rows)
