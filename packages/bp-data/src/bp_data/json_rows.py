"""Rows from JSON text: one object a line, a list, or one object that wraps a list.

What people call .jsonl and .json is often neither. These are read as well: a list with an item a line, a comma after
each line, a comma before a closing bracket, byte order marks between joined files, objects over several lines,
``{"data": […]}``, and columns with a list each as pandas writes them. Everything else is named with its place.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO, Final, Literal, NamedTuple, TypeAlias

import orjson

from bp_data.columns import is_known
from bp_data.errors import DatasetParseFailedError, RowFault
from bp_data.example import Rejected, Row
from bp_data.json_text import (
    BrokenListError,
    JsonFaultError,
    Readable,
    dump_json,
    excerpt,
    load_json,
    name_type,
    read_items,
    warn_once,
)

LONGEST_LINE: Final = 64 * 2**20
"""Bytes; a longer line, list item or document is rejected and never held in memory whole."""

AS_UTF8: Final = (
    "Name the file's encoding, such as Excel's on Windows: {set:data.encoding=cp1252}; "
    "or skip such rows: {set:data.on_bad_row=skip}"
)
"""What to do about bytes that are not UTF-8."""

_BLOCK: Final = 1 << 20
_WHOLE = 32 * 2**20  # bytes of a file up to which it is parsed at once
_BOM: Final = b"\xef\xbb\xbf"
# A text, which is kept, or a comma before a closing bracket, which goes.
_TRAILING_COMMA = re.compile(r'("[^"\\]*(?:\\.[^"\\]*)*")|,(?=\s*[}\]])', re.DOTALL)
# What may stand between two values of a file: blanks, commas, byte order marks, record separators (RFC 7464).
_BETWEEN = re.compile("[ \\t\\r\\n,\ufeff\\x1e]*")
_decoder = json.JSONDecoder()


def to_row(number: int, data: Any, source: str, raw: bytes | str = b"") -> Row | Rejected:
    """Data as a row; a list of turns alone is a chat."""
    if isinstance(data, dict):
        return Row(number, data, source)
    if isinstance(data, list) and data and all(map(_is_turn, data)):
        return Row(number, {"messages": data}, source)
    if isinstance(data, str) and data.lstrip().startswith("{"):  # an object that was written as JSON twice
        inner = parse_line(number, data.encode(errors="surrogatepass"), source)
        if isinstance(inner, Row):
            return inner
    reason = f"the row is {name_type(data)}, not an object with named fields"
    return Rejected(number, RowFault.NOT_OBJECT, reason, source, excerpt(raw))


def _is_turn(value: Any) -> bool:
    return isinstance(value, dict) and bool({"role", "from"} & {*value}) and bool({"content", "value"} & {*value})


def too_long(number: int, size: int, start: bytes, source: str) -> Rejected:
    """The rejection of a row that is longer than `LONGEST_LINE`."""
    reason = f"it has {size:,} bytes; the longest row that is read has {LONGEST_LINE:,}"
    return Rejected(number, RowFault.TOO_LONG, reason, source, excerpt(start))


def parse_line(number: int, line: bytes, source: str = "") -> Row | Rejected:
    """One line that holds one JSON value, as a row."""
    try:
        return to_row(number, load_json(line), source, line)
    except JsonFaultError as fault:
        return Rejected(number, fault.code, fault.reason, source, excerpt(line))


# --- Which layout a file has ---------------------------------------------------------------------------------------

Layout: TypeAlias = Literal["lines", "list lines", "whole"]
"""One value a line; a list with whole items on each line; or JSON that only makes sense as a whole."""


class Head(NamedTuple):
    """A file's layout, and the lines that were read to find it, each with its number."""

    layout: Layout
    lines: tuple[tuple[int, bytes], ...]


def find_layout(stream: BinaryIO) -> Head:
    """Look at the first two lines that aren't blank."""
    lines: list[tuple[int, bytes]] = []
    number = 0
    is_cut = False
    while len(lines) < 2 and not is_cut and (line := stream.readline(LONGEST_LINE)):
        number += 1
        is_cut = _is_cut(line)
        if _plain(line):
            lines.append((number, line))
    texts = [_plain(line) for _, line in lines]
    if is_cut:  # a list may have one endless line, a row may not
        return Head("whole" if texts[0].startswith(b"[") else "lines", tuple(lines))
    goes_on = len(lines) > 1 and lines[1][1].rstrip().endswith(b",")
    return Head(_name_layout(*texts, goes_on=goes_on) if texts else "lines", tuple(lines))


def _is_cut(line: bytes) -> bool:
    return len(line) == LONGEST_LINE and not line.endswith(b"\n")


def _plain(line: bytes) -> bytes:
    """A line without what may stand between two values."""
    text = line.strip(b" \t\r\n,\x1e")
    return text[len(_BOM) :].lstrip(b" \t,") if text.startswith(_BOM) else text


