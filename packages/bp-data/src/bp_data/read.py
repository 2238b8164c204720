"""Rows from files on disk, each with its place, and the good ones apart from the broken."""

from __future__ import annotations

import contextlib
import csv
import json
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, Final

import orjson

from bp_data.errors import DatasetEmptyError, DatasetFormatUnsupportedError, DatasetParseFailedError, RowFault
from bp_data.example import Rejected, Row
from bp_data.files import UNDERSTOOD, Kind, coded_read_errors, kind_of, list_files, open_data
from bp_data.json_items import BrokenListError, read_items

__all__ = ["LONGEST_LINE", "UNDERSTOOD", "locate_row", "name_type", "read_rows"]

LONGEST_LINE: Final = 64 * 2**20
"""Bytes; a longer line, list item or document is rejected and never held in memory whole."""

AS_UTF8: Final = (
    "Save the file as UTF-8: iconv -f ISO-8859-1 -t UTF-8 my.csv > my-utf8.csv; "
    "or skip such rows: {set:data.on_bad_row=skip}"
)
"""What to do about bytes that are not UTF-8."""

_BOM = b"\xef\xbb\xbf"
_EXCERPT = 80  # characters
_WHOLE = 32 * 2**20  # bytes of a .json file up to which it is parsed at once
# A quote that ends a text and a colon: an object's key. Inside a text a quote has a backslash before it.
_KEY = re.compile(rb'[^\\]"[ \t\r\n]*:')


def read_rows(path: str | Path) -> Iterator[Row | Rejected]:
    """Read a data file, or the data files of a folder, row by row; memory stays flat.

    .gz and .zst are unpacked on the way. A .json file holds a list, one object, or one object a line. A .txt or .md
    file is one row with its ``text``. Blank lines are no rows. A byte order mark and CRLF are fine; text is UTF-8.

    Yields:
        `Row` for each row that is an object, `Rejected` for each that cannot be read.

    Raises:
        DatasetNotFoundError: No such file.
        DatasetUnreadableError: The system refuses to read it.
        DatasetFormatUnsupportedError: A file name ending in none of `UNDERSTOOD`; a folder without data files;
            Parquet where pyarrow is not installed.
        DatasetParseFailedError: Binary data, damaged compression, or a file that is broken as a whole.
        DatasetEmptyError: No rows in it.
    """
    path = Path(path)
    empty = True
    for file in list_files(path):
        source = file.name if file == path else file.relative_to(path).as_posix()
        for row in _read_file(file, source):
            empty = False
            yield row
    if empty:
        raise DatasetEmptyError(f"{path} has no rows")


def _read_file(file: Path, source: str) -> Iterator[Row | Rejected]:
    kind = kind_of(file)
    with coded_read_errors(file), open_data(file) as stream:
        yield from _READERS[kind](file, stream, source)


def locate_row(path: str | Path, number: int) -> str:
    """How a person finds row ``number`` of a file: by its line, or by its position in a list."""
    name = str(path).lower()
    for ending in (".gz", ".zst"):
        name = name.removesuffix(ending)
    return f"row {number}" if name.endswith((".json", ".parquet", ".txt", ".md")) else f"line {number}"


def _read_jsonl(_file: Path, stream: BinaryIO, source: str) -> Iterator[Row | Rejected]:
    number = 0
    while line := stream.readline(LONGEST_LINE):
        number += 1
        text = line.removeprefix(_BOM) if number == 1 else line
        if len(line) == LONGEST_LINE and not line.endswith(b"\n"):
            size = len(line) + _skip_line(stream)
            yield _too_long(number, size, text, source)
        elif text.strip():
            yield parse_line(number, text.rstrip(b"\r\n"), source)


def _skip_line(stream: BinaryIO) -> int:
    skipped = 0
    while piece := stream.readline(_WHOLE):
        skipped += len(piece)
        if piece.endswith(b"\n"):
            break
    return skipped


def _too_long(number: int, size: int, start: bytes, source: str) -> Rejected:
    reason = f"it has {size:,} bytes; the longest row that is read has {LONGEST_LINE:,}"
    return Rejected(number, RowFault.TOO_LONG, reason, source, excerpt(start[:_EXCERPT]))


def excerpt(line: bytes | str) -> str:
    """The beginning of a line, for a person who looks for it."""
    text = line[: 4 * _EXCERPT].decode(errors="replace") if isinstance(line, bytes) else line
    return text if len(text) <= _EXCERPT else text[: _EXCERPT - 1] + "…"


def parse_line(number: int, line: bytes, source: str = "") -> Row | Rejected:
    """One line of JSON as a row."""
    try:
        data = orjson.loads(line)
    except orjson.JSONDecodeError as error:
        return _broken(number, line, source, error)
    if isinstance(data, dict) and (twice := _key_twice(line, data)) is not None:
        reason = f"the field {excerpt(twice)!r} is named twice in one object, and one of its values would be lost"
        return Rejected(number, RowFault.DUPLICATE_KEYS, reason, source, excerpt(line))
    return _to_row(number, data, source, line)


