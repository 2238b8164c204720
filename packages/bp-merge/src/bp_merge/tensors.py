"""Safetensors without the safetensors package: a header, byte ranges, and three float dtypes.

The format (huggingface/safetensors, README "Format"): 8 bytes with the header's length N, little-endian; N bytes of
JSON ``{name: {"dtype", "shape", "data_offsets": [start, stop]}}``; then the tensors' bytes, row-major, offsets counted
from the end of the header. Reads go by byte range and not by mmap, so that memory stays near what is requested.

Not here: integer and FP8 tensors, which have no place in an adapter's arithmetic; packed 4-bit ones are `packed`'s.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import Any, Literal, Self, TypeAlias, get_args

import numpy as np
from numpy.typing import NDArray

from bp_merge.errors import TensorsInvalidError
from bp_merge.product import BEST, ROWS
from bp_runs.errors import ContractError
from bp_runs.files import coded_disk_errors

Dtype: TypeAlias = Literal["BF16", "F16", "F32"]
Floats: TypeAlias = NDArray[np.float32]
Raw: TypeAlias = NDArray[np.uint8]
"""Little-endian bytes of a dtype, as a vector."""

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"

_LENGTH_BYTES = 8
_METADATA = "__metadata__"
_MODEL_WRAPPERS = frozenset({"model", "language_model", "text_model"})
_LARGEST_HEADER = 100 * 2**20
_ITEM_BYTES: Mapping[str, int] = MappingProxyType({"BF16": 2, "F16": 2, "F32": 4})
_HAS_PREAD = hasattr(os, "preadv")  # not on Windows


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Where one tensor lies; nothing of it has been read."""

    name: str
    dtype: Dtype
    shape: tuple[int, ...]
    file: Path
    start: int
    """Offset of the first byte in ``file``."""

    @property
    def rows(self) -> int:
        """Length of the first axis; 1 for a vector, which counts as one row."""
        return self.shape[0] if len(self.shape) > 1 else 1

    @property
    def columns(self) -> int:
        """Weights in a row: the product of all axes but the first."""
        return math.prod(self.shape[1:]) if len(self.shape) > 1 else math.prod(self.shape)

    @property
    def bytes(self) -> int:
        """Size in the file."""
        return math.prod(self.shape) * _ITEM_BYTES[self.dtype]


@dataclass(frozen=True, slots=True)
class RawTensor:
    """Where the bytes of one tensor of any dtype lie."""

    dtype: str
    shape: tuple[int, ...]
    file: Path
    start: int
    """Offset of the first byte in ``file``."""
    stop: int


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor of a checkpoint's files, and the tensors that it is read as."""

    info: TensorInfo
    parts: tuple[str, ...]
    """Their names, in the order of their bytes."""
    has_pairs: bool = False
    """Whether gate and up take turns, column by column, and matrices are transposed, as in gpt-oss."""


def read_index(file: Path) -> dict[str, TensorInfo]:
    """The tensors of one safetensors file, sorted by name.

    Raises:
        TensorsInvalidError: The file is missing, cut short, not safetensors, or holds another dtype.
    """
    return {name: to_info(name, raw) for name, raw in read_raw_index(file).items()}


def read_raw_index(file: Path) -> dict[str, RawTensor]:
    """The tensors of one safetensors file, of whatever dtypes, sorted by name.

    Raises:
        TensorsInvalidError: The file is missing, cut short or not safetensors.
    """
    header, data_start, size = _read_header(file)
    return {n: _to_raw(file, n, e, data_start, size) for n, e in sorted(header.items()) if n != _METADATA}


def read_metadata(file: Path) -> dict[str, str]:
    """The texts that a file holds besides its tensors; empty where it has none.

    Raises:
        TensorsInvalidError: As `read_index`.
    """
    found = _read_header(file)[0].get(_METADATA, {})
    if not isinstance(found, dict):
        raise TensorsInvalidError(f"{file} has damaged metadata")
    return {str(key): str(value) for key, value in found.items()}


