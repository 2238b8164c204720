"""Rows for the methods that compare answers: preferences (DPO, ORPO, SimPO) and judged answers (KTO)."""

from __future__ import annotations

from array import array
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Generic, Literal, TypeVar

from bp_data.batch import excerpt_row
from bp_data.dataset import Dedup, OnBadRow, Source, is_filtered, load_source, take_rows, tokenizer_facts
from bp_data.dataset import bad_row as error_of
from bp_data.errors import DatasetGateError, RowFault, RowFaultError
from bp_data.example import Chat, Judged, Preference, Rejected, Row
from bp_data.files import sha256_data
from bp_data.formats import recognise
from bp_data.ledger import Ledger
from bp_data.mask import mask_chat
from bp_data.overflow import OnOverflow, cut_row
from bp_data.template import ChatTemplate
from bp_data.tokenrow import TokenRow
from bp_data.tokens import Tokenizer, TokenizerFacts
from bp_runs.errors import ContractError


@dataclass(frozen=True, slots=True)
class PairRow:
    """One prompt with a better and a worse answer; both rows hold the prompt, and only the answers are learnt.

    Attributes:
        number: As in `Row`.
        chosen: Prompt and better answer.
        rejected: Prompt and worse answer.
    """

    number: int
    chosen: TokenRow
    rejected: TokenRow

    @property
    def prompt(self) -> int:
        """Tokens with which both rows begin and of which none is learnt."""
        return min(self.chosen.mask.find(1), self.rejected.mask.find(1))


@dataclass(frozen=True, slots=True)
class JudgedRow:
    """A prompt with an answer that is good or bad.

    Attributes:
        number: As in `Row`.
        row: Prompt and answer; only the answer is learnt.
        label: True for a good answer.
    """

    number: int
    row: TokenRow
    label: bool


T = TypeVar("T", PairRow, JudgedRow)


@dataclass(frozen=True, slots=True)
class Compared(Generic[T]):
    """A data set of preferences or judged answers; attributes as in `Prepared`."""

    rows: list[T]
    ledger: Ledger
    facts: TokenizerFacts
    tokenizer: Tokenizer
    template: ChatTemplate
    data_sha256: str
    max_seq_length: int


def prepare_pairs(
    path: str | Path,
    model: str | Path | tuple[Tokenizer, ChatTemplate],
    max_seq_length: int,
    *,
    on_bad_row: OnBadRow = "fail",
    samples: int | None = None,
    seed: int = 0,
    on_overflow: OnOverflow | None = None,
    dedup: Dedup = "none",
) -> Compared[PairRow]:
    """Read preferences; arguments and errors as in `prepare`, but a row is never split.

    A row is counted as truncated where either answer is cut.
    """
    source = Source(path, samples, seed, dedup, on_bad_row, on_overflow)
    return _prepare(source, model, max_seq_length, "preference", _pair)


def prepare_judged(
    path: str | Path,
    model: str | Path | tuple[Tokenizer, ChatTemplate],
    max_seq_length: int,
    *,
    on_bad_row: OnBadRow = "fail",
    samples: int | None = None,
    seed: int = 0,
    on_overflow: OnOverflow | None = None,
    dedup: Dedup = "none",
) -> Compared[JudgedRow]:
    """Read judged answers; arguments and errors as in `prepare`, but a row is never split.

    Raises:
        DatasetGateError: Also where all answers have the same label.
    """
    source = Source(path, samples, seed, dedup, on_bad_row, on_overflow)
    prepared = _prepare(source, model, max_seq_length, "kto", _judged)
    if len({row.label for row in prepared.rows}) < 2:
        raise DatasetGateError(
            f"all {len(prepared.rows)} answers have the same label, and KTO learns from the difference",
            way_out="Add answers of the other kind, or train with the method sft.",
        )
    return prepared


_Cut = Callable[[Chat, int], TokenRow]


