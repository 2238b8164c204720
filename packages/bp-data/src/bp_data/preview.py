"""What is learnt, token by token, for a coloured preview."""

from __future__ import annotations

from typing import NamedTuple

from bp_data.dataset import Prepared
from bp_data.tokenrow import TokenRow
from bp_data.tokens import Tokenizer


class PreviewToken(NamedTuple):
    """A piece of a row.

    Attributes:
        text: Its characters; several tokens that only together form a character make one piece.
        trained: Whether it is learnt.
        special: Whether it is a special token.
    """

    text: str
    trained: bool
    special: bool


def preview_rows(prepared: Prepared, n: int) -> list[list[PreviewToken]]:
    """The first ``n`` rows as pieces of text; joined, the pieces of a row are its decoded text."""
    return [preview_row(row, prepared.tokenizer) for row in prepared.rows[:n]]


def preview_row(row: TokenRow, tokenizer: Tokenizer) -> list[PreviewToken]:
    """One row as pieces of text."""
    pieces: list[PreviewToken] = []
    start, shown = 0, 0
    ids = list(row.ids)
    for end in range(1, len(ids) + 1):
        # Decoding with some tokens before keeps the blanks that a decoder strips at the start of a text.
        context = max(0, start - 4)
        text = tokenizer.decode(ids[context:end])
        shown = len(tokenizer.decode(ids[context:start])) if start else 0
        if text.endswith("\ufffd") and end < len(ids) and end - start < 4:
            continue
        pieces.append(PreviewToken(text[shown:], row.mask[end - 1] == 1, ids[end - 1] in tokenizer.special_ids))
        start = end
    return pieces