def _name_layout(first: bytes, second: bytes = b"", *, goes_on: bool = False) -> Layout:
    if first.startswith(b"["):
        if _is_json(first):
            return "lines" if second else "whole"
        items = first[1:].strip() or second
        return "list lines" if items.startswith(b"{") and _are_objects(items) else "whole"
    if not first.startswith(b"{") or (second and _is_json(first)):
        return "lines"
    if not second:
        return "whole" if _is_json(first) else "lines"
    if not second.startswith(b"{"):
        return "whole"  # an object over several lines
    # Either an item of a list that began on the first line, or the first line is merely broken.
    is_item = first.endswith((b"{", b"[", b":")) and (goes_on or not _is_json(second))
    return "whole" if is_item else "lines"


def _is_json(text: bytes) -> bool:
    try:
        orjson.loads(text)
    except orjson.JSONDecodeError:
        return False
    return True


def _are_objects(text: bytes) -> bool:
    try:
        return all(isinstance(value, dict) for value, _ in _split_values(text))
    except JsonFaultError:
        return False


def read_json(stream: BinaryIO, file: Path, source: str) -> Iterator[Row | Rejected]:
    """Rows of JSON text of any layout; see `find_layout`.

    Yields:
        Rows numbered by their line, or by their position where the layout is ``whole``.

    Raises:
        DatasetParseFailedError: JSON that makes sense as a whole only, and is broken.
    """
    layout, lines = find_layout(stream)
    if layout == "whole":
        yield from _read_whole(_join_head(lines), stream, file, source)
    else:
        yield from _read_lines(lines, stream, source, is_list=layout == "list lines")


def _join_head(lines: tuple[tuple[int, bytes], ...]) -> bytes:
    """The lines as they were in the file, blank ones as line feeds, so that places of errors are right."""
    text, at = b"", 1
    for number, line in lines:
        text += b"\n" * (number - at) + line
        at = number + 1
    return text


def _read_lines(
    head: tuple[tuple[int, bytes], ...], stream: BinaryIO, source: str, *, is_list: bool
) -> Iterator[Row | Rejected]:
    last = head[-1][0] if head else 0
    rest = enumerate(iter(lambda: stream.readline(LONGEST_LINE), b""), start=last + 1)
    for place, (number, line) in enumerate(chain(head, rest)):
        if _is_cut(line):
            yield too_long(number, len(line) + _skip_line(stream), line, source)
            continue
        text = _plain(line)[1:] if is_list and not place else line.strip()
        if not text:
            continue
        try:
            row = to_row(number, load_json(text), source, text)
        except JsonFaultError as fault:
            yield from _repair_line(number, text, fault, source, is_list=is_list)
        else:
            yield row


def _skip_line(stream: BinaryIO) -> int:
    skipped = 0
    while piece := stream.readline(_WHOLE):
        skipped += len(piece)
        if piece.endswith(b"\n"):
            break
    return skipped


def _repair_line(
    number: int, text: bytes, fault: JsonFaultError, source: str, *, is_list: bool
) -> Iterator[Row | Rejected]:
    """The rows of a line that isn't one JSON value: joined files without a line feed, commas, the end of a list."""
    pairs = []
    if fault.code is RowFault.JSON_BROKEN:
        try:
            pairs = _split_values(text, is_list=is_list)
        except JsonFaultError as error:
            fault = fault if error.code is RowFault.JSON_BROKEN else error
    for value, raw in pairs:
        yield to_row(number, value, source, raw)
    if not pairs and _plain(text.rstrip(b"], ") if is_list else text):
        yield Rejected(number, fault.code, fault.reason, source, excerpt(text))


def _split_values(raw: bytes, *, is_list: bool = False) -> list[tuple[Any, str]]:
    """JSON values next to each other, with their texts; commas before closing brackets are passed over.

    Raises:
        JsonFaultError: One of them is no JSON.
    """
    try:
        text = _TRAILING_COMMA.sub(lambda found: found[1] or "", raw.decode())
    except UnicodeDecodeError as error:
        raise JsonFaultError(RowFault.NOT_UTF8, str(error)) from error
    if is_list and text.rstrip(" \t\r\n,").endswith("]") and not _is_json(text.strip(" \t\r\n,\ufeff").encode()):
        text = text.rstrip(" \t\r\n,").removesuffix("]")
    found = []
    place = _skip_between(text, 0)
    while place < len(text):
        try:
            end = _decoder.raw_decode(text, place)[1]
        except (ValueError, RecursionError) as error:
            raise JsonFaultError(RowFault.JSON_BROKEN, str(error)) from error
        found.append((load_json(text[place:end]), text[place:end]))
        place = _skip_between(text, end)
    return found