def _prepare(
    source: Source,
    model: str | Path | tuple[Tokenizer, ChatTemplate],
    longest: int,
    wanted: Literal["preference", "kto"],
    build: Callable[[Row, Preference | Judged, _Cut], T],
) -> Compared[T]:
    if source.on_overflow == "split":
        raise ContractError("answers that are compared cannot be split")
    if longest < 2:
        raise ContractError(f"max_seq_length={longest}: at least 2")
    tokenizer, template = load_source(model)
    facts = tokenizer_facts(tokenizer, template)
    ledger = Ledger()
    stops = frozenset(facts.stop_ids)

    def tokenize(chat: Chat, number: int) -> TokenRow:
        ids, mask = mask_chat(chat, tokenizer, template)
        return cut_row(TokenRow(number, array("i", ids), bytes(mask)), longest, source.on_overflow, stops)

    rows: list[T] = []
    for row in take_rows(source, ledger):
        result = row if isinstance(row, Rejected) else _read(row, wanted, build, tokenize)
        if not isinstance(result, Rejected):
            rows.append(result)
            _count(result, ledger)
        elif not is_filtered(result, source):
            raise error_of(Path(source.path), result)
        else:
            ledger.take_dropped(result)
    ledger.check()
    _check(rows, stops, ledger)
    digest = sha256_data(Path(source.path))
    return Compared(rows, ledger, facts, tokenizer, template, digest, longest)


def _read(
    row: Row,
    wanted: Literal["preference", "kto"],
    build: Callable[[Row, Preference | Judged, _Cut], T],
    tokenize: _Cut,
) -> T | Rejected:
    example = recognise(row, wanted)
    if isinstance(example, Rejected):
        return replace(example, excerpt=excerpt_row(row))
    if not isinstance(example, Preference | Judged):
        raise TypeError(type(example).__name__)
    try:
        return build(row, example, tokenize)
    except RowFaultError as fault:
        return Rejected(row.number, fault.code, fault.reason, row.source, excerpt_row(row))


def _pair(row: Row, example: Preference | Judged, tokenize: _Cut) -> PairRow:
    if not isinstance(example, Preference):
        raise TypeError(type(example).__name__)
    prompt, tools = example.prompt, example.tools
    chosen, rejected = (
        tokenize(Chat((*prompt, *answer), tools, len(prompt)), row.number)
        for answer in (example.chosen, example.rejected)
    )
    if chosen.ids == rejected.ids:
        raise RowFaultError(
            RowFault.SAME_ANSWERS, "as tokens the two answers are the same, the template's doing or a cut's"
        )
    return PairRow(row.number, chosen, rejected)


def _judged(row: Row, example: Preference | Judged, tokenize: _Cut) -> JudgedRow:
    if not isinstance(example, Judged):
        raise TypeError(type(example).__name__)
    return JudgedRow(row.number, tokenize(example.chat, row.number), example.label)


def _parts(row: PairRow | JudgedRow) -> tuple[TokenRow, ...]:
    return (row.chosen, row.rejected) if isinstance(row, PairRow) else (row.row,)


def _count(row: PairRow | JudgedRow, ledger: Ledger) -> None:
    cut = sum(part.cut for part in _parts(row))
    if cut:
        ledger.take_truncated(row.number, cut)
    else:
        ledger.take_trained()


def _check(rows: list[T], stops: frozenset[int], ledger: Ledger) -> None:
    """The gate for compared answers.

    Raises:
        DatasetGateError: No rows, or no answer at all whose end token is learnt.
    """
    if not rows:
        counts = ", ".join(f"{len(found)} × {code}" for code, found in sorted(ledger.dropped_by_code.items()))
        raise DatasetGateError("no row is left to train on", cause=counts, details=ledger.to_dict())
    ends = (
        any(learnt and token in stops for token, learnt in zip(part.ids, part.mask, strict=True))
        for row in rows
        for part in _parts(row)
    )
    if not any(ends):
        raise DatasetGateError("no answer has its end token among the learnt tokens: the model would never stop")
