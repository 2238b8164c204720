"""JSON read and written without loss, and the items of a list that is longer than memory.

Two kinds of JSON lose data in most readers and don't here: integers of more than 64 bits stay what they are, and an
object that names a field twice is rejected.
"""

from __future__ import annotations

import codecs
import json
import logging
import re
from collections.abc import Callable, Iterator, Mapping
from datetime import date
from functools import lru_cache
from math import isfinite
from typing import Any, Final, NamedTuple, Protocol

import orjson

from bp_data.errors import RowFault

_log = logging.getLogger("bp_data")
_EXCERPT: Final = 80  # characters
_BLOCK = 1 << 20
# A quote that ends a text and a colon: an object's key. Inside a text a quote has a backslash before it.
_KEY = re.compile(rb'[^\\]"[ \t\r\n]*:')
_LONGEST_INT: Final = 2.0**63  # orjson turns integers beyond 64 bits into floats
_decoder = json.JSONDecoder()


@lru_cache(maxsize=256)
def warn_once(message: str) -> None:
    """Log a warning about a file; files are read several times."""
    _log.warning("%s", message)


class JsonFaultError(ValueError):
    """A text is no JSON, or JSON that can't be kept whole."""

    def __init__(self, code: RowFault, reason: str) -> None:
        super().__init__(reason)
        self.code = code
        self.reason = reason


def load_json(text: bytes | str) -> Any:
    """JSON as Python data; integers have any size, and no field of an object is lost.

    Raises:
        JsonFaultError: ROW_JSON_BROKEN, also for NaN and lone surrogates; ROW_DUPLICATE_KEYS; ROW_NOT_UTF8.
    """
    raw = text.encode(errors="surrogatepass") if isinstance(text, str) else text
    try:
        data = orjson.loads(raw)
    except orjson.JSONDecodeError as error:
        if "infinity" not in str(error):  # an integer of more than 308 digits
            raise _fault(raw, error) from error
        return _load_exactly(raw)
    return _load_exactly(raw) if isinstance(data, dict | list) and _loses_data(raw, data) else data


def _loses_data(raw: bytes, data: Any) -> bool:
    """Whether orjson lost a field that is named twice, or turned a long integer into a float."""
    keys = 0
    left: list[Any] = [data]
    while left:
        item = left.pop()
        values = item
        if type(item) is dict:
            keys += len(item)
            values = item.values()
        for value in values:
            kind = type(value)
            if kind is dict or kind is list:
                left.append(value)
            elif kind is float and not -_LONGEST_INT < value < _LONGEST_INT:
                return True
    # A quote and a colon end a key, also with blanks between; in a text a quote has a backslash before it. If there
    # are as many as keys, none is lost. Only otherwise the slower search tells keys from texts.
    blanks = b'" ' in raw or b'"\t' in raw or b'"\n' in raw or b'"\r' in raw
    return (blanks or raw.count(b'":') != keys) and len(_KEY.findall(raw)) > keys


def _load_exactly(raw: bytes) -> Any:
    try:
        return json.loads(raw, object_pairs_hook=_to_object, parse_float=_to_float, parse_constant=_to_float)
    except RecursionError as error:
        raise JsonFaultError(RowFault.JSON_BROKEN, "it is nested too deeply") from error
    except JsonFaultError:
        raise
    except ValueError as error:  # Python reads integers of up to 4,300 digits
        raise JsonFaultError(RowFault.JSON_BROKEN, f"a number is too long: {error}") from error


def _to_float(text: str) -> float:
    number = float(text)
    if not isfinite(number):
        raise JsonFaultError(RowFault.JSON_BROKEN, f"the number {excerpt(text)} is not finite")
    return number


def dump_json(data: Any, *, default: Callable[[Any], Any] | None = None) -> bytes:
    """Data as one line of UTF-8 JSON that `load_json` reads back the same.

    Args:
        data: The data.
        default: Makes JSON data of what JSON can't hold; dates are written as ISO texts without it.

    Raises:
        TypeError, ValueError: The data holds what JSON can't.
    """
    try:
        return orjson.dumps(data, default)
    except orjson.JSONEncodeError:
        # Integers of more than 64 bits; what JSON can't hold at all raises here too.
        made = default or _date_text
        return json.dumps(data, ensure_ascii=False, allow_nan=False, separators=(",", ":"), default=made).encode()


