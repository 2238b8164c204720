"""Data files on disk: which kinds there are, those of a folder, and their bytes with any compression taken off."""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import io
import sys
import zlib
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any, BinaryIO, Final, Literal, TypeAlias, cast

from bp_data.errors import (
    DatasetFormatUnsupportedError,
    DatasetNotFoundError,
    DatasetParseFailedError,
    DatasetUnreadableError,
)

Kind: TypeAlias = Literal[".jsonl", ".json", ".csv", ".txt", ".md", ".parquet"]

KINDS: Final[tuple[Kind, ...]] = (".jsonl", ".json", ".csv", ".txt", ".md", ".parquet")
PACKED: Final = (".gz", ".zst")
UNDERSTOOD: Final = (*KINDS, *PACKED)
"""Endings of the files that are understood; the last two stand after one of the others: ``.jsonl.gz``."""

_HEAD = 65_536  # bytes looked at before the first row
_BLOCK = 1 << 20
_MAGICS = {
    b"\x1f\x8b": "gzip data",
    b"\x28\xb5\x2f\xfd": "Zstandard data",
    b"PK\x03\x04": "a zip archive",
    b"PAR1": "a Parquet file",
    b"\xff\xfe": "UTF-16 text",
    b"\xfe\xff": "UTF-16 text",
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


def list_files(path: Path) -> list[Path]:
    """The file itself, or all data files below a folder in the order of their names; hidden ones are left aside.

    Raises:
        DatasetNotFoundError: Nothing has this path.
        DatasetFormatUnsupportedError: An unknown kind of file, or a folder without any known one.
    """
    with coded_read_errors(path):
        if not path.is_dir():
            if not path.exists():
                raise DatasetNotFoundError(f"there is no file {path}")
            kind_of(path)
            return [path]
        found = sorted(file for file in path.rglob("*") if file.is_file() and _is_data(file.relative_to(path)))
    if not found:
        raise DatasetFormatUnsupportedError(f"the folder {path} holds no data file ({', '.join(KINDS)})")
    return found


def _is_data(path: Path) -> bool:
    if any(part.startswith((".", "_")) for part in path.parts):
        return False
    # A folder often holds what describes the data beside the data itself.
    if path.name.lower() in {"readme.md", "license.txt", "license.md", "dataset_infos.json", "dataset_info.json"}:
        return False
    try:
        kind_of(path)
    except DatasetFormatUnsupportedError:
        return False
    return True


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
    except ValueError as error:
        if "null" not in str(error):
            raise
        raise DatasetUnreadableError(f"cannot read {str(path)!r}", cause=str(error)) from error


@contextlib.contextmanager
def open_data(path: Path) -> Iterator[io.BufferedReader]:
    """The file's bytes, unpacked on the way; memory stays flat.

    Raises:
        DatasetParseFailedError: Binary data under the name of a text, or not what its ending says.
    """
    with path.open("rb") as raw:
        stream = _unpack(path, raw)
        try:
            if kind_of(path) != ".parquet":
                _refuse_binary(path, stream.peek(_HEAD)[:_HEAD])
            yield stream
        finally:
            if stream is not raw:
                stream.close()


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


def _refuse_binary(path: Path, head: bytes) -> None:
    found = next((what for magic, what in _MAGICS.items() if head.startswith(magic)), None)
    if found is None and b"\x00" in head:
        found = f"binary data (a zero byte at offset {head.index(0)})"
    if found is not None:
        raise DatasetParseFailedError(
            f"{path} is {found}, not UTF-8 text",
            fix="Save or unpack it as UTF-8 text, or give it the ending that it should have.",
        )


def load_zstd() -> Any:
    """Python's own Zstandard module, which versions before 3.14 have as the package backports.zstd."""
    return import_module("compression.zstd" if sys.version_info >= (3, 14) else "backports.zstd")


class _ZstdFile(io.RawIOBase):
    """Zstandard frames, unpacked block by block; data that ends inside a frame is an error and no end of file."""

    def __init__(self, raw: BinaryIO) -> None:
        zstd = load_zstd()
        self._raw = raw
        self._error = zstd.ZstdError
        self._new = zstd.ZstdDecompressor
        self._frame = self._new()
        self._begun = False
        self._ready = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        while not self._ready:
            if self._frame.eof:
                fed = self._frame.unused_data or self._raw.read(_HEAD)
                self._frame, self._begun = self._new(), False
            else:
                fed = self._raw.read(_HEAD)
            if not fed:
                if self._begun:
                    raise EOFError("the data ends inside a Zstandard frame")
                return 0
            self._begun = True
            try:
                self._ready = self._frame.decompress(fed)
            except self._error as error:
                raise EOFError(str(error)) from error
        count = min(len(buffer), len(self._ready))
        buffer[:count] = self._ready[:count]
        self._ready = self._ready[count:]
        return count


def sha256_data(path: Path) -> str:
    """Hex SHA-256 of a file's bytes as they lie on the disk; of a folder, of its files' names and hashes."""
    files = list_files(path)
    with coded_read_errors(path):
        if files == [path]:
            return _sha256(path)
        whole = hashlib.sha256()
        for file in files:
            whole.update(f"{file.relative_to(path).as_posix()}\0{_sha256(file)}\n".encode())
    return whole.hexdigest()


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
