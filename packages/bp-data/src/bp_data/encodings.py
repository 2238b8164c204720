"""A guess at the encoding of text that is not UTF-8, for a person to confirm."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Final

_RUN = re.compile(rb"[\x80-\xff]+")
# The most frequent letters of a text in each encoding, apart from ASCII: a third of it or more.
_FREQUENT: Final = (
    ("cp1251", "оеаинтс"),
    ("koi8-r", "оеаинтс"),
    ("cp1253", "αοιετνσ"),
    ("cp1255", "יוהלאר"),
    ("cp1256", "اليمونر"),
    ("shift_jis", "のにをはがたしているかす"),
    ("euc_jp", "のにをはがたしているかす"),
)
_WESTERN: Final = ("cp1252", "cp1250", "cp1254")
# A sign that is no letter between two letters: a letter of another encoding.
_BROKEN_WORD = re.compile(r"(?<=[^\W\d_])[^\w\s'\u2019.-](?=[^\W\d_])|[\xb9\xb2\xb3]")


def guess_encoding(lines: Sequence[bytes]) -> str:
    """Python's name of the likely encoding of lines that are not UTF-8.

    Single letters between ASCII ones are a Western or Central European alphabet; longer runs of bytes above 127 are
    another script. Among those, the one whose own letters make up most of the text is taken.
    """
    runs = [len(run) for line in lines for run in _RUN.findall(line)]
    if not runs or sorted(runs)[len(runs) // 2] <= 2:
        return min(_WESTERN, key=lambda name: _count_broken(lines, name))
    text = b"\n".join(lines)
    pairs = [run for line in lines for run in _RUN.findall(line)]
    if all(len(run) % 2 == 0 for run in pairs) and (korean := _share_of_range(text, "euc_kr", "가", "힣")):
        if korean > 0.9:
            return "euc_kr"
        if not _share(text, "euc_jp", dict(_FREQUENT)["euc_jp"]):
            return "gb18030"
    scores = {name: _share(text, name, letters) for name, letters in _FREQUENT}
    best = max(scores, key=scores.__getitem__)
    return best if scores[best] > 0.2 else "gb18030" if _decodes(text, "gb18030") else "cp1252"


def _count_broken(lines: Sequence[bytes], encoding: str) -> int:
    found = 0
    for line in lines:
        text = line.decode(encoding, errors="replace")
        found += len(_BROKEN_WORD.findall(text)) + 9 * text.count("\ufffd")
    return found


def _share(text: bytes, encoding: str, letters: str) -> float:
    """The frequent letters among all that are not ASCII; 0 where the text can't be in the encoding."""
    if not _decodes(text, encoding):
        return 0.0
    others = [letter for letter in text.decode(encoding) if not letter.isascii()]
    return sum(letter in letters for letter in others) / max(len(others), 1)


def _share_of_range(text: bytes, encoding: str, low: str, high: str) -> float:
    decoded = text.decode(encoding, errors="replace")
    others = [letter for letter in decoded if not letter.isascii()]
    return sum(low <= letter <= high for letter in others) / max(len(others), 1)


def _decodes(text: bytes, encoding: str) -> bool:
    try:
        text.decode(encoding)
    except UnicodeDecodeError:
        return False
    return True
