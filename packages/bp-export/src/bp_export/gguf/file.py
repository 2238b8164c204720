"""GGUF files: a header written at once, tensors streamed after it, and a reader of the settings.

gguf-py's writer collects and encodes the settings and the tensor table; this module decides the layout and streams the
data, which gguf-py can only take a whole tensor at a time. The format: ggml's docs/gguf.md.
"""

from __future__ import annotations

import contextlib
import os
import struct
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

import numpy as np
from gguf import GGUF_DEFAULT_ALIGNMENT, GGUFWriter, Keys

from bp_export.errors import ChatFailedError
from bp_export.formats.hash_and_flush import HashAndFlush
from bp_export.local_paths import StrPath
from bp_export.quant.kernels import TensorType
from bp_runs.files import coded_disk_errors, fsync_folder, rename

MAGIC = b"GGUF"
# llama-quantize sets these two again, which moves them to the end, in this order.
_RESET_BY_QUANTIZER = (Keys.General.QUANTIZATION_VERSION, Keys.General.FILE_TYPE)

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9


def order_like_quantizer(writer: GGUFWriter) -> None:
    """Move the two settings that llama-quantize rewrites to the end."""
    settings = writer.kv_data[0]
    for key in _RESET_BY_QUANTIZER:
        settings[key] = settings.pop(key)


