"""Which base model an adapter or a run was made with: two fingerprints of a Hugging Face folder.

`fingerprint_base` names the model, whatever its weights are packed in: an adapter carries it, so that export and merge
notice another base of the same shapes. `fingerprint_weights` names the very weights: a run records it, so that it is
not resumed on others. Safetensors' format: 8 bytes with the header's length, the header as JSON, the data.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import orjson

_FILE, _INDEX = "model.safetensors", "model.safetensors.index.json"
_STEMS = ("model.", "model.language_model.", "language_model.model.")
_VECTORS = ("layers.0.input_layernorm.weight", "layers.0.post_attention_layernorm.weight", "norm.weight")
_MOST_HEADER = 100 * 2**20
_BLOCK = 4096  # bytes
_BLOCKS = 8


def fingerprint_base(folder: Path) -> str | None:
    """SHA-256 of a model folder's first and last norms as float32; None if they are not found as safetensors.

    Norms stay as they are when a base is packed in fewer bits, and differ between a model and its instruct version,
    whose config.json may be the same. Other tensors are not looked at.
    """
    for stem in _STEMS:
        try:
            vectors = [_read_vector(folder, stem + name) for name in _VECTORS]
        except (OSError, ValueError, KeyError, TypeError):
            continue
        return hashlib.sha256(b"".join(vectors)).hexdigest()
    return None


def fingerprint_weights(folder: Path) -> str | None:
    """SHA-256 over a sample of every tensor of a model folder; None if it holds no weights.

    Covers each tensor's name, dtype and shape, all bytes of tensors up to 32 KiB (norms, biases), and of larger ones
    eight blocks of 4 KiB from the first to the last. Any tensor that was trained, rescaled, converted or replaced is
    noticed; an edit of a few single values of a large tensor may not be. How tensors are spread over files does not
    matter. Files that are not safetensors are sampled whole, in the same way. Takes a second for tens of GB.
    """
    samples = [sample for file in _weight_files(folder) for sample in _sample_file(file)]
    return hashlib.sha256(b"".join(sorted(samples))).hexdigest() if samples else None


def _weight_files(folder: Path) -> list[Path]:
    """The files that a loader reads: those of the index, or model.safetensors, or whatever weights there are."""
    try:
        names = set(orjson.loads((folder / _INDEX).read_bytes())["weight_map"].values())
        return [folder / name for name in sorted(names)]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        pass
    if (folder / _FILE).is_file():
        return [folder / _FILE]
    return sorted(folder.glob("*.safetensors")) or sorted(folder.glob("*.bin"))


def _sample_file(file: Path) -> list[bytes]:
    """A digest of each tensor; of a file that is no safetensors file, one of all."""
    try:
        with file.open("rb") as handle:
            try:
                begin, header = _read_header(handle)
                return [_sample_tensor(handle, begin, name, entry) for name, entry in header.items()]
            except (ValueError, KeyError, TypeError, AttributeError):
                size = handle.seek(0, os.SEEK_END)
                return [hashlib.sha256(f"{file.name} {size}".encode() + _sample(handle, 0, size)).digest()]
    except OSError as error:
        return [f"{file.name}: {error.strerror}".encode()]


def _read_header(handle: BinaryIO) -> tuple[int, dict[str, Any]]:
    """Where the data begins, and the header's tensors by name."""
    length = int.from_bytes(handle.read(8), "little")
    if length > _MOST_HEADER:
        raise ValueError("no safetensors header")
    header: dict[str, Any] = orjson.loads(handle.read(length))
    header.pop("__metadata__", None)
    return 8 + length, header


def _sample_tensor(handle: BinaryIO, begin: int, name: str, entry: Mapping[str, Any]) -> bytes:
    start, stop = entry["data_offsets"]
    told = f"{name} {entry['dtype']} {entry['shape']} {stop - start}".encode()
    return hashlib.sha256(told + _sample(handle, begin + start, stop - start)).digest()


def _sample(handle: BinaryIO, start: int, size: int) -> bytes:
    """All of a short stretch; of a longer one blocks at even distances, the first and the last among them."""
    if size <= _BLOCKS * _BLOCK:
        handle.seek(start)
        return handle.read(size)
    blocks = []
    for number in range(_BLOCKS):
        handle.seek(start + number * (size - _BLOCK) // (_BLOCKS - 1))
        blocks.append(handle.read(_BLOCK))
    return b"".join(blocks)


def _read_vector(folder: Path, name: str) -> bytes:
    """The tensor's bytes; bf16, which is half of a float32, as float32."""
    index = folder / _INDEX
    file = folder / (orjson.loads(index.read_bytes())["weight_map"][name] if index.is_file() else _FILE)
    with file.open("rb") as handle:
        begin, header = _read_header(handle)
        entry: Mapping[str, Any] = header[name]
        start, stop = entry["data_offsets"]
        handle.seek(begin + start)
        raw = handle.read(stop - start)
    if entry["dtype"] == "BF16":
        return b"".join(b"\0\0" + raw[i : i + 2] for i in range(0, len(raw), 2))
    return raw