def _skip_between(text: str, place: int) -> int:
    found = _BETWEEN.match(text, place)
    return found.end() if found else place


# --- JSON as a whole -----------------------------------------------------------------------------------------------


def _read_whole(head: bytes, stream: BinaryIO, file: Path, source: str) -> Iterator[Row | Rejected]:
    raw = head + stream.read(max(_WHOLE - len(head), 0))
    if more := stream.read(1):
        if not _plain(raw[:_BLOCK]).startswith(b"["):
            raise DatasetParseFailedError(
                f"{file}: more than {_WHOLE:,} bytes of JSON that are neither a list nor lines",
                fix=f"Write one row a line: jq -c '.[] | .[]?' {file.name} > rows.jsonl",
            )
        yield from _read_list(_Joined(raw + more, stream), file, source)
        return
    text = _plain(raw)
    try:
        data = load_json(text)
    except JsonFaultError as fault:
        yield from _read_broken(raw, fault, file, source)
        return
    yield from _rows_of(data, text, file, source)


def _rows_of(data: Any, text: bytes, file: Path, source: str) -> Iterator[Row | Rejected]:
    items = data if isinstance(data, list) and not isinstance(to_row(1, data, source), Row) else None
    if isinstance(data, dict):
        items = _unwrap(data, file)
    if items is None:
        yield to_row(1, data, source, text)
        return
    for number, item in enumerate(items, start=1):
        yield to_row(number, item, source, "" if isinstance(item, dict) else dump_json(item))


def _read_broken(raw: bytes, fault: JsonFaultError, file: Path, source: str) -> Iterator[Row | Rejected]:
    """A file that isn't valid as a whole: values one after another, a field named twice, or really broken."""
    if fault.code is RowFault.DUPLICATE_KEYS:
        text = _plain(raw)
        if text.startswith(b"["):
            yield from _read_list(_Joined(raw, None), file, source)
        else:
            yield Rejected(1, fault.code, fault.reason, source, excerpt(text))
        return
    try:
        values = _split_values(raw)
    except JsonFaultError:
        if _plain(raw).startswith(b"["):
            yield from _read_list(_Joined(raw, None), file, source)
        fix = AS_UTF8 if fault.code is RowFault.NOT_UTF8 else None
        raise DatasetParseFailedError(f"{file}: {fault.reason}", fix=fix) from fault
    if len(values) == 1:
        yield from _rows_of(values[0][0], values[0][1].encode(), file, source)
        return
    for number, (value, shown) in enumerate(values, start=1):
        yield to_row(number, value, source, shown)


def _read_list(stream: Readable, file: Path, source: str) -> Iterator[Row | Rejected]:
    try:
        for number, item in enumerate(read_items(stream, LONGEST_LINE), start=1):
            yield parse_line(number, item.text.encode(errors="surrogatepass"), source)
    except BrokenListError as error:
        raise DatasetParseFailedError(f"{file}: broken JSON at {error}") from error


class _Joined:
    """What was read of a stream, and the rest of it."""

    def __init__(self, head: bytes, stream: BinaryIO | None) -> None:
        self._head, self._stream = head, stream

    def read(self, count: int) -> bytes:
        """At most ``count`` bytes; none at the end."""
        data, self._head = self._head[:count], self._head[count:]
        return data or (self._stream.read(count) if self._stream else b"")


def _unwrap(data: Mapping[str, Any], file: Path) -> list[Any] | None:
    """The rows that one object holds: a list under one name, or a list for each column; None where it is a row."""
    if any(is_known(name) for name in data):
        return _transpose(data)
    lists = {
        name: value
        for name, value in data.items()
        if isinstance(value, list) and value and all(isinstance(item, dict) for item in value)
    }
    if not lists:
        return None
    name = next((name for name in ("train", "data", "rows", "examples") if name in lists), next(iter(lists)))
    if others := [f"{other} ({len(rows):,} rows)" for other, rows in lists.items() if other != name]:
        warn_once(f"{file}: read: {name} ({len(lists[name]):,} rows); not read: {', '.join(others)}")
    return lists[name]


def _transpose(data: Mapping[str, Any]) -> list[dict[str, Any]] | None:
    """Rows of columns: ``{"question": ["a", "b"], "answer": ["c", "d"]}``, or pandas' ``{"question": {"0": "a"}}``."""
    columns = [[*value.values()] if _is_indexed(value) else value for value in data.values()]
    if not all(isinstance(column, list) and all(isinstance(one, str | None) for one in column) for column in columns):
        return None
    if len({len(column) for column in columns}) != 1 or not columns[0]:
        return None
    return [dict(zip(data, values, strict=True)) for values in zip(*columns, strict=True)]


def _is_indexed(value: Any) -> bool:
    return isinstance(value, dict) and all(name.isdecimal() for name in value)