def align(size: int) -> int:
    """``size`` rounded up to the format's alignment."""
    return int(-(-size // GGUF_DEFAULT_ALIGNMENT) * GGUF_DEFAULT_ALIGNMENT)


class GgufStream:
    """One GGUF being written: whole at its path after `publish`, or not there at all.

    Args:
        path: Where the file will stand. It is written next to it, as ``.<name>.<pid>.partial``.
        writer: A gguf-py writer that holds the settings and the tensor table, and has no file yet.

    Raises:
        DiskFullError, OutputNotWritableError: As `bp_runs.files.coded_disk_errors`, from every method.
    """

    def __init__(self, path: Path, writer: GGUFWriter) -> None:
        self._path = path
        self._partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
        self._writer = writer
        self._file: IO[bytes] | None = None
        self._behind: HashAndFlush | None = None
        self._bytes = 0

    def __enter__(self) -> Self:
        try:
            with coded_disk_errors(self._path):
                self._path.parent.mkdir(parents=True, exist_ok=True)
                self._write_header()
        except BaseException:
            self._partial.unlink(missing_ok=True)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._behind is not None:
            self._behind.close()
        if self._file is not None:
            # On a full disk even the close fails, and the file is thrown away in any case.
            with contextlib.suppress(OSError):
                self._file.close()
        self._partial.unlink(missing_ok=True)

    def write_tensor(self, parts: Iterable[memoryview | bytes]) -> None:
        """Append the next tensor of the table and pad it."""
        start = self._bytes
        for part in parts:
            self._append(part)
        self._append(bytes(align(self._bytes - start) - (self._bytes - start)))

    def publish(self) -> tuple[int, str]:
        """Make the file durable and put it in its place; returns its bytes and hex SHA-256."""
        if self._file is None or self._behind is None:
            raise RuntimeError("the stream is not open")
        with coded_disk_errors(self._path):
            digest = self._behind.finish()
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
            rename(self._partial, self._path)
            fsync_folder(self._path.parent)
        return self._bytes, digest

    def _write_header(self) -> None:
        writer = self._writer
        writer.write_header_to_file(path=self._partial)
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        writer.close()
        header = self._partial.read_bytes()
        self._bytes = len(header)
        self._file = self._partial.open("ab")
        self._behind = HashAndFlush(self._file)
        self._behind.add(header)
        self._append(bytes(align(self._bytes) - self._bytes))

    def _append(self, part: memoryview | bytes) -> None:
        if self._file is None or self._behind is None:
            raise RuntimeError("the stream is not open")
        with coded_disk_errors(self._path):
            self._file.write(part)
            self._behind.add(part)
        self._bytes += len(part)


def name_split(path: Path, number: int, count: int) -> Path:
    """One file of several, as llama.cpp finds them: ``<name>-00001-of-00003.gguf``."""
    return path.with_name(f"{path.stem}-{number:05d}-of-{count:05d}{path.suffix}")


def add_tensor(writer: GGUFWriter, name: str, shape: tuple[int, ...], kind: TensorType, size: int) -> None:
    """Add a row to the tensor table: ``shape`` as NumPy has it, ``size`` in bytes."""
    writer.add_tensor_info(name, shape, np.dtype(np.float32), size, raw_dtype=kind)


@dataclass(frozen=True, slots=True)
class StoredValue:
    """One setting as the file has it."""

    value: Any
    kind: int
    """gguf's ``GGUFValueType``."""
    item_kind: int | None = None
    """Of a list's items; None for what is no list."""


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """One row of a file's tensor table."""

    name: str
    shape: tuple[int, ...]
    """As NumPy has it: the last axis is the row."""
    kind: TensorType
    offset: int
    """From the beginning of the file, in bytes."""


def read_settings(path: StrPath) -> dict[str, Any]:
    """The key-value section of a GGUF as plain Python values.

    Raises:
        ChatFailedError: It is missing, cut short, or no GGUF of version 2 or 3.
    """
    with _open_gguf(path) as (file, _):
        return {name: stored.value for name, stored in _read_stored(file).items()}


def read_tables(path: StrPath) -> tuple[dict[str, StoredValue], list[StoredTensor]]:
    """All settings with their types, and the tensor table, in the file's order.

    Raises:
        ChatFailedError: As `read_settings`, or a tensor is of a type that gguf-py does not know.
    """
    with _open_gguf(path) as (file, count):
        settings = _read_stored(file)
        rows = [_read_tensor_row(file) for _ in range(count)]
        alignment = settings.get(Keys.General.ALIGNMENT)
        step = int(alignment.value) if alignment else GGUF_DEFAULT_ALIGNMENT
        begin = -(-file.tell() // step) * step
        return settings, [replace(row, offset=begin + row.offset) for row in rows]


@contextlib.contextmanager
def _open_gguf(path: StrPath) -> Iterator[tuple[IO[bytes], int]]:
    """The file at its settings, and how many tensors it has."""
    try:
        with Path(path).open("rb") as file:
            if file.read(4) != MAGIC or _read_scalar(file, "I") not in (2, 3):
                raise ChatFailedError(f"{path} is not a GGUF file")
            yield file, _read_scalar(file, "Q")
    except (OSError, struct.error, UnicodeDecodeError, KeyError, ValueError, MemoryError) as error:
        raise ChatFailedError(f"{path} cannot be read as GGUF", cause=str(error)) from error


def _read_stored(file: IO[bytes]) -> dict[str, StoredValue]:
    count = _read_scalar(file, "Q")
    return {_read_string(file): _read_value(file, _read_scalar(file, "I")) for _ in range(count)}


def _read_tensor_row(file: IO[bytes]) -> StoredTensor:
    name, axes = _read_string(file), _read_scalar(file, "I")
    shape = tuple(_read_scalar(file, "Q") for _ in range(axes))[::-1]
    return StoredTensor(name, shape, TensorType(_read_scalar(file, "I")), _read_scalar(file, "Q"))


def _read_scalar(file: IO[bytes], code: str) -> Any:
    code = f"<{code}"
    return struct.unpack(code, file.read(struct.calcsize(code)))[0]


def _read_string(file: IO[bytes]) -> str:
    length = _read_scalar(file, "Q")
    raw: bytes = file.read(length)
    if len(raw) != length:
        raise struct.error("the file ends inside a string")
    return raw.decode("utf-8", errors="replace")


def _read_value(file: IO[bytes], kind: int) -> StoredValue:
    if kind == _STRING:
        return StoredValue(_read_string(file), kind)
    if kind == _ARRAY:
        item, count = _read_scalar(file, "I"), _read_scalar(file, "Q")
        return StoredValue([_read_value(file, item).value for _ in range(count)], kind, item)
    return StoredValue(_read_scalar(file, _SCALARS[kind]), kind)


def read_stop_strings(settings: Mapping[str, Any]) -> list[str]:
    """The tokens at which a chat with this file should stop: its end-of-sequence and end-of-turn tokens."""
    tokens = settings.get("tokenizer.ggml.tokens", [])
    ids = (settings.get(f"tokenizer.ggml.{kind}_token_id") for kind in ("eos", "eot", "eom"))
    return list(dict.fromkeys(str(tokens[i]) for i in ids if isinstance(i, int) and 0 <= i < len(tokens)))
