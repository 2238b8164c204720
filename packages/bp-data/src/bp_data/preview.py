"""What is trained on, token by token, for a colored preview."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Literal, NamedTuple, TypeAlias

from bp_data.columns import PLAIN, FieldLedger, ReadOptions
from bp_data.errors import RowFaultError
from bp_data.example import Judged, Preference, Rejected
from bp_data.labels.encoder import EncodedRow, Encoder
from bp_data.packing import OnOverflow, cut_row
from bp_data.preparation import AnyPrepared, is_document, load_source, tokenizer_facts
from bp_data.read import read_rows
from bp_data.templates.engine import ChatTemplate
from bp_data.token_rows import JudgedRow, PairRow, TokenRow
from bp_data.tokens import Tokenizer

Answer: TypeAlias = Literal["", "chosen", "rejected", "good", "bad"]


class PreviewToken(NamedTuple):
    """A piece of a row.

    Attributes:
        text: Its characters; several tokens that only together form a character make one piece.
        trained: Whether it is trained on.
        special: Whether it is a special token.
        truncated: Whether it is cut off, and neither trained on nor read.
    """

    text: str
    trained: bool
    special: bool
    truncated: bool = False


@dataclass(frozen=True, slots=True)
class PreviewedRow:
    """A row as training would see it.

    Attributes:
        number: As in `Row`.
        pieces: The whole row, what is cut off included; empty where it cannot be read.
        tokens: Tokens that are read or trained on.
        trained: Tokens that are trained on.
        rejected: Why it is not trained on; None where it is.
        source: As in `Row`.
        answer: Which answer it shows, of a row that compares or judges answers.
        cut: Tokens that are cut off.
    """

    number: int
    pieces: tuple[PreviewToken, ...]
    tokens: int
    trained: int
    rejected: Rejected | None = None
    source: str = ""
    answer: Answer = ""
    cut: int = 0


def preview_rows(prepared: AnyPrepared, n: int) -> list[list[PreviewToken]]:
    """The first ``n`` rows as pieces of text, of a pair both answers; joined, the pieces are the decoded text."""
    parts = [part for row in prepared.rows[:n] for part in _parts_of(row)]
    return [preview_row(part, prepared.tokenizer) for part in parts]


def _parts_of(row: TokenRow | PairRow | JudgedRow) -> tuple[TokenRow, ...]:
    if isinstance(row, PairRow):
        return (row.chosen, row.rejected)
    return (row.row,) if isinstance(row, JudgedRow) else (row,)


def preview_row(row: TokenRow, tokenizer: Tokenizer) -> list[PreviewToken]:
    """One row as pieces of text."""
    return [piece for piece, _ in _pieces(row, tokenizer)]


def preview_file(
    path: str | Path,
    model: str | Path | tuple[Tokenizer, ChatTemplate],
    max_seq_length: int,
    *,
    rows: int = 3,
    skip: int = 0,
    on_overflow: OnOverflow | None = None,
    only_bad: bool = False,
    options: ReadOptions = PLAIN,
    fields: FieldLedger | None = None,
) -> list[PreviewedRow]:
    """Some rows of a file with what is learned, masked and cut off; the rest of the file is not read.

    A row that compares two answers is shown twice, once with each.

    Args:
        path: The data file, or a folder of them.
        model: As in `prepare`.
        max_seq_length: As in `prepare`.
        rows: How many rows.
        skip: Rows passed over before; with ``only_bad``, bad ones.
        on_overflow: As in `prepare`; with ``split``, pieces beyond the first row's end are learned in further rows.
        only_bad: Show only rows that can't be trained on, however far into the file they are.
        options: How the rows are read.
        fields: Counts the columns of the rows that were read.

    Raises:
        DataError: The file, the tokenizer or the template cannot be read; bad rows are shown as such.
    """
    tokenizer, template = load_source(model)
    stops = frozenset(tokenizer_facts(tokenizer, template).stop_ids)
    encoder = Encoder(tokenizer, template, wanted=None, options=options, fields=fields)
    source = read_rows(path, options)
    encoded = encoder.encode_rows(source if only_bad else islice(source, skip, skip + rows))
    found = (
        _previewed(part, answer, tokenizer, (max_seq_length, on_overflow, stops))
        for row in encoded
        for answer, part in _completions(row)
    )
    return list(islice((row for row in found if row.rejected), skip, skip + rows) if only_bad else found)


def _completions(encoded: EncodedRow) -> Iterator[tuple[Answer, TokenRow | Rejected]]:
    """What a row is trained as, in the way of its own kind."""
    names: tuple[Answer, ...] = ("",)
    if isinstance(encoded.example, Judged):
        names = ("good" if encoded.example.label else "bad",)
    elif isinstance(encoded.example, Preference):
        names = ("chosen", "rejected")
    if encoded.rejected:
        yield names[0] if len(names) == 1 else "", encoded.rejected
    else:
        yield from zip(names, encoded.parts, strict=True)


def _previewed(
    row: TokenRow | Rejected, answer: Answer, tokenizer: Tokenizer, how: tuple[int, OnOverflow | None, frozenset[int]]
) -> PreviewedRow:
    """A row cut as `cut_row` cuts it with ``how``: the longest, the policy, the ends."""
    if isinstance(row, Rejected):
        return PreviewedRow(row.number, (), 0, 0, row, row.source, answer)
    longest, policy, stops = how
    length, trained, rejected = len(row.ids), row.trained, None
    if (policy or ("split" if is_document(row.source) else "truncate")) != "split":
        try:
            cut = cut_row(row, longest, policy, stops)
            length, trained = len(cut.ids), cut.trained
        except RowFaultError as fault:
            length, trained = 0, 0
            rejected = Rejected(row.number, fault.code, fault.reason, row.source)
    pieces = (
        piece if end <= length else piece._replace(trained=False, truncated=True)
        for piece, end in _pieces(row, tokenizer)
    )
    cut_off = len(row.ids) - length
    return PreviewedRow(row.number, tuple(pieces), length, trained, rejected, row.source, answer, cut_off)


def _pieces(row: TokenRow, tokenizer: Tokenizer) -> Iterator[tuple[PreviewToken, int]]:
    """Pieces, each with the place after its last token."""
    start, shown = 0, 0
    ids = list(row.ids)
    for end in range(1, len(ids) + 1):
        # Decoding with some tokens before keeps the blanks that a decoder strips at the start of a text.
        context = max(0, start - 4)
        text = tokenizer.decode(ids[context:end])
        shown = len(tokenizer.decode(ids[context:start])) if start else 0
        if text.endswith("\ufffd") and end < len(ids) and end - start < 4:
            continue
        yield PreviewToken(text[shown:], row.mask[end - 1] == 1, ids[end - 1] in tokenizer.special_ids), end
        start = end
