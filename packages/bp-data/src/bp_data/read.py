"""Rows from files on disk, each with its place, and the good ones apart from the broken. Reading of data starts here.

`files` finds the data files of a folder and unpacks them. `json_rows` and `tables` turn their bytes into rows.
`formats` says what a row means, with the names of `columns`.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, Final, Literal

from bp_data import json_rows, tables
from bp_data.columns import ReadOptions
from bp_data.errors import DataError, DatasetEmptyError, RowFault
from bp_data.example import Rejected, Row
from bp_data.files import WORKBOOKS, kind_of, open_data
from bp_data.folders import list_files
from bp_data.json_rows import AS_UTF8
from bp_data.json_text import excerpt, name_type

__all__ = ["AS_UTF8", "excerpt", "locate_row", "name_type", "read_rows", "unit_of"]

_BOM: Final = b"\xef\xbb\xbf"
_BLOCK: Final = 1 << 20


def read_rows(
    path: str | Path, options: ReadOptions | None = None, *, files: Collection[Path] | None = None
) -> Iterator[Row | Rejected]:
    """Read a data file, or the data files of a folder, row by row; memory stays flat.

    Args:
        path: A file of one of `bp_data.files.KINDS`, perhaps packed, or a folder; see `bp_data.folders.find_files`. A
            .txt or .md file is one row with its ``text``. Text is UTF-8, or UTF-16.
        options: The encoding of bytes that are not UTF-8. Columns keep their names; `parse_row` maps them.
        files: Of a folder, read only these of its files.

    Yields:
        `Row` for each row that is an object, `Rejected` for each that cannot be read.

    Raises:
        DatasetNotFoundError: No such file.
        DatasetUnreadableError: The system can't read it.
        DatasetFormatUnsupportedError: An unknown kind of file; a folder without data files; or a kind that needs a
            library which is not installed.
        DatasetParseFailedError: Binary data, damaged compression, or a file that is broken as a whole.
        DatasetEmptyError: No rows in it.
    """
    path = Path(path)
    encoding = options.encoding if options else None
    empty = True
    for file in list_files(path):
        if files is not None and file not in files:
            continue
        source = file.name if file == path else file.relative_to(path).as_posix()
        with open_data(file, encoding) as stream:
            for row in _READERS[kind_of(file)](stream, file, source):
                empty = False
                yield row
    if empty:
        raise DatasetEmptyError(f"{path} has no rows")


def locate_row(path: str | Path, number: int) -> str:
    """How a person finds row ``number`` of a file: by its line, or by its position in a list or table."""
    return f"{unit_of(path)} {number}"


def unit_of(path: str | Path) -> Literal["line", "row"]:
    """Whether a file's rows are numbered by its lines, or by their position in a list or table."""
    file = Path(path)
    kind = kind_of(file)
    if kind in (".csv", ".tsv"):
        return "line"
    if kind not in (".jsonl", ".ndjson", ".json"):
        return "row"
    try:
        with open_data(file) as stream:
            return "row" if json_rows.find_layout(stream).layout == "whole" else "line"
    except DataError:
        return "line"


def _read_document(stream: BinaryIO, _file: Path, source: str) -> Iterator[Row | Rejected]:
    """A whole file as one row, so that its number is 1."""
    raw = stream.read(json_rows.LONGEST_LINE).removeprefix(_BOM)
    if more := stream.read(1):
        size = len(raw) + len(more)
        while piece := stream.read(_BLOCK):
            size += len(piece)
        yield json_rows.too_long(1, size, raw, source)
        return
    if not raw.strip():
        return
    try:
        yield Row(1, {"text": raw.decode()}, source)
    except UnicodeDecodeError as error:
        line = raw[: error.start].count(b"\n") + 1
        reason = f"line {line}: byte 0x{raw[error.start]:02x} is not UTF-8"
        yield Rejected(1, RowFault.NOT_UTF8, reason, source, excerpt(raw))


_READERS: Final[dict[str, Any]] = {
    ".jsonl": json_rows.read_json,
    ".ndjson": json_rows.read_json,
    ".json": json_rows.read_json,
    ".csv": tables.read_csv,
    ".tsv": partial(tables.read_csv, default="\t"),
    **dict.fromkeys(WORKBOOKS, tables.read_workbook),
    ".parquet": tables.read_parquet,
    ".arrow": tables.read_arrow,
    ".txt": _read_document,
    ".md": _read_document,
}
