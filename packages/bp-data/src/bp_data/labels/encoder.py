"""Tokens and masks of many rows at a time, the same as `bp_data.labels.spans` gives for each alone.

While one batch is encoded by the tokenizer's own threads, another is checked and the next is read and rendered.
"""

from __future__ import annotations

from array import array
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, Final

import orjson

from bp_data.errors import RowFault, RowFaultError
from bp_data.example import Chat, Rejected, Row, Text
from bp_data.formats import parse_row
from bp_data.labels.shapes import SpanFinder
from bp_data.labels.spans import (
    Marked,
    compare_run,
    mask_marked,
    mask_runs,
    mask_text,
    merge_spans,
    require_unicode,
)
from bp_data.labels.spelling import Spelling
from bp_data.read import excerpt
from bp_data.reasoning import TraceBand, find_trace, keep_trace
from bp_data.templates.engine import ChatTemplate
from bp_data.token_rows import TokenRow
from bp_data.tokens import Tokenizer

_ROWS: Final = 256  # rows in a batch
_AHEAD: Final = 3  # batches on their way: one is encoded while others are masked and checked
_CHARACTERS: Final = 1 << 19  # characters after which a batch is full


@dataclass(slots=True)
class _Planned:
    """A row on its way: what is to be encoded, or why nothing is."""

    row: Row | None
    marked: Marked | None = None
    text: Text | None = None
    trace: str = ""
    rejected: Rejected | None = None

    @property
    def size(self) -> int:
        return len(self.marked.text) if self.marked else len(self.text.text) if self.text else 0


