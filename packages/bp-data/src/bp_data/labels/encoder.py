"""Rows of every kind to verified tokens and masks, many at a time.

While the tokenizer's own threads encode one batch, another is checked and the next is read and rendered.
"""

from __future__ import annotations

from array import array
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Final, Literal, TypeAlias

from bp_data.columns import PLAIN, FieldLedger, ReadOptions
from bp_data.errors import RowFault, RowFaultError
from bp_data.example import Chat, Example, Preference, Rejected, Row, Text
from bp_data.formats import Wanted, parse_row
from bp_data.json_text import dump_json, excerpt
from bp_data.labels.control import ControlTokens
from bp_data.labels.masks import Masked, build_strategies, mask_chats, mask_text, require_unicode
from bp_data.labels.proof import Marked
from bp_data.labels.rows import mark_rows
from bp_data.labels.shapes import SpanFinder
from bp_data.reasoning import TraceBand, keep_trace
from bp_data.templates.engine import ChatTemplate
from bp_data.token_rows import TokenRow
from bp_data.tokens import Tokenizer

_ROWS: Final = 256  # rows in a batch
_AHEAD: Final = 3  # batches on their way: one is encoded while others are masked and checked
_CHARACTERS: Final = 1 << 19  # characters after which a batch is full

ControlPolicy: TypeAlias = Literal["reject", "allow"]
_Part: TypeAlias = Marked | Text


@dataclass(slots=True)
class EncodedRow:
    """A row as tokens, or why it has none.

    Attributes:
        number, source: As in `Row`.
        example: What the row means; None if it can't be read.
        parts: Its token rows, uncut: one, or several if a chat is one row a question (`bp_data.labels.rows`); of a
            `Preference` the chosen completion's and the rejected one's.
        rejected: Why there are no parts.
    """

    number: int
    source: str = ""
    example: Example | None = None
    parts: list[TokenRow] = field(default_factory=list)
    rejected: Rejected | None = None


@dataclass(slots=True)
class _Planned:
    """A row on its way to tokens."""

    out: EncodedRow
    row: Row | None = None
    parts: list[_Part] = field(default_factory=list)

    @property
    def size(self) -> int:
        return sum(len(part.text) for part in self.parts)

    def reject(self, fault: RowFaultError) -> None:
        """Rejects the row; the first fault counts."""
        if self.out.rejected is None and self.row is not None:
            self.out.rejected = reject_row(self.row, fault.code, fault.reason)
        self.out.parts = []


class Encoder:
    """Turns rows into token rows, batch by batch.

    Args:
        tokenizer: As loaded.
        template: The chat template.
        trace: If given, completions must begin with a reasoning trace in this band.
        wanted: The kind of row to train on; None: each row as what it is.
        options: How rows are read; see `parse_row`.
        fields: Counts the columns that are read and those that are left aside.
        control_tokens: As in `PrepareRequest`.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        template: ChatTemplate,
        trace: TraceBand | None = None,
        wanted: Wanted | None = "sft",
        *,
        options: ReadOptions = PLAIN,
        fields: FieldLedger | None = None,
        control_tokens: ControlPolicy = "reject",
    ) -> None:
        self.tokenizer = tokenizer
        self._options, self._fields = options, fields
        self._trace, self._wanted = trace, wanted
        self._finder = SpanFinder(tokenizer, template)
        self._control = ControlTokens(tokenizer, template) if control_tokens == "reject" else None
        self._strategies = build_strategies(tokenizer)

    def encode_rows(self, rows: Iterable[Row | Rejected]) -> Iterator[EncodedRow]:
        """Each row's tokens and verified masks, uncut, or why it has none; in the rows' order."""
        waiting: deque[Future[list[EncodedRow]]] = deque()
        with ThreadPoolExecutor(_AHEAD, "bp-data-encode") as pool:
            for batch in self._batches(map(self._plan, rows)):
                waiting.append(pool.submit(self._encode, batch))
                if len(waiting) > _AHEAD:
                    yield from waiting.popleft().result()
            while waiting:
                yield from waiting.popleft().result()

    @staticmethod
    def _batches(rows: Iterable[_Planned]) -> Iterator[list[_Planned]]:
        batch: list[_Planned] = []
        size = 0
        for planned in rows:
            batch.append(planned)
            size += planned.size
            if len(batch) >= _ROWS or size >= _CHARACTERS:
                yield batch
                batch, size = [], 0
        if batch:
            yield batch

    def _plan(self, row: Row | Rejected) -> _Planned:
        """What of a row is to be encoded and trained on."""
        if isinstance(row, Rejected):
            return _Planned(EncodedRow(row.number, row.source, rejected=row))
        planned = _Planned(EncodedRow(row.number, row.source), row)
        example = parse_row(row, self._wanted, self._options, self._fields)
        if isinstance(example, Rejected):
            planned.out.rejected = _with_excerpt(example, row)
            return planned
        planned.out.example = example
        try:
            planned.parts = self._parts(example)
        except RowFaultError as fault:
            planned.reject(fault)
        return planned

    def _parts(self, example: Example) -> list[_Part]:
        if isinstance(example, Text):
            if self._control is not None:
                self._control.check_text(example.text)
            return [example]
        if isinstance(example, Chat):
            return [*self._mark(example)]
        parts: list[_Part] = []
        for chat in example.chats() if isinstance(example, Preference) else [example.chat]:
            rows = self._mark(chat)
            if len(rows) > 1:
                reason = "the chat template drops reasoning of earlier turns, and a completion is not split"
                raise RowFaultError(RowFault.REASONING_NOT_RENDERED, reason)
            parts += rows
        return parts

    def _mark(self, chat: Chat) -> list[Marked]:
        if self._trace is not None:
            chat = keep_trace(chat, self.tokenizer, self._trace)
        if self._control is not None:
            self._control.check_chat(chat)
        rows = mark_rows(chat, self._finder)
        for marked in rows:
            require_unicode(marked.text)
        if self._fields is not None:
            self._fields.take_fates({fate for marked in rows for fate in marked.fates})
        return rows

    def _encode(self, batch: list[_Planned]) -> list[EncodedRow]:
        chats = [(planned, part) for planned in batch for part in planned.parts if isinstance(part, Marked)]
        masked = mask_chats([part for _, part in chats], self._strategies)
        for (planned, _), result in zip(chats, masked, strict=True):
            self._take(planned, result, "chat")
        for planned in batch:
            for part in planned.parts:
                if isinstance(part, Text):
                    self._take(planned, self._mask_text(part), "text")
        return [planned.out for planned in batch]

    def _mask_text(self, part: Text) -> Masked | RowFaultError:
        try:
            return mask_text(part, self.tokenizer)
        except RowFaultError as fault:
            return fault

    @staticmethod
    def _take(planned: _Planned, result: Masked | RowFaultError, kind: Literal["chat", "text"]) -> None:
        if isinstance(result, RowFaultError):
            planned.reject(result)
        elif planned.out.rejected is None:
            out = planned.out
            ids = array("i", result.ids)
            out.parts.append(TokenRow(out.number, ids, bytes(result.mask), kind, source=out.source))


def reject_row(row: Row, code: RowFault, reason: str) -> Rejected:
    """A row that is not trained on, with how it begins."""
    return _with_excerpt(Rejected(row.number, code, reason, row.source), row)


def _with_excerpt(rejected: Rejected, row: Row) -> Rejected:
    try:
        shown = excerpt(dump_json(row.data))
    except (TypeError, ValueError):
        shown = excerpt(str(sorted(map(str, row.data))))
    return replace(rejected, source=row.source, excerpt=shown)