def _date_text(value: Any) -> str:
    if isinstance(value, date):
        return value.isoformat()
    raise TypeError(f"{type(value).__name__} is not JSON")


def _to_object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for place, name in enumerate(names) if name in names[:place])
        reason = f"the field {excerpt(twice)!r} is named twice in one object, and one of its values would be lost"
        raise JsonFaultError(RowFault.DUPLICATE_KEYS, reason)
    return found


def _fault(raw: bytes, error: orjson.JSONDecodeError) -> JsonFaultError:
    try:
        raw.decode()
    except UnicodeDecodeError as wrong:
        column = len(raw[: wrong.start].decode()) + 1
        reason = f"column {column}: byte 0x{raw[wrong.start]:02x} is not UTF-8"
        return JsonFaultError(RowFault.NOT_UTF8, reason)
    start = raw.lstrip()[:2]
    hint = ""
    if start == b"{'":
        hint = "; names and texts need double quotes, as Python's json.dumps writes them"
    elif raw.strip() == b"[":
        hint = "; a list over several lines belongs into a .json file"
    line = f"line {error.lineno}, " if error.lineno > 1 else ""
    return JsonFaultError(RowFault.JSON_BROKEN, f"broken JSON at {line}column {error.colno}: {error.msg}{hint}")


def excerpt(line: bytes | str) -> str:
    """The first 80 characters of a line, so that a person can find it."""
    text = line[: 4 * _EXCERPT].decode(errors="replace") if isinstance(line, bytes) else line
    return text if len(text) <= _EXCERPT else text[: _EXCERPT - 1] + "…"


def name_type(value: Any) -> str:
    """JSON's word for the type of a value, with its article."""
    return _TYPE_NAMES.get(type(value), f"a {type(value).__name__}")


_TYPE_NAMES: Mapping[type, str] = {
    type(None): "null",
    bool: "a truth value",
    int: "a number",
    float: "a number",
    str: "a text",
    list: "a list",
    dict: "an object",
}


# --- A list item by item, however long it is -----------------------------------------------------------------------


class Item(NamedTuple):
    """The text of one item of a list."""

    text: str
    line: int
    """The line of the file on which it begins, from 1."""


class BrokenListError(ValueError):
    """The list is no valid JSON."""

    def __init__(self, line: int, column: int, what: str) -> None:
        super().__init__(f"line {line}, column {column}: {what}")


class Readable(Protocol):
    """A file, or something that reads like one."""

    def read(self, count: int, /) -> bytes:
        """At most ``count`` bytes; none at the end."""
        ...


class _Window:
    """A piece of the file's text that moves on; ``line`` and ``column`` are those of its first character."""

    def __init__(self, file: Readable) -> None:
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


def read_items(file: Readable, longest: int) -> Iterator[Item]:
    """The items of the list that a file holds; at most one of them is in memory.

    Args:
        file: UTF-8 JSON whose first character, blanks aside, is ``[``.
        longest: An item may have so many characters.

    Raises:
        BrokenListError: Where the list stops being JSON, or an item is too long.
    """
    window = _Window(file)
    place = _skip_blanks(window, 0)
    if window.text[place : place + 1] != "[":
        raise window.error_at(place, "a list should begin here")
    place = _skip_blanks(window, place + 1)
    while window.text[place : place + 1] != "]":
        end = _item_end(window, place, longest)
        text = window.text[place:end]
        window.drop(place)
        yield Item(text, window.line)
        place = _skip_blanks(window, end - place)
        sign = window.text[place : place + 1]
        if sign not in ("]", ","):
            raise window.error_at(place, "a comma or the end of the list should stand here")
        if sign == ",":
            place = _skip_blanks(window, place + 1)
    place = _skip_blanks(window, place + 1)
    if window.text[place:].strip("\ufeff \t\r\n"):
        raise window.error_at(place, "something stands after the end of the list")


_BLANKS = re.compile(r"[ \t\n\r]*")


def _skip_blanks(window: _Window, place: int) -> int:
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
            raise window.error_at(place, "it is nested too deeply") from None
        else:
            # A number near the window's end may continue in the next block: 1. and 1e are no numbers yet.
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
