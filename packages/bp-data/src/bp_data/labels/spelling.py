"""Where tokens begin and end in a text, from what they spell, for tokenizers that work on bytes.

The tokenizers library gives ids without offsets at about three quarters of the time. What the tokens spell, one after
the other, is then compared with the whole text, byte for byte: that places each token and proves the mask at once.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from itertools import accumulate
from typing import Final

from bp_data.labels.spans import Marked
from bp_data.tokens import Tokenizer

_UNKNOWN: Final = b"\xff"  # stands in no UTF-8, so a text with such a token never compares equal


def _byte_letters() -> dict[str, int]:
    """The letters with which byte-level vocabularies write bytes (GPT-2's ``bytes_to_unicode``)."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(0x100) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {chr(0x100 + place): byte for place, byte in enumerate(others)}


_LETTERS: Final = _byte_letters()


class Spelling(dict[int, bytes]):
    """The bytes of each token, found when first asked for, as the tokenizer's own decoder gives them."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        super().__init__()
        self._tokenizer = tokenizer

    def __missing__(self, token: int) -> bytes:
        written = self._tokenizer.token_text(token)
        known = all(letter in _LETTERS for letter in written)
        spelt = bytes(_LETTERS[letter] for letter in written) if known else written.encode()
        if not spelt or spelt.decode(errors="replace") != self._tokenizer.decode([token]):
            spelt = _UNKNOWN
        self[token] = spelt
        return spelt

    def mask(self, ids: Sequence[int], marked: Marked) -> bytearray | None:
        """The mask of a chat's tokens; None where they spell something else or a border falls inside a token."""
        pieces = list(map(self.__getitem__, ids))
        whole = marked.text.encode()
        if b"".join(pieces) != whole:
            return None
        mask = bytearray(len(ids))
        ends = list(accumulate(map(len, pieces), initial=0))
        text = None if len(whole) == len(marked.text) else marked.text
        for span in marked.spans:
            start, end = (border if text is None else len(text[:border].encode()) for border in span)
            low, high = bisect_left(ends, start), bisect_left(ends, end)
            if high <= low or ends[low] != start or ends[high] != end:
                return None
            mask[low:high] = b"\x01" * (high - low)
        return mask