def _broken(number: int, line: bytes, source: str, error: orjson.JSONDecodeError) -> Rejected:
    try:
        line.decode()
    except UnicodeDecodeError as wrong:
        column = len(line[: wrong.start].decode()) + 1
        reason = f"column {column}: byte 0x{line[wrong.start]:02x} is not UTF-8"
        return Rejected(number, RowFault.NOT_UTF8, reason, source, excerpt(line))
    hint = "; a list over several lines belongs into a .json file" if line.strip() == b"[" else ""
    reason = f"broken JSON at column {error.colno}: {error.msg}{hint}"
    return Rejected(number, RowFault.JSON_BROKEN, reason, source, excerpt(line))


def _key_twice(line: bytes, data: dict[str, Any] | list[Any]) -> str | None:
    """A key that an object of the line names twice; None where there is none."""
    if len(_KEY.findall(line)) <= _count_keys(data):
        return None
    try:
        json.loads(line, object_pairs_hook=_refuse_twice)
    except _TwiceError as error:
        return str(error)
    except (ValueError, RecursionError):
        return None
    return None


def _count_keys(data: dict[str, Any] | list[Any]) -> int:
    count = 0
    left: list[Any] = [data]
    while left:
        item = left.pop()
        if isinstance(item, dict):
            count += len(item)
            left += [value for value in item.values() if type(value) in (dict, list)]
        else:
            left += [value for value in item if type(value) in (dict, list)]
    return count


class _TwiceError(Exception):
    pass


