"""Data files on disk: which kinds there are, and their bytes, unpacked and as UTF-8."""

from __future__ import annotations

import codecs
import contextlib
import gzip
import io
import sys
import zlib
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any, BinaryIO, Final, Literal, TypeAlias, cast, get_args

from bp_data.errors import (
    DatasetFormatUnsupportedError,
    DatasetParseFailedError,
    DatasetUnreadableError,
)

Kind: TypeAlias = Literal[
    ".jsonl",
    ".ndjson",
    ".json",
    ".csv",
    ".tsv",
    ".xlsx",
    ".xlsm",
    ".xlsb",
    ".xls",
    ".ods",
    ".parquet",
    ".arrow",
    ".txt",
    ".md",
]

KINDS: Final[tuple[Kind, ...]] = get_args(Kind)
WORKBOOKS: Final = (".xlsx", ".xlsm", ".xlsb", ".xls", ".ods")
PACKED: Final = (".gz", ".zst")
UNDERSTOOD: Final = (*KINDS, *PACKED)
"""Endings of the files that are understood; the last two stand after one of the others: ``.jsonl.gz``."""

_BINARY: Final = (".parquet", ".arrow", *WORKBOOKS)
_HEAD = 65_536  # bytes looked at before the first row
_BLOCK = 1 << 20
_LONGEST = 64 * 2**20
_MAGICS = {
    b"\x1f\x8b": "gzip data",
    b"\x28\xb5\x2f\xfd": "Zstandard data",
    b"PK\x03\x04": "a zip archive or a workbook",
    b"PAR1": "a Parquet file",
    b"ARROW1": "an Arrow file",
    b"\xd0\xcf\x11\xe0": "an old Excel workbook",
    b"%PDF": "a PDF file",
    b"SQLite format 3": "an SQLite database",
}
_WIDE_MARKS = {
    b"\xff\xfe\x00\x00": "utf-32",
    b"\x00\x00\xfe\xff": "utf-32",
    b"\xff\xfe": "utf-16",
    b"\xfe\xff": "utf-16",
}


def kind_of(path: Path) -> Kind:
    """The kind of a file by its name, whatever it is packed with.

    Raises:
        DatasetFormatUnsupportedError: A name that ends in none of `UNDERSTOOD`.
    """
    name = path.name.lower()
    for ending in PACKED:
        name = name.removesuffix(ending)
    for kind in KINDS:
        if name.endswith(kind) and name != kind:
            return kind
    raise DatasetFormatUnsupportedError(f"{path.name}: understood are {', '.join(KINDS)}, also with .gz or .zst")


@contextlib.contextmanager
def coded_read_errors(path: Path) -> Iterator[None]:
    """Turn the system's errors while reading ``path``, and damaged compression, into coded ones."""
    try:
        yield
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        what = "its compressed data is cut short or damaged"
        raise DatasetParseFailedError(
            f"{path}: {what}", cause=str(error), fix="Download or pack the file again; it is not whole."
        ) from error
    except OSError as error:
        raise DatasetUnreadableError(f"cannot read {path}", cause=str(error)) from error
    except UnicodeError as error:
        raise DatasetParseFailedError(f"{path}: its text is damaged", cause=str(error)) from error
    except ValueError as error:
        if "null" not in str(error):
            raise
        raise DatasetUnreadableError(f"cannot read {str(path)!r}", cause=str(error)) from error


@contextlib.contextmanager
def open_data(path: Path, encoding: str | None = None) -> Iterator[io.BufferedReader]:
    """The file's bytes, unpacked and as UTF-8; memory stays flat.

    Args:
        path: A file of a known kind.
        encoding: Of lines that are not UTF-8; None leaves such bytes as they are. UTF-16 and UTF-32 are found by
            themselves.

    Raises:
        DatasetParseFailedError: Binary data under the name of a text, or not what its ending says; while it is read,
            also damaged compression and damaged UTF-16.
        DatasetUnreadableError: The system can't read it.
    """
    with coded_read_errors(path), path.open("rb") as raw:
        stream = _unpack(path, raw)
        unpacked = stream
        try:
            if kind_of(path) not in _BINARY:
                head = stream.peek(_HEAD)[:_HEAD]
                wide = _find_wide(head)
                if wide is not None:
                    stream = io.BufferedReader(_Recoded(stream, wide), _BLOCK)
                else:
                    _reject_binary(path, head)
                    stream = stream if encoding is None else io.BufferedReader(_LinesRecoded(stream, encoding), _BLOCK)
            yield stream
        finally:
            if unpacked is not raw:
                unpacked.close()


def find_encoding(path: Path) -> str:
    """``utf-8``, ``utf-16`` or ``utf-32`` by a file's first bytes; they don't tell other encodings from UTF-8."""
    with coded_read_errors(path), path.open("rb") as raw, _unpack(path, raw) as stream:
        return _find_wide(stream.peek(_HEAD)[:_HEAD]) or "utf-8"