def _read_header(file: Path) -> tuple[dict[str, Any], int, int]:
    """The header, where the data starts, and the file's size, in bytes."""
    try:
        size = file.stat().st_size
        with file.open("rb") as handle:
            length = int.from_bytes(handle.read(_LENGTH_BYTES), "little")
            if not 2 <= length <= min(_LARGEST_HEADER, size - _LENGTH_BYTES):
                raise TensorsInvalidError(f"{file} is not a whole safetensors file")
            header = json.loads(handle.read(length))
    except OSError as error:
        raise TensorsInvalidError(f"{file} cannot be read", cause=str(error)) from error
    except ValueError as error:
        raise TensorsInvalidError(f"{file} has a damaged header", cause=str(error)) from error
    if not isinstance(header, dict):
        raise TensorsInvalidError(f"{file} has a damaged header")
    return header, _LENGTH_BYTES + length, size


def _to_raw(file: Path, name: str, entry: Any, data_start: int, file_size: int) -> RawTensor:
    try:
        dtype, shape, (start, stop) = str(entry["dtype"]), tuple(int(n) for n in entry["shape"]), entry["data_offsets"]
        found = RawTensor(dtype, shape, file, data_start + start, data_start + stop)
    except (KeyError, TypeError, ValueError) as error:
        raise TensorsInvalidError(f"{file} has a damaged entry for {name}", cause=str(error)) from error
    if not data_start <= found.start <= found.stop <= file_size:
        raise _build_cut_error(file, name)
    return found


def to_info(name: str, raw: RawTensor) -> TensorInfo:
    """A tensor of one of the three float dtypes.

    Raises:
        TensorsInvalidError: It is of another, or its bytes are not as many as its shape wants.
    """
    if raw.dtype not in get_args(Dtype):
        raise TensorsInvalidError(f"{name} in {raw.file} is {raw.dtype}; only BF16, F16 and F32 can be read")
    info = TensorInfo(name, raw.dtype, raw.shape, raw.file, raw.start)  # type: ignore[arg-type]  # checked above
    if raw.stop - raw.start != info.bytes:
        raise _build_cut_error(raw.file, name)
    return info


def _build_cut_error(file: Path, name: str) -> TensorsInvalidError:
    return TensorsInvalidError(f"{file} is cut short or damaged: the bytes of {name} are not all there")


def read_model_index(folder: Path) -> dict[str, TensorInfo]:
    """The tensors of a model folder, in one file or in shards, in the order of shards and then of names.

    Raises:
        TensorsInvalidError: No weights there, a shard is missing or damaged, or lacks a tensor of the index.
    """
    return {name: to_info(name, raw) for name, raw in read_raw_model_index(folder).items()}


def read_raw_model_index(folder: Path) -> dict[str, RawTensor]:
    """As `read_model_index`, of whatever dtypes."""
    index_file = folder / INDEX_FILE
    if not index_file.is_file():
        return read_raw_index(folder / SINGLE_FILE)
    try:
        weight_map = json.loads(index_file.read_bytes())["weight_map"]
        shards = sorted({str(name) for name in weight_map.values()})
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise TensorsInvalidError(f"{index_file} is damaged", cause=str(error)) from error
    found = {name: raw for shard in shards for name, raw in read_raw_index(folder / shard).items()}
    if missing := sorted(set(weight_map) - set(found)):
        raise TensorsInvalidError(f"{index_file} names {missing[0]}, and no shard holds it")
    return found


