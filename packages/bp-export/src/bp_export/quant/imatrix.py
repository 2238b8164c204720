"""Importance matrices: how much each column of a tensor matters, as ``llama-imatrix`` measured it.

Two kinds of file are read: GGUF (``<tensor>.in_sum2`` and ``.counts``, sums of squared activations), and the older
``.dat`` (little-endian: entries; for each its name, calls, values and sums). Both become the mean squared activation of
each column, as llama-quantize takes it (``load_imatrix`` in llama.cpp's quantize.cpp). Not here: expert models.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import IO, TypeAlias

import numpy as np
from gguf import GGUFReader

from bp_export.errors import ImportanceInvalidError
from bp_export.gguf.file import MAGIC
from bp_merge import Floats

Importance: TypeAlias = Mapping[str, Floats]
"""By GGUF tensor name: (columns,)."""

SUMS, COUNTS = ".in_sum2", ".counts"
_LARGEST_ENTRY = 2**24


def read_importance(path: Path) -> Importance:
    """An importance matrix from a file.

    Raises:
        ImportanceInvalidError: It is missing, damaged, of another kind, or not finite.
    """
    try:
        with path.open("rb") as file:
            is_gguf = file.read(4) == MAGIC
        found = _read_gguf(path) if is_gguf else _read_dat(path)
    except (OSError, ValueError, KeyError, IndexError, struct.error) as error:
        raise ImportanceInvalidError(f"{path} cannot be read as an importance matrix", cause=str(error)) from error
    if not found or not all(np.isfinite(values).all() for values in found.values()):
        raise ImportanceInvalidError(f"{path} holds no importance matrix, or one that is not finite")
    return MappingProxyType(found)


def check_importance(importance: Importance, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Reject a matrix that was measured on another model.

    Raises:
        ImportanceInvalidError: It knows none of the tensors, or has another number of columns for one.
    """
    known = [name for name in importance if name in shapes]
    if not known:
        raise ImportanceInvalidError("the importance matrix knows none of this model's tensors")
    for name in known:
        if importance[name].shape != shapes[name][-1:]:
            raise ImportanceInvalidError(
                f"the importance matrix has {importance[name].size} columns for {name}, the model {shapes[name][-1]}"
            )


def _read_gguf(path: Path) -> dict[str, Floats]:
    tensors = {tensor.name: np.array(tensor.data, np.float32) for tensor in GGUFReader(path).tensors}
    names = [name.removesuffix(SUMS) for name in tensors if name.endswith(SUMS)]
    return {name: _divide(tensors[name + SUMS].reshape(-1), tensors[name + COUNTS].reshape(-1)) for name in names}


def _divide(sums: Floats, counts: Floats) -> Floats:
    if counts.size != 1:
        raise ValueError("it was measured on a model with experts")
    return sums / counts[0] if counts[0] > 0 else np.ones_like(sums)


def _read_dat(path: Path) -> dict[str, Floats]:
    with path.open("rb") as file:
        return dict(_read_entry(file) for _ in range(_read_count(file)))


def _read_entry(file: IO[bytes]) -> tuple[str, Floats]:
    name = file.read(_read_count(file)).decode()
    calls, size = _read_count(file), _read_count(file)
    sums = np.frombuffer(file.read(4 * size), "<f4")
    if sums.size != size:
        raise ValueError("it ends too early")
    return name, (sums / np.float32(calls) if calls > 0 else sums).astype(np.float32)


def _read_count(file: IO[bytes]) -> int:
    value = int(struct.unpack("<i", file.read(4))[0])
    if not 0 <= value < _LARGEST_ENTRY:
        raise ValueError(f"a count of {value}")
    return value