class Encoder:
    """Turns rows into token rows, batch by batch.

    Args:
        tokenizer: As loaded.
        template: The chat template.
        trace: Where given, answers must begin with a reasoning trace in this band.
    """

    def __init__(self, tokenizer: Tokenizer, template: ChatTemplate, trace: TraceBand | None = None) -> None:
        self.tokenizer = tokenizer
        self._trace = trace
        self._finder = SpanFinder(tokenizer, template)
        self._spelling = Spelling(tokenizer) if tokenizer.spells_bytes else None
        self._context = lru_cache(maxsize=65_536)(lambda token: tokenizer.decode([token]))

    def encode_rows(self, rows: Iterable[Row | Rejected]) -> Iterator[TokenRow | Rejected]:
        """Each row's tokens and verified mask, uncut, or why it has none; in the rows' order."""
        return self._encode_planned(row if isinstance(row, Rejected) else self._plan(row) for row in rows)

    def encode_chats(self, chats: Iterable[tuple[Row, Chat] | Rejected]) -> Iterator[TokenRow | Rejected]:
        """As `encode_rows`, for chats that are already understood, each with the row that it comes from."""
        return self._encode_planned(one if isinstance(one, Rejected) else self._plan_chat(*one) for one in chats)

    def _encode_planned(self, rows: Iterable[_Planned | Rejected]) -> Iterator[TokenRow | Rejected]:
        waiting: deque[Future[list[TokenRow | Rejected]]] = deque()
        with ThreadPoolExecutor(_AHEAD, "bp-data-encode") as pool:
            for batch in self._batches(rows):
                waiting.append(pool.submit(self._encode, batch))
                if len(waiting) > _AHEAD:
                    yield from waiting.popleft().result()
            while waiting:
                yield from waiting.popleft().result()

    @staticmethod
    def _batches(rows: Iterable[_Planned | Rejected]) -> Iterator[list[_Planned]]:
        batch: list[_Planned] = []
        size = 0
        for row in rows:
            planned = _Planned(None, rejected=row) if isinstance(row, Rejected) else row
            batch.append(planned)
            size += planned.size
            if len(batch) >= _ROWS or size >= _CHARACTERS:
                yield batch
                batch, size = [], 0
        if batch:
            yield batch

    def _plan(self, row: Row) -> _Planned:
        """What of a row is to be encoded and learnt."""
        example = parse_row(row, "sft")
        if isinstance(example, Rejected):
            return _Planned(row, rejected=_with_excerpt(example, row))
        if isinstance(example, Text):
            return _Planned(row, text=example)
        if not isinstance(example, Chat):
            raise TypeError(type(example).__name__)
        return self._plan_chat(row, example)

    def _plan_chat(self, row: Row, chat: Chat) -> _Planned:
        try:
            return self._mark(row, chat)
        except RowFaultError as fault:
            return _Planned(row, rejected=_reject(row, fault))

    def _mark(self, row: Row, chat: Chat) -> _Planned:
        trace = ""
        if self._trace is not None:
            chat = keep_trace(chat, self.tokenizer, self._trace)
            last = next(turn for turn in reversed(chat.messages) if turn.role == "assistant")
            trace = find_trace(last.content or "") or ""
        marked = self._finder.find(chat)
        require_unicode(marked.text)
        if trace and (not marked.spans or trace not in marked.text[marked.spans[-1].start :]):
            raise RowFaultError(RowFault.TURN_NOT_RENDERED, "the chat template leaves the reasoning out")
        return _Planned(row, marked=marked, trace=trace)

    def _encode(self, batch: list[_Planned]) -> list[TokenRow | Rejected]:
        found: dict[int, TokenRow | Rejected] = {}
        chats = self._spell([planned for planned in batch if planned.marked is not None], found)
        encodings = self.tokenizer.encode_many([planned.marked.text for planned in chats if planned.marked])
        runs: list[list[int]] = []
        checks: list[tuple[_Planned, str, str]] = []  # a chat, the text before a run, the text that the run should be
        for planned, encoding in zip(chats, encodings, strict=True):
            if planned.row is None or planned.marked is None:
                continue
            # Where tokens lie askew, the row goes the long way.
            bounds = None if self.tokenizer.is_greedy else _bounds(encoding, planned.marked)
            if bounds is None:
                found[id(planned)] = self._encode_alone(planned, planned.row)
                continue
            ids: list[int] = encoding.ids
            mask = bytearray(len(ids))
            for low, high in bounds:
                mask[low:high] = b"\x01" * (high - low)
            found[id(planned)] = TokenRow(planned.row.number, array("i", ids), bytes(mask), "chat")
            text, spans = planned.marked
            pairs = list(zip(mask_runs(mask), merge_spans(spans), strict=False))
            if len(pairs) != len(merge_spans(spans)):
                found[id(planned)] = self._encode_alone(planned, planned.row)
                continue
            for (low, high), span in pairs:
                runs.append(ids[max(0, low - 1) : high])
                before = self._context(ids[low - 1]) if low else ""
                checks.append((planned, before, text[span.start : span.end]))
        for got, (planned, before, wanted) in zip(self.tokenizer.decode_many(runs), checks, strict=True):
            if got.removeprefix(before) != wanted and planned.row is not None:
                self._check(got.removeprefix(before), wanted, planned, planned.row, found)
        return [self._result(planned, found) for planned in batch]

    def _spell(self, chats: list[_Planned], found: dict[int, TokenRow | Rejected]) -> list[_Planned]:
        """The chats that are left when those are found whose tokens spell their texts."""
        spelling = self._spelling
        if spelling is None:
            return chats
        left = []
        rows = self.tokenizer.encode_ids([planned.marked.text for planned in chats if planned.marked])
        for planned, ids in zip(chats, rows, strict=True):
            mask = spelling.mask(ids, planned.marked) if planned.marked else None
            if mask is None or planned.row is None:
                left.append(planned)
            else:
                found[id(planned)] = TokenRow(planned.row.number, array("i", ids), bytes(mask), "chat")
        if len(left) > len(chats) // 2:
            self._spelling = None  # its normalizer changes these texts: they would all be encoded twice
        return left

    def _check(self, got: str, wanted: str, planned: _Planned, row: Row, found: dict[int, TokenRow | Rejected]) -> None:
        try:
            compare_run(got, wanted, self.tokenizer)
        except RowFaultError as fault:
            found[id(planned)] = _reject(row, fault)

    def _encode_alone(self, planned: _Planned, row: Row) -> TokenRow | Rejected:
        if planned.marked is None:
            raise TypeError("only chats are encoded alone")
        try:
            ids, mask = mask_marked(planned.marked, self.tokenizer)
            return TokenRow(row.number, array("i", ids), bytes(mask), "chat")
        except RowFaultError as fault:
            return _reject(row, fault)

    def _result(self, planned: _Planned, found: dict[int, TokenRow | Rejected]) -> TokenRow | Rejected:
        result = planned.rejected or found.get(id(planned))
        if result is None and planned.row is not None and planned.text is not None:
            try:
                ids, mask = mask_text(planned.text, self.tokenizer)
                result = TokenRow(planned.row.number, array("i", ids), bytes(mask), "text")
            except RowFaultError as fault:
                result = _reject(planned.row, fault)
        if result is None:
            raise TypeError("a row was planned as nothing")
        if isinstance(result, TokenRow) and planned.row is not None:
            return replace(result, source=planned.row.source)
        return result


def _bounds(encoding: Any, marked: Marked) -> list[tuple[int, int]] | None:
    """Tokens ``[low, high)`` of each span; None where a border falls inside a token or on none."""
    size, count = len(marked.text), len(encoding.ids) if not marked.spans else len(encoding)
    found = []
    for start, end in marked.spans:
        low = encoding.char_to_token(start)
        high = count if end == size else encoding.char_to_token(end)
        if low is None or high is None or high <= low:
            return None
        if encoding.token_to_chars(low)[0] != start or encoding.token_to_chars(high - 1)[1] > end:
            return None
        if high < count and encoding.token_to_chars(high)[0] != end:
            return None
        if low and encoding.token_to_chars(low - 1)[1] > start:
            return None
        found.append((low, high))
    return found


def _reject(row: Row, fault: RowFaultError) -> Rejected:
    return _with_excerpt(Rejected(row.number, fault.code, fault.reason), row)


def _with_excerpt(rejected: Rejected, row: Row) -> Rejected:
    return replace(rejected, source=row.source, excerpt=excerpt_row(row))


def excerpt_row(row: Row) -> str:
    """How a row begins, as JSON."""
    try:
        return excerpt(orjson.dumps(row.data, option=orjson.OPT_NON_STR_KEYS))
    except orjson.JSONEncodeError:
        return excerpt(str(sorted(map(str, row.data))))