class TensorReader:
    """Reads rows of indexed tensors as float32; safe to share between threads; close it, or use it in a ``with``.

    Args:
        tensors: What can be read, by name; from `read_index` or `read_model_index`.
        stored: Tensors of the files that are read as several, by their name there.
    """

    def __init__(
        self, tensors: Mapping[str, TensorInfo], stored: Mapping[str, StoredTensor] = MappingProxyType({})
    ) -> None:
        self.tensors: Mapping[str, TensorInfo] = MappingProxyType(dict(tensors))
        self.stored = stored
        self._files: dict[Path, FileIO] = {}
        self._lock = threading.Lock()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the files; a later read opens them again."""
        with self._lock:
            for file in self._files.values():
                file.close()
            self._files.clear()

    def read(self, name: str) -> Floats:
        """A whole tensor in its own shape, as float32."""
        info = self.tensors[name]
        return self.read_rows(name, 0, info.rows).reshape(info.shape)

    def read_rows(self, name: str, start: int, stop: int) -> Floats:
        """Rows ``start`` to ``stop`` of a tensor as float32 of shape (stop - start, columns).

        Raises:
            TensorsInvalidError: The file has been cut or taken away since it was indexed.
        """
        info = self.tensors[name]
        return decode(self.read_raw(name, start, stop), info.dtype).reshape(stop - start, info.columns)

    def read_raw(self, name: str, start: int, stop: int) -> Raw:
        """The bytes of rows ``start`` to ``stop`` of a tensor, in its dtype.

        Raises:
            TensorsInvalidError: As `read_rows`.
        """
        info = self.tensors[name]
        row_bytes = info.columns * _ITEM_BYTES[info.dtype]
        return self._read_bytes(info.file, name, info.start + start * row_bytes, (stop - start) * row_bytes)

    def read_packed(self, name: str, start: int, stop: int) -> Raw | None:
        """Rows of a tensor that the files have in MXFP4, as GGUF's type of that name; None for any other tensor."""
        del name, start, stop
        return None

    def _read_bytes(self, path: Path, name: str, offset: int, length: int) -> Raw:
        raw = np.empty(length, np.uint8)
        try:
            done = self._fill(path, offset, raw)
        except OSError as error:
            raise TensorsInvalidError(f"{path} cannot be read", cause=str(error)) from error
        if done != length:
            raise TensorsInvalidError(f"{path} ended inside {name}")
        return raw

    def _fill(self, path: Path, offset: int, raw: Raw) -> int:
        """Read into ``raw``; returns how many bytes there were. Threads read at once where the system can do that."""
        with self._lock:
            file = self._files.get(path)
            if file is None:
                file = self._files[path] = path.open("rb", buffering=0)
            if not _HAS_PREAD:
                file.seek(offset)
                return _fill_by(file.readinto, raw)
        return _fill_by(lambda part: os.preadv(file.fileno(), [part], offset + raw.size - len(part)), raw)


def _fill_by(read: Callable[[memoryview], int | None], raw: Raw) -> int:
    done = 0
    while done < raw.size and (count := read(raw[done:].data)):
        done += count
    return done


def decode(raw: bytes | memoryview | Raw, dtype: Dtype) -> Floats:
    """Little-endian bytes of a dtype as a writable float32 vector; exact for all three dtypes.

    New, but for writable float32 bytes, which are used as they are.
    """
    source = np.frombuffer(raw, np.uint8)
    if dtype == "BF16" and ROWS is not None:
        out = np.empty(source.size // 2, np.float32)
        ROWS.decode(source, out, BEST)
        return out
    if dtype == "BF16":
        return (source.view("<u2").astype(np.uint32) << np.uint32(16)).view(np.float32)
    if dtype == "F32" and source.flags.writeable:
        return source.view("<f4").astype(np.float32, copy=False)
    return source.view("<f2" if dtype == "F16" else "<f4").astype(np.float32)


def encode(values: Floats, dtype: Dtype) -> memoryview:
    """Float32 values rounded once to a dtype, ties to even, as little-endian bytes."""
    if dtype == "BF16" and ROWS is not None:
        source, halves = np.ascontiguousarray(values, np.float32), np.empty(values.size, np.uint16)
        ROWS.encode(source, halves, BEST)
        return halves.view(np.uint8).data
    if dtype == "BF16":
        return _to_bf16_bits(values).astype("<u2").reshape(-1).view(np.uint8).data
    with np.errstate(over="ignore"):
        return np.ascontiguousarray(values, "<f2" if dtype == "F16" else "<f4").reshape(-1).view(np.uint8).data


def round_to(values: Floats, dtype: Dtype) -> Floats:
    """Float32 values rounded once to a dtype, ties to even, and given back as float32 of the same shape."""
    if dtype == "BF16":
        return (_to_bf16_bits(values) << np.uint32(16)).view(np.float32)
    if dtype == "F16":
        with np.errstate(over="ignore"):
            return values.astype(np.float16).astype(np.float32)
    return values


def _to_bf16_bits(values: Floats) -> NDArray[np.uint32]:
    """The upper half of each float32, rounded to nearest, ties to even (IEEE 754); NaNs stay NaNs."""
    bits = np.ascontiguousarray(values).view(np.uint32)
    half = (bits >> np.uint32(16)) & np.uint32(1)
    half += np.uint32(0x7FFF)
    half += bits
    half >>= np.uint32(16)
    # A NaN whose payload sits in the lower half only would otherwise round to an infinity.
    if np.isnan(values).any():
        half = np.where(np.isnan(values), (bits >> np.uint32(16)) | np.uint32(0x40), half)
    return half


def strip_wrappers(name: str) -> str:
    """A tensor's name without the modules around a language model: ``layers.0.mlp.up_proj.weight``.

    transformers 4 saved ``language_model.model.layers``, transformers 5 names ``model.language_model.layers``, and a
    language model loaded alone has ``model.layers``. Only leading parts are taken off.
    """
    parts = name.split(".")
    while parts and parts[0] in _MODEL_WRAPPERS:
        parts.pop(0)
    return ".".join(parts)


def build_header(tensors: Mapping[str, tuple[Dtype, tuple[int, ...]]], metadata: Mapping[str, str]) -> bytes:
    """Length and JSON header of a file that holds ``tensors`` in the given order, padded to 8 bytes with spaces."""
    header: dict[str, Any] = {_METADATA: dict(metadata)} if metadata else {}
    offset = 0
    for name, (dtype, shape) in tensors.items():
        stop = offset + math.prod(shape) * _ITEM_BYTES[dtype]
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, stop]}
        offset = stop
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(_LENGTH_BYTES, "little") + text


