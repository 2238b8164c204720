"""Rows from tables: CSV and TSV as spreadsheets write them, workbooks, Parquet and Arrow files."""

from __future__ import annotations

import contextlib
import csv
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from datetime import date
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO, Final, NamedTuple

from bp_data.columns import is_known
from bp_data.errors import DatasetFormatUnsupportedError, DatasetParseFailedError, RowFault
from bp_data.example import Rejected, Row
from bp_data.json_rows import AS_UTF8, LONGEST_LINE, to_row
from bp_data.json_text import excerpt, warn_once

SEPARATORS: Final = (",", ";", "\t", "|")
_BOM: Final = "\ufeff"


class TableHead(NamedTuple):
    """What the first line of a CSV or TSV file says.

    Attributes:
        separator: The character between two fields.
        skipped: Lines before the header: Excel's ``sep=;``.
    """

    separator: str
    skipped: int


def find_separator(first: str, default: str = ",") -> TableHead:
    """The separator of a table by its header line.

    Spreadsheets of many countries separate with semicolons and still name the file .csv. The separator with which most
    names are known columns is taken; if none is known, the default if it separates anything, else what separates most.
    """
    declared = first.strip().lower().removeprefix(_BOM)
    if declared.startswith("sep=") and len(declared) == len("sep=") + 1:
        return TableHead(declared[-1], 1)
    if declared == "sep=":  # a tab, which strip() took
        return TableHead("\t", 1)
    order = (default, *(sign for sign in SEPARATORS if sign != default))
    names = {sign: _split_header(first, sign) for sign in order}
    known = {sign: sum(is_known(name.strip(" \ufeff")) for name in names[sign]) for sign in order}
    best = max(order, key=lambda sign: (known[sign], sign == default and len(names[sign]) > 1, len(names[sign])))
    return TableHead(best, 0)


def _split_header(line: str, separator: str) -> list[str]:
    try:
        return next(csv.reader([line], delimiter=separator), [])
    except csv.Error:
        return []


def read_csv(stream: BinaryIO, file: Path, source: str, *, default: str = ",") -> Iterator[Row | Rejected]:
    """Rows of a CSV or TSV file, numbered by the line on which each begins.

    Raises:
        DatasetParseFailedError: A quote that is never closed, or a header that can't be used.
    """
    csv.field_size_limit(LONGEST_LINE)  # the library's own, 128 KiB, is less than many a document
    lines = _decode_lines(stream)
    before, first = _first_line(lines)
    separator, skipped = find_separator(first, default)
    before += skipped
    reader = csv.reader(chain([] if skipped else [first], lines), delimiter=separator, strict=True)
    header: _Header | None = None
    while True:
        number = before + reader.line_num + 1
        try:
            fields = next(reader, None)
        except csv.Error as error:
            fix = "Close every quote that is opened, or save the table as CSV again; such a file has no safe next row."
            message = f"{file}: broken CSV at line {before + reader.line_num}: {error}"
            raise DatasetParseFailedError(message, fix=fix) from error
        if fields is None:
            return
        if not any(field.strip(" \t\r\ufeff") for field in fields):
            continue
        if header is None:
            header = _Header(file, fields)
        else:
            yield header.to_row(number, fields, source, separator)


def _first_line(lines: Iterator[str]) -> tuple[int, str]:
    """How many blank lines there are before the first other one, and that one."""
    blank = 0
    for line in lines:
        if line.strip():
            return blank, line
        blank += 1
    return blank, ""


def _decode_lines(stream: BinaryIO) -> Iterator[str]:
    """Lines as texts; bytes that are not UTF-8 become lone surrogates, which no UTF-8 gives."""
    first = stream.readline(LONGEST_LINE)
    lines: Iterable[bytes] = chain([first], iter(lambda: stream.readline(LONGEST_LINE), b""))
    if b"\n" not in first and b"\r" in first.rstrip():  # CSV for old Macs has no line feeds at all
        lines = (piece + b"\n" for line in lines for piece in line.split(b"\r"))
    for line in lines:
        yield line.decode(errors="surrogateescape").removeprefix(_BOM)


def _find_stray_byte(text: str) -> int | None:
    """A byte that was not UTF-8."""
    if text.isascii():
        return None
    return next((ord(letter) - 0xDC00 for letter in text if "\udc80" <= letter <= "\udcff"), None)


class _Header:
    """The column names of a table; columns without a name may only be empty."""

    def __init__(self, file: Path, fields: Sequence[str]) -> None:
        names = [name.strip() for name in fields]
        while names and not names[-1]:
            names.pop()  # spreadsheets write a separator for each column that was ever touched
        if (byte := _find_stray_byte("".join(names))) is not None:
            message = f"{file}: the header has the byte 0x{byte:02x}, which is not UTF-8"
            raise DatasetParseFailedError(message, fix=AS_UTF8)
        if len(set(names)) < len(names):
            raise DatasetParseFailedError(f"{file}: the header names a column twice: {', '.join(names)}")
        self._names = names

    def to_row(self, number: int, fields: Sequence[str], source: str, separator: str) -> Row | Rejected:
        """A record as a row."""
        names, values = self._names, [*fields]
        while len(values) > len(names) and not values[-1].strip():
            values.pop()
        shown = excerpt(separator.join(fields).encode(errors="surrogateescape"))
        if len(values) != len(names):
            reason = f"{len(values)} fields, and the header has {len(names)}"
            return Rejected(number, RowFault.CSV_FIELDS, reason, source, shown)
        if [value.strip() for value in values] == names:
            reason = "the header is repeated, as if two files were joined"
            return Rejected(number, RowFault.CSV_FIELDS, reason, source, shown)
        for name, text in zip(names, values, strict=True):
            if (byte := _find_stray_byte(text)) is not None:
                reason = f"column {name!r}: byte 0x{byte:02x} is not UTF-8"
                return Rejected(number, RowFault.NOT_UTF8, reason, source, shown)
        return Row(number, dict(zip(names, values, strict=True)), source)


