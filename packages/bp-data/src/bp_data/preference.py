"""Rows for the methods that compare answers: preferences (DPO, ORPO, SimPO) and judged answers (KTO)."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Generic, Literal, TypeAlias

from bp_data.errors import DatasetGateError, RowFault, RowFaultError
from bp_data.example import Chat, Judged, Preference, Rejected, Row
from bp_data.files import sha256_data
from bp_data.formats import parse_row
from bp_data.labels.encoder import Encoder, excerpt_row
from bp_data.ledger import Gate, Ledger
from bp_data.packing import OnOverflow, cut_row
from bp_data.preparation import (
    Curriculum,
    Dedup,
    OnBadRow,
    Source,
    is_filtered,
    load_source,
    take_rows,
    tokenizer_facts,
)
from bp_data.preparation import bad_row as error_of
from bp_data.templates.engine import ChatTemplate
from bp_data.token_rows import AnswerRows, JudgedRow, JudgedRows, PairRow, PairRows, T, TokenRow, TokenRows, TokenWriter
from bp_data.tokens import Tokenizer, TokenizerFacts
from bp_runs.errors import ContractError

__all__ = ["Compared", "JudgedRow", "PairRow", "prepare_judged", "prepare_pairs"]

_Example: TypeAlias = Preference | Judged


@dataclass(frozen=True, slots=True)
class Compared(Generic[T]):
    """A data set of preferences or judged answers; attributes as in `Prepared`.

    Attributes:
        rows: In file order, or by length. They lie on disk; each is read when it is asked for.
        tokens: Tokens of all rows, of both answers where there are two.
    """

    rows: AnswerRows[T]
    ledger: Ledger
    facts: TokenizerFacts
    tokenizer: Tokenizer
    template: ChatTemplate
    data_sha256: str
    max_seq_length: int
    tokens: int
    trained_tokens: int


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
    curriculum: Curriculum = "none",
) -> Compared[PairRow]:
    """Read preferences; arguments and errors as in `prepare`, but a row is never split.

    A row is counted as truncated where either answer is cut.
    """
    source = Source(path, samples, seed, dedup, on_bad_row, on_overflow)
    reading = _Reading(source, model, max_seq_length, "preference")
    return reading.close(PairRows(reading.rows), curriculum)


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
    curriculum: Curriculum = "none",
) -> Compared[JudgedRow]:
    """Read judged answers; arguments and errors as in `prepare`, but a row is never split.

    Raises:
        DatasetGateError: Also where all answers have the same label.
    """
    source = Source(path, samples, seed, dedup, on_bad_row, on_overflow)
    reading = _Reading(source, model, max_seq_length, "kto")
    if len(set(reading.labels)) < 2:
        raise DatasetGateError(
            f"all {len(reading.labels)} answers have the same label, and KTO learns from the difference",
            fix="Add answers of the other kind, or use supervised fine-tuning: {set:training.method=sft}",
        )
    return reading.close(JudgedRows(reading.rows, bytes(reading.labels)), curriculum)


class _Reading:
    """A data file read to token rows on disk, through the ledger and the gate.

    Attributes:
        rows: The answers' token rows: two after one another for a preference, one for a judged answer.
        labels: A byte a row, 1 for a good answer; empty for preferences.
    """

    def __init__(
        self,
        source: Source,
        model: str | Path | tuple[Tokenizer, ChatTemplate],
        longest: int,
        wanted: Literal["preference", "kto"],
    ) -> None:
        if source.on_overflow == "split":
            raise ContractError("answers that are compared cannot be split")
        if longest < 2:
            raise ContractError(f"max_seq_length={longest}: at least 2")
        self._source, self._longest, self._wanted = source, longest, wanted
        self._tokenizer, self._template = load_source(model)
        self._facts = tokenizer_facts(self._tokenizer, self._template)
        self._ledger = Ledger()
        self.labels = bytearray()
        self._writer = TokenWriter()
        try:
            self.rows = self._write()
        except BaseException:
            self._writer.close()
            raise

    def close(self, rows: AnswerRows[T], curriculum: Curriculum) -> Compared[T]:
        """What was read, as ``rows`` shows it."""
        if curriculum == "length":
            lengths = rows.lengths()
            rows = rows.pick(sorted(range(len(rows)), key=lengths.__getitem__))
        return Compared(
            rows=rows,
            ledger=self._ledger,
            facts=self._facts,
            tokenizer=self._tokenizer,
            template=self._template,
            data_sha256=sha256_data(Path(self._source.path)),
            max_seq_length=self._longest,
            tokens=self._writer.tokens,
            trained_tokens=self._writer.trained_tokens,
        )

    def _write(self) -> TokenRows:
        gate, stops = Gate(self._facts), frozenset(self._facts.stop_ids)
        for row, example, found in self._tokenize(take_rows(self._source, self._ledger)):
            result = self._fit(row, found, stops)
            if isinstance(result, Rejected):
                self._drop(result)
                continue
            for part in result:
                gate.take(part)
                self._writer.append(part)
            if isinstance(example, Judged):
                self.labels.append(example.label)
            self._count(result)
        self._ledger.check()
        gate.close(self._ledger)
        rows = self._writer.finish()
        if rows is None:
            raise ContractError("a temporary store gives back its rows")
        return rows

    def _tokenize(
        self, rows: Iterable[Row | Rejected]
    ) -> Iterator[tuple[Row | Rejected, _Example | None, list[TokenRow | Rejected]]]:
        """Each row, what it means, and the tokens of its answers or the reason why there are none."""
        ahead: deque[tuple[Row | Rejected, _Example | None]] = deque()

        def chats() -> Iterator[tuple[Row, Chat] | Rejected]:
            for row in rows:
                example = row if isinstance(row, Rejected) else self._recognise(row)
                if isinstance(example, Rejected):
                    ahead.append((row, None))
                    yield example
                elif isinstance(row, Row):
                    ahead.append((row, example))
                    yield from ((row, chat) for chat in _chats_of(example))

        found = Encoder(self._tokenizer, self._template).encode_chats(chats())
        for first in found:
            row, example = ahead.popleft()
            yield row, example, [first, next(found)] if isinstance(example, Preference) else [first]

    def _recognise(self, row: Row) -> _Example | Rejected:
        example = parse_row(row, self._wanted)
        if isinstance(example, Rejected):
            return replace(example, excerpt=excerpt_row(row))
        if not isinstance(example, Preference | Judged):
            raise TypeError(type(example).__name__)
        return example

    def _fit(
        self, row: Row | Rejected, found: Sequence[TokenRow | Rejected], stops: frozenset[int]
    ) -> list[TokenRow] | Rejected:
        parts = []
        for part in found:
            if isinstance(part, Rejected):
                return part
            try:
                parts.append(cut_row(part, self._longest, self._source.on_overflow, stops))
            except RowFaultError as fault:
                return _reject(row, fault.code, fault.reason)
        if len(parts) == 2 and parts[0].ids == parts[1].ids:
            reason = "as tokens the two answers are the same, the template's doing or a cut's"
            return _reject(row, RowFault.SAME_ANSWERS, reason)
        return parts

    def _drop(self, rejected: Rejected) -> None:
        if not is_filtered(rejected, self._source):
            raise error_of(Path(self._source.path), rejected)
        self._ledger.take_dropped(rejected)

    def _count(self, parts: Sequence[TokenRow]) -> None:
        cut = sum(part.cut for part in parts)
        if cut:
            self._ledger.take_truncated(parts[0].number, cut)
        else:
            self._ledger.take_whole()


def _chats_of(example: _Example) -> tuple[Chat, ...]:
    return (example.chat,) if isinstance(example, Judged) else example.chats()


def _reject(row: Row | Rejected, code: RowFault, reason: str) -> Rejected:
    if isinstance(row, Rejected):
        return row
    return Rejected(row.number, code, reason, row.source, excerpt_row(row))
