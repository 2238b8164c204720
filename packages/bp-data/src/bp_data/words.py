"""Token ids of texts put together from those of their words, each of which is encoded once.

A text is cut only before a blank that stands between two ASCII letters. Pre-tokenizers of GPT-2's kind begin a new
piece there whatever comes before or after: a run of letters ends at the blank, the blank begins a blank and letters,
and no look-ahead reaches over a letter. Merges never leave a piece, NFC changes nothing across a blank, and no added
token has a blank after another character. So the parts' ids, one after the other, are the text's. Tokenizers of any
other kind are not cut.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import chain
from typing import Any, Final

from bp_data.tokens import Tokenizer

_MOST = 1 << 16  # words kept
_LONGEST: Final = 32  # characters of a word that is kept
_PLACE: Final = re.compile(r"(?<=[A-Za-z])(?= [A-Za-z])")

# The patterns of Llama 3 and of Qwen 2 and 3, as their files have them.
_PATTERNS: Final = tuple(
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
    + digits
    + r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    for digits in (r"\p{N}{1,3}", r"\p{N}")
)


class WordEncoder:
    """`Tokenizer.encode_ids` for tokenizers that `can_part`; threads may share it."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._known: dict[str, list[int]] = {}

    def encode_ids(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of many texts."""
        parts = [_PLACE.split(text) for text in texts]
        known = {word: self._known.get(word) for word in set(chain.from_iterable(parts))}
        new = [word for word, ids in known.items() if ids is None]
        found = {word: ids for word, ids in known.items() if ids is not None}
        for word, ids in zip(new, self._tokenizer.encode_ids(new), strict=True):
            found[word] = ids
            if len(word) <= _LONGEST and len(self._known) < _MOST:
                self._known[word] = ids
        return [list(chain.from_iterable(map(found.__getitem__, words))) for words in parts]


def can_part(tokenizer: Tokenizer) -> bool:
    """Whether a text's ids are those of its parts, cut between words."""
    if not tokenizer.merges_within_pieces or any(" " in text.lstrip(" ") for text in tokenizer.added):
        return False
    normalizer, splitting = tokenizer.steps()
    if normalizer not in (None, {"type": "NFC"}):
        return False
    steps = splitting.get("pretokenizers", [splitting]) if splitting else []
    kinds = [_kind(step) for step in steps]
    return kinds in (["words"], ["digits", "words"], ["pattern", "bytes"])


def _kind(step: dict[str, Any]) -> str:
    match step:
        case {"type": "ByteLevel", "add_prefix_space": False, "use_regex": bool(words)}:
            return "words" if words else "bytes"
        case {"type": "Digits"}:
            return "digits"
        case {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}:
            return "pattern" if pattern in _PATTERNS else ""
    return ""