def _find_wide(head: bytes) -> str | None:
    """UTF-16 or UTF-32 by its mark, or by the zero bytes that letters of Latin alphabets have at every other place."""
    found = next((name for mark, name in _WIDE_MARKS.items() if head.startswith(mark)), None)
    if found is not None or b"\x00" not in head or len(head) < 8 or _find_magic(head):
        return found
    even, odd = head[0::2], head[1::2]
    zeros = (even.count(0) / max(len(even), 1), odd.count(0) / max(len(odd), 1))
    if min(zeros) > 0.02 or max(zeros) < 0.4:
        return None
    return "utf-16-be" if zeros[0] > zeros[1] else "utf-16-le"


def _unpack(path: Path, raw: BinaryIO) -> io.BufferedReader:
    ending = path.suffix.lower()
    if ending == ".gz":
        _require_magic(path, raw, b"\x1f\x8b", "gzip")
        return io.BufferedReader(cast("io.RawIOBase", gzip.GzipFile(fileobj=raw)), _BLOCK)
    if ending == ".zst":
        _require_magic(path, raw, b"\x28\xb5\x2f\xfd", "Zstandard")
        return io.BufferedReader(_ZstdFile(raw), _BLOCK)
    return io.BufferedReader(cast("io.RawIOBase", raw), _BLOCK)


def _require_magic(path: Path, raw: BinaryIO, magic: bytes, name: str) -> None:
    head = raw.read(len(magic))
    raw.seek(0)
    if head and head != magic:
        raise DatasetParseFailedError(f"{path} is not {name} data", fix=f"Pack it again, or drop {path.suffix}.")


def _find_magic(head: bytes) -> str | None:
    return next((what for magic, what in _MAGICS.items() if head.startswith(magic)), None)


def _reject_binary(path: Path, head: bytes) -> None:
    found = _find_magic(head)
    if found is None and b"\x00" in head:
        found = f"binary data (a zero byte at offset {head.index(0)})"
    if found is not None:
        raise DatasetParseFailedError(
            f"{path} is {found}, not text", fix="Rename the file to the ending that it should have, or save it as text."
        )


def load_zstd() -> Any:
    """Python's own Zstandard module, which versions before 3.14 have as the package backports.zstd."""
    return import_module("compression.zstd" if sys.version_info >= (3, 14) else "backports.zstd")


class _Filter(io.RawIOBase):
    """Bytes made from other bytes, block by block; `_next` gives a block, and an empty one at the end."""

    _ready = b""

    def _next(self) -> bytes:
        raise NotImplementedError

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        self._ready = self._ready or self._next()
        count = min(len(buffer), len(self._ready))
        buffer[:count] = self._ready[:count]
        self._ready = self._ready[count:]
        return count


class _Recoded(_Filter):
    """Text of an encoding that is known, as UTF-8."""

    def __init__(self, stream: BinaryIO, encoding: str) -> None:
        self._stream = stream
        self._decoder = codecs.getincrementaldecoder(encoding)()

    def _next(self) -> bytes:
        while data := self._stream.read(_HEAD):
            if text := self._decoder.decode(data):
                return text.encode()
        return self._decoder.decode(b"", final=True).encode()


class _LinesRecoded(_Filter):
    """Text as UTF-8, of which each line may be in another encoding; lines that are neither stay as they are."""

    def __init__(self, stream: BinaryIO, encoding: str) -> None:
        self._stream, self._encoding = stream, encoding

    def _next(self) -> bytes:
        line = self._stream.readline(_LONGEST)  # never cut inside a letter
        try:
            line.decode()
        except UnicodeDecodeError:
            with contextlib.suppress(UnicodeDecodeError):
                return line.decode(self._encoding).encode()
        return line


class _ZstdFile(_Filter):
    """Zstandard frames, unpacked block by block; data that ends inside a frame is an error and no end of file."""

    def __init__(self, raw: BinaryIO) -> None:
        zstd = load_zstd()
        self._raw = raw
        self._error = zstd.ZstdError
        self._new = zstd.ZstdDecompressor
        self._frame = self._new()
        self._begun = False

    def _next(self) -> bytes:
        while True:
            if self._frame.eof:
                fed = self._frame.unused_data or self._raw.read(_HEAD)
                self._frame, self._begun = self._new(), False
            else:
                fed = self._raw.read(_HEAD)
            if not fed:
                if self._begun:
                    raise EOFError("the data ends inside a Zstandard frame")
                return b""
            self._begun = True
            try:
                if ready := self._frame.decompress(fed):
                    return cast("bytes", ready)
            except self._error as error:
                raise EOFError(str(error)) from error