def write_tensors(
    path: Path, tensors: Mapping[str, Floats], *, dtype: Dtype = "F32", metadata: Mapping[str, str] | None = None
) -> None:
    """Write a small set of tensors, such as an adapter's, to one safetensors file, in the order of their names.

    The file is written in place; wrap the call in `bp_runs.files.publish_folder` where that matters.

    Raises:
        DiskFullError, OutputNotWritableError: As `bp_runs.files.coded_disk_errors`.
    """
    ordered = dict(sorted(tensors.items()))
    shapes = {name: (dtype, tuple(value.shape)) for name, value in ordered.items()}
    with coded_disk_errors(path), path.open("wb") as file:
        file.write(build_header(shapes, metadata or {"format": "pt"}))
        for value in ordered.values():
            file.write(encode(value, dtype))


class TensorStreamWriter:
    """Writes one safetensors file tensor by tensor, for more of them than memory holds; a context manager.

    Args:
        path: The file, written in place.
        tensors: Dtype and shape of every tensor, by name; the order of the file.

    Raises:
        DiskFullError, OutputNotWritableError: As `bp_runs.files.coded_disk_errors`.
    """

    def __init__(self, path: Path, tensors: Mapping[str, tuple[Dtype, tuple[int, ...]]]) -> None:
        self._path = path
        self._left = dict(tensors)
        self._hash = hashlib.sha256()
        with coded_disk_errors(path):
            self._file = path.open("wb")
            self._append(build_header(tensors, {"format": "pt"}))

    @property
    def sha256(self) -> str:
        """Of what has been written, which saves reading it again."""
        return self._hash.hexdigest()

    def _append(self, data: bytes | memoryview) -> None:
        self._file.write(data)
        self._hash.update(data)

    def write(self, name: str, values: Floats) -> None:
        """Append the next tensor, rounded to its dtype.

        Raises:
            ContractError: It is not the next one, or has another shape.
        """
        wanted, (dtype, shape) = next(iter(self._left.items()))
        if (name, values.shape) != (wanted, shape):
            raise ContractError(f"{name} {values.shape} was written where {wanted} {shape} goes")
        with coded_disk_errors(self._path):
            self._append(encode(values, dtype))
        del self._left[name]

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()
        if self._left and error is None:
            raise ContractError(f"{self._path} lacks {next(iter(self._left))}")