def read_workbook(stream: BinaryIO, file: Path, source: str) -> Iterator[Row | Rejected]:
    """Rows of the first sheet with data, numbered as the spreadsheet numbers them; cells are texts, as in CSV."""
    sheets = read_sheets(stream, file)
    filled = [(name, rows) for name, rows in sheets if rows]
    if others := [name for name, _ in filled[1:]]:
        warn_once(f"{file}: read: sheet {filled[0][0]}; not read: {', '.join(others)}")
    header: _Header | None = None
    for number, cells in enumerate(filled[0][1] if filled else [], start=1):
        fields = [_cell_text(cell) for cell in cells]
        if not any(field.strip() for field in fields):
            continue
        if header is None:
            header = _Header(file, fields)
        else:
            yield header.to_row(number, fields, source, "\t")


def read_sheets(stream: BinaryIO, file: Path) -> list[tuple[str, list[list[Any]]]]:
    """The sheets of a workbook with their cells, row by row.

    Raises:
        DatasetFormatUnsupportedError: python-calamine is not installed.
        DatasetParseFailedError: It is no workbook, or a damaged or locked one.
    """
    try:
        from python_calamine import CalamineError, CalamineWorkbook
    except ImportError as error:
        fix = "Install it: {install:bp-data[excel]}; or save the sheet as CSV."
        raise DatasetFormatUnsupportedError(f"{file.name}: reading workbooks needs python-calamine", fix=fix) from error
    try:
        with _seekable(file, stream) as whole:
            book = CalamineWorkbook.from_filelike(whole)
            return [(name, book.get_sheet_by_name(name).to_python(skip_empty_area=False)) for name in book.sheet_names]
    except (CalamineError, OSError, ValueError) as error:
        raise DatasetParseFailedError(f"{file}: broken workbook", cause=str(error)) from error


def _cell_text(cell: Any) -> str:
    if isinstance(cell, bool):
        return str(cell).lower()
    if isinstance(cell, float) and cell.is_integer():
        return str(int(cell))
    return cell.isoformat() if isinstance(cell, date) else str(cell)


def read_parquet(stream: BinaryIO, file: Path, source: str) -> Iterator[Row | Rejected]:
    """Rows of a Parquet file."""
    yield from _read_batches(stream, file, source, kind="Parquet")


def read_arrow(stream: BinaryIO, file: Path, source: str) -> Iterator[Row | Rejected]:
    """Rows of an Arrow file, as `datasets.Dataset.save_to_disk` writes it."""
    yield from _read_batches(stream, file, source, kind="Arrow")


def _read_batches(stream: BinaryIO, file: Path, source: str, *, kind: str) -> Iterator[Row | Rejected]:
    try:
        from pyarrow import ArrowException, ipc, parquet  # type: ignore[import-untyped]
    except ImportError as error:
        raise DatasetFormatUnsupportedError(
            f"{file.name}: reading {kind} needs pyarrow", fix="Install it: {install:bp-data[parquet]}"
        ) from error
    number = 0
    try:
        with _seekable(file, stream) as whole:
            if kind == "Parquet":
                batches = parquet.ParquetFile(whole).iter_batches(batch_size=512)
            else:
                batches = _arrow_batches(ipc, whole)
            for batch in batches:
                for data in batch.to_pylist():
                    number += 1
                    yield to_row(number, _without_fillers(data), source)
    except (ArrowException, OSError, UnicodeDecodeError) as error:
        raise DatasetParseFailedError(f"{file}: broken {kind} after row {number}", cause=str(error)) from error


def _arrow_batches(ipc: Any, whole: Any) -> Iterator[Any]:
    """Batches of either of Arrow's two forms: the stream, or the file with an index at its end."""
    is_file = whole.read(6) == b"ARROW1"
    whole.seek(0)
    if not is_file:
        yield from ipc.open_stream(whole)
        return
    reader = ipc.open_file(whole)
    yield from (reader.get_batch(place) for place in range(reader.num_record_batches))


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
    """These files are read from their end, so a packed one is unpacked first, to a temporary place."""
    if file.suffix.lower() not in (".gz", ".zst"):
        return contextlib.nullcontext(stream)
    copy = tempfile.SpooledTemporaryFile(LONGEST_LINE)  # noqa: SIM115 - it is given away
    try:
        shutil.copyfileobj(stream, copy)
    except BaseException:
        copy.close()
        raise
    copy.seek(0)
    return copy
