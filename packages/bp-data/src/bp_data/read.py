"""Rows from a file on disk, each with its place, and the good ones apart from the broken."""

from __future__ import annotations

import csv
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, Final

import orjson

from bp_data.errors import (
    DatasetEmptyError,
    DatasetFormatUnsupportedError,
    DatasetNotFoundError,
    DatasetParseFailedError,
    DatasetUnreadableError,
    RowFault,
)
from bp_data.example import Rejected, Row

UNDERSTOOD: Final = (".jsonl", ".json", ".csv")
"""Endings of the files that are understood."""

_BOM = b"\xef\xbb\xbf"
_HEAD = 65_536  # bytes looked at before the first row
_MAGICS = {
    b"\x1f\x8b": "gzip data",
    b"\x28\xb5\x2f\xfd": "Zstandard data",
    b"PK\x03\x04": "a zip archive",
    b"PAR1": "a Parquet file",
    b"\xff\xfe": "UTF-16 text",
    b"\xfe\xff": "UTF-16 text",
}


def read_rows(path: str | Path) -> Iterator[Row | Rejected]:
    """Read a data file row by row.

    .jsonl and .csv are streamed; a .json list is held whole. A .json file with one object a line is read as .jsonl.
    Blank lines are no rows. A byte order mark and CRLF line ends are fine; text is UTF-8.

    Yields:
        `Row` for each row that is an object, `Rejected` for each that cannot be read.

    Raises:
        DatasetNotFoundError: No such file.
        DatasetUnreadableError: The system refuses to read it.
        DatasetFormatUnsupportedError: A folder, or a file name ending in none of `UNDERSTOOD`.
        DatasetParseFailedError: Binary data, or a .json or .csv file that is broken as a whole.
        DatasetEmptyError: No rows in it.
    """
    path = Path(path)
    empty = True
    try:
        kind = _kind(path)
        with path.open("rb") as file:
            _refuse_binary(path, file)
            for row in _READERS[kind](path, file):
                empty = False
                yield row
    except OSError as error:
        raise DatasetUnreadableError(f"cannot read {path}", cause=str(error)) from error
    if empty:
        raise DatasetEmptyError(f"{path} has no rows")


def place_of(path: str | Path, number: int) -> str:
    """How a person finds row ``number`` of the file: by its line, or by its position in a list."""
    return f"row {number}" if Path(path).suffix.lower() == ".json" else f"line {number}"


def _kind(path: Path) -> str:
    understood = ", ".join(UNDERSTOOD)
    if path.is_dir():
        raise DatasetFormatUnsupportedError(f"{path} is a folder; give one file ({understood})")
    if not path.exists():
        raise DatasetNotFoundError(f"there is no file {path}")
    if path.suffix.lower() not in _READERS:
        raise DatasetFormatUnsupportedError(f"{path.name}: understood are {understood}")
    return path.suffix.lower()


def _refuse_binary(path: Path, file: BinaryIO) -> None:
    head = file.read(_HEAD)
    file.seek(0)
    found = next((what for magic, what in _MAGICS.items() if head.startswith(magic)), None)
    if found is None and b"\x00" in head:
        found = f"binary data (a zero byte at offset {head.index(0)})"
    if found is not None:
        raise DatasetParseFailedError(
            f"{path} is {found}, not UTF-8 text", way_out="Save or unpack it as UTF-8 text: .jsonl, .json or .csv."
        )


def _read_jsonl(_path: Path, file: BinaryIO) -> Iterator[Row | Rejected]:
    for number, line in enumerate(file, start=1):
        text = line.removeprefix(_BOM) if number == 1 else line
        if text.strip():
            yield _parse_line(number, text.rstrip(b"\r\n"))


def _parse_line(number: int, line: bytes) -> Row | Rejected:
    try:
        line.decode()
    except UnicodeDecodeError as error:
        column = len(line[: error.start].decode()) + 1
        reason = f"column {column}: byte 0x{line[error.start]:02x} is not UTF-8"
        return Rejected(number, RowFault.NOT_UTF8, reason)
    try:
        data = orjson.loads(line)
    except orjson.JSONDecodeError as error:
        hint = "; a list over several lines belongs into a .json file" if line.strip() == b"[" else ""
        return Rejected(number, RowFault.JSON_BROKEN, f"broken JSON at column {error.colno}: {error.msg}{hint}")
    return _to_row(number, data)


def _to_row(number: int, data: Any) -> Row | Rejected:
    if isinstance(data, dict):
        return Row(number, data)
    return Rejected(number, RowFault.NOT_OBJECT, f"the row is {name_type(data)}, not an object with named fields")


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


def _read_json(path: Path, file: BinaryIO) -> Iterator[Row | Rejected]:
    raw = file.read().removeprefix(_BOM)
    if not raw.strip():
        return
    try:
        data = orjson.loads(raw)
    except orjson.JSONDecodeError as error:
        if not _is_line_wise(raw):
            message = f"{path}: broken JSON at line {error.lineno}, column {error.colno}: {error.msg}"
            raise DatasetParseFailedError(message) from error
        file.seek(0)
        yield from _read_jsonl(path, file)
        return
    items = data if isinstance(data, list) else [data]
    yield from (_to_row(number, item) for number, item in enumerate(items, start=1))


def _is_line_wise(raw: bytes) -> bool:
    first = raw.lstrip().partition(b"\n")[0]
    try:
        return isinstance(orjson.loads(first), dict)
    except orjson.JSONDecodeError:
        return False


def _read_csv(path: Path, file: BinaryIO) -> Iterator[Row | Rejected]:
    reader = csv.reader(_decode_lines(path, file), strict=True)
    header: list[str] | None = None
    while True:
        number = reader.line_num + 1
        try:
            fields = next(reader, None)
        except csv.Error as error:
            raise DatasetParseFailedError(f"{path}: broken CSV at line {reader.line_num}: {error}") from error
        if fields is None:
            return
        if not fields:
            continue
        if header is None:
            header = _check_header(path, fields)
        else:
            yield _pair(number, header, fields)


def _decode_lines(path: Path, file: BinaryIO) -> Iterator[str]:
    for number, line in enumerate(file, start=1):
        try:
            yield (line.removeprefix(_BOM) if number == 1 else line).decode()
        except UnicodeDecodeError as error:
            reason = f"{path}: line {number}, byte {error.start + 1}: 0x{line[error.start]:02x} is not UTF-8"
            raise DatasetParseFailedError(reason) from error


def _check_header(path: Path, fields: list[str]) -> list[str]:
    names = [name.strip() for name in fields]
    if len(set(names)) < len(names):
        raise DatasetParseFailedError(f"{path}: the header names a column twice: {', '.join(names)}")
    return names


def _pair(number: int, header: list[str], fields: list[str]) -> Row | Rejected:
    if len(fields) != len(header):
        return Rejected(number, RowFault.CSV_FIELDS, f"{len(fields)} fields, and the header has {len(header)}")
    return Row(number, dict(zip(header, fields, strict=True)))


_READERS = {".jsonl": _read_jsonl, ".json": _read_json, ".csv": _read_csv}
