"""The items of a JSON list one by one, however long the list is."""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterator
from typing import BinaryIO, NamedTuple

_BLOCK = 1 << 20
_BLANKS = re.compile(r"[ \t\n\r]*")
_decoder = json.JSONDecoder()


class Item(NamedTuple):
    """The text of one item of a list."""

    text: str
    line: int
    """The line of the file on which it begins, from 1."""


class BrokenListError(ValueError):
    """The list is no valid JSON."""

    def __init__(self, line: int, column: int, what: str) -> None:
        super().__init__(f"line {line}, column {column}: {what}")


class _Window:
    """A piece of the file's text that moves on; ``line`` and ``column`` are those of its first character."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._decode = codecs.getincrementaldecoder("utf-8-sig")()
        self.text = ""
        self.ended = False
        self.line = self.column = 1

    def grow(self) -> bool:
        """Double the window; False at the end of the file."""
        if self.ended:
            return False
        data = self._file.read(max(_BLOCK, len(self.text)))
        self.ended = not data
        try:
            self.text += self._decode.decode(data, final=self.ended)
        except UnicodeDecodeError as error:
            raise BrokenListError(self.line, self.column, f"bytes after here are not UTF-8: {error}") from error
        return not self.ended

    def drop(self, count: int) -> None:
        """Move on by so many characters."""
        gone = self.text[:count]
        feeds = gone.count("\n")
        self.column = len(gone) - gone.rfind("\n") if feeds else self.column + count
        self.line += feeds
        self.text = self.text[count:]

    def error_at(self, place: int, what: str) -> BrokenListError:
        """An error at a place of the window."""
        self.drop(place)
        return BrokenListError(self.line, self.column, what)


def read_items(file: BinaryIO, longest: int) -> Iterator[Item]:
    """The items of the list that a file holds; at most one of them is in memory.

    Args:
        file: UTF-8 JSON whose first character, blanks aside, is ``[``.
        longest: An item may have so many characters.

    Raises:
        BrokenListError: Where the list stops being JSON, or an item is too long.
    """
    window = _Window(file)
    place = _skip(window, 0)
    if window.text[place : place + 1] != "[":
        raise window.error_at(place, "a list should begin here")
    place = _skip(window, place + 1)
    if window.text[place : place + 1] == "]":
        return _end(window, place)
    while True:
        end = _item_end(window, place, longest)
        text = window.text[place:end]
        window.drop(place)
        yield Item(text, window.line)
        place = _skip(window, end - place)
        sign = window.text[place : place + 1]
        if sign == "]":
            return _end(window, place)
        if sign != ",":
            raise window.error_at(place, "a comma or the end of the list should stand here")
        place = _skip(window, place + 1)


def _skip(window: _Window, place: int) -> int:
    """The place of the next character that is no blank; the window's end where the file has none."""
    while True:
        found = _BLANKS.match(window.text, place)
        place = found.end() if found else place
        if place < len(window.text):
            return place
        window.drop(place)
        place = 0
        if not window.grow():
            return 0


def _item_end(window: _Window, place: int, longest: int) -> int:
    while True:
        try:
            end = _decoder.raw_decode(window.text, place)[1]
        except json.JSONDecodeError as error:
            at, what = error.pos, error.msg
        except RecursionError:
            at, what = place, "it is nested too deeply"
            raise window.error_at(at, what) from None
        else:
            # A number near the window's end may go on in the next block: 1. and 1e are no numbers yet.
            if end < len(window.text) - 4 or not window.grow():
                return end
            continue
        if len(window.text) - place > longest:
            raise window.error_at(place, f"an item of more than {longest:,} characters begins here")
        if not _may_be_cut(window.text, at, what) or not window.grow():
            raise window.error_at(at, what)


def _may_be_cut(text: str, at: int, what: str) -> bool:
    """Whether the fault may only be that the window ends too early."""
    return what.startswith(("Unterminated string", "Invalid \\")) or at >= len(text) - 16


def _end(window: _Window, place: int) -> None:
    place = _skip(window, place + 1)
    if place < len(window.text):
        raise window.error_at(place, "something stands after the end of the list")