def _refuse_twice(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise _TwiceError(next(name for place, name in enumerate(names) if name in names[:place]))
    return found


def _to_row(number: int, data: Any, source: str, raw: bytes | str = b"") -> Row | Rejected:
    if isinstance(data, dict):
        return Row(number, data, source)
    reason = f"the row is {name_type(data)}, not an object with named fields"
    return Rejected(number, RowFault.NOT_OBJECT, reason, source, excerpt(raw))


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


def _read_json(file: Path, stream: BinaryIO, source: str) -> Iterator[Row | Rejected]:
    raw = stream.read(_WHOLE).removeprefix(_BOM)
    if stream.read(1):
        yield from _read_long_json(file, raw, source)
        return
    if not raw.strip():
        return
    try:
        data = orjson.loads(raw)
    except orjson.JSONDecodeError as error:
        if not _is_line_wise(raw):
            message = f"{file}: broken JSON at line {error.lineno}, column {error.colno}: {error.msg}"
            raise DatasetParseFailedError(message) from error
        yield from _read_again(file, source)
        return
    if (twice := _twice_somewhere(raw, data)) is not None:
        yield from _read_list(file, source) if isinstance(data, list) else [_twice(1, twice, raw, source)]
        return
    items = data if isinstance(data, list) else [data]
    for number, item in enumerate(items, start=1):
        yield _to_row(number, item, source, "" if isinstance(item, dict) else orjson.dumps(item))


def _twice_somewhere(raw: bytes, data: Any) -> str | None:
    return _key_twice(raw, data) if isinstance(data, dict | list) else None


def _twice(number: int, name: str, raw: bytes, source: str) -> Rejected:
    reason = f"the field {excerpt(name)!r} is named twice in one object, and one of its values would be lost"
    return Rejected(number, RowFault.DUPLICATE_KEYS, reason, source, excerpt(raw))


def _read_long_json(file: Path, head: bytes, source: str) -> Iterator[Row | Rejected]:
    """A .json file that is too long to be parsed at once: a list, or one object a line."""
    if head.lstrip()[:1] == b"[":
        yield from _read_list(file, source)
    elif _is_line_wise(head):
        yield from _read_again(file, source)
    else:
        raise DatasetParseFailedError(f"{file}: more than {_WHOLE:,} bytes of JSON that are neither a list nor lines")


def _read_list(file: Path, source: str) -> Iterator[Row | Rejected]:
    with open_data(file) as stream:
        try:
            for number, item in enumerate(read_items(stream, LONGEST_LINE), start=1):
                yield parse_line(number, item.text.encode(errors="surrogatepass"), source)
        except BrokenListError as error:
            raise DatasetParseFailedError(f"{file}: broken JSON at {error}") from error


def _read_again(file: Path, source: str) -> Iterator[Row | Rejected]:
    with open_data(file) as stream:
        yield from _read_jsonl(file, stream, source)


def _is_line_wise(raw: bytes) -> bool:
    first = raw.lstrip().partition(b"\n")[0]
    try:
        return isinstance(orjson.loads(first), dict)
    except orjson.JSONDecodeError:
        return False


def _read_csv(file: Path, stream: BinaryIO, source: str) -> Iterator[Row | Rejected]:
    csv.field_size_limit(
        LONGEST_LINE
    )  # the library's own, 128 KiB, is less than many a document; it holds for all readers
    reader = csv.reader(_decode_lines(stream), strict=True)
    header: list[str] | None = None
    while True:
        number = reader.line_num + 1
        try:
            fields = next(reader, None)
        except csv.Error as error:
            fix = "Close every quote that is opened, or save the table as CSV again; such a file has no safe next row."
            message = f"{file}: broken CSV at line {reader.line_num}: {error}"
            raise DatasetParseFailedError(message, fix=fix) from error
        if fields is None:
            return
        if not fields:
            continue
        if header is None:
            header = _check_header(file, fields)
        else:
            yield _pair(number, header, fields, source)


def _decode_lines(stream: BinaryIO) -> Iterator[str]:
    """Lines as texts; bytes that are not UTF-8 stand in them as lone surrogates, which no UTF-8 gives."""
    line = stream.readline(LONGEST_LINE).removeprefix(_BOM)
    while line:
        yield line.decode(errors="surrogateescape")
        line = stream.readline(LONGEST_LINE)


def _find_stray_byte(text: str) -> int | None:
    """A byte that was not UTF-8."""
    if text.isascii():
        return None
    return next((ord(letter) - 0xDC00 for letter in text if "\udc80" <= letter <= "\udcff"), None)


def _check_header(file: Path, fields: list[str]) -> list[str]:
    names = [name.strip() for name in fields]
    if (byte := _find_stray_byte("".join(names))) is not None:
        raise DatasetParseFailedError(f"{file}: the header has the byte 0x{byte:02x}, which is not UTF-8", fix=AS_UTF8)
    if len(set(names)) < len(names):
        raise DatasetParseFailedError(f"{file}: the header names a column twice: {', '.join(names)}")
    return names


def _pair(number: int, header: list[str], fields: list[str], source: str) -> Row | Rejected:
    if len(fields) != len(header):
        reason = f"{len(fields)} fields, and the header has {len(header)}"
        shown = ",".join(fields).encode(errors="surrogateescape")
        return Rejected(number, RowFault.CSV_FIELDS, reason, source, excerpt(shown))
    for name, text in zip(header, fields, strict=True):
        if (byte := _find_stray_byte(text)) is not None:
            reason = f"column {name!r}: byte 0x{byte:02x} is not UTF-8"
            shown = ",".join(fields).encode(errors="surrogateescape")
            return Rejected(number, RowFault.NOT_UTF8, reason, source, excerpt(shown))
    return Row(number, dict(zip(header, fields, strict=True)), source)


def _read_document(_file: Path, stream: BinaryIO, source: str) -> Iterator[Row | Rejected]:
    """A whole file as one row, so that its number is 1."""
    raw = stream.read(LONGEST_LINE).removeprefix(_BOM)
    if more := stream.read(1):
        size = len(raw) + len(more)
        while piece := stream.read(_WHOLE):
            size += len(piece)
        yield _too_long(1, size, raw, source)
        return
    if not raw.strip():
        return
    try:
        yield Row(1, {"text": raw.decode()}, source)
    except UnicodeDecodeError as error:
        line = raw[: error.start].count(b"\n") + 1
        reason = f"line {line}: byte 0x{raw[error.start]:02x} is not UTF-8"
        yield Rejected(1, RowFault.NOT_UTF8, reason, source, excerpt(raw))


def _read_parquet(file: Path, stream: BinaryIO, source: str) -> Iterator[Row | Rejected]:
    try:
        from pyarrow import ArrowException, parquet  # type: ignore[import-untyped]
    except ImportError as error:
        raise DatasetFormatUnsupportedError(
            f"{file.name}: reading Parquet needs pyarrow", fix="Install it: {install:bp-data[parquet]}"
        ) from error
    number = 0
    try:
        with _seekable(file, stream) as whole:
            for batch in parquet.ParquetFile(whole).iter_batches(batch_size=512):
                for data in batch.to_pylist():
                    number += 1
                    yield _to_row(number, _without_fillers(data), source)
    except (ArrowException, OSError, UnicodeDecodeError) as error:
        raise DatasetParseFailedError(f"{file}: broken Parquet after row {number}", cause=str(error)) from error


def _without_fillers(value: Any) -> Any:
    """A value without the nulls of its objects: a table gives each object the fields of all, null where one has none.

    Left in, they would be taught: a tool call would get the arguments of every other tool.
    """
    if isinstance(value, dict):
        return {name: _without_fillers(one) for name, one in value.items() if one is not None}
    if isinstance(value, list):
        return [_without_fillers(one) for one in value]
    return value


def _seekable(file: Path, stream: BinaryIO) -> contextlib.AbstractContextManager[Any]:
    """Parquet is read from its end, so a packed file is unpacked first, to a temporary place."""
    if file.suffix.lower() == ".parquet":
        return contextlib.nullcontext(stream)
    copy = tempfile.SpooledTemporaryFile(LONGEST_LINE)  # noqa: SIM115 - it is given away
    try:
        shutil.copyfileobj(stream, copy)
    except BaseException:
        copy.close()
        raise
    copy.seek(0)
    return copy


_READERS: Mapping[Kind, Any] = {
    ".jsonl": _read_jsonl,
    ".json": _read_json,
    ".csv": _read_csv,
    ".txt": _read_document,
    ".md": _read_document,
    ".parquet": _read_parquet,
}
