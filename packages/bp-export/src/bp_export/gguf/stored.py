"""Tensors of a GGUF on disk, read a few rows at a time."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from bp_export.gguf.file import StoredTensor, read_tables
from bp_export.quant.kernels import TensorType, compute_row_bytes
from bp_merge import Dtype, Floats, decode

_WITH_EXPERTS = 3  # axes
_DTYPES: Mapping[TensorType, Dtype] = {TensorType.F32: "F32", TensorType.F16: "F16", TensorType.BF16: "BF16"}


class StoredWeights:
    """A GGUF's tensors, mapped and not loaded.

    Args:
        path: The file.

    Raises:
        ChatFailedError: It is no whole GGUF.
    """

    def __init__(self, path: Path) -> None:
        self.settings, rows = read_tables(path)
        self.tensors: Mapping[str, StoredTensor] = {row.name: row for row in rows}
        self._data = np.memmap(path, np.uint8, "r")

    def list_parts(self, name: str) -> tuple[str, ...]:
        """What is read one after another: the tensor, or of one with experts (three axes) each expert: ``name#3``."""
        shape = self.tensors[name].shape
        return tuple(f"{name}#{i}" for i in range(shape[0])) if len(shape) == _WITH_EXPERTS else (name,)

    def find(self, part: str) -> StoredTensor:
        """The tensor of a part's name."""
        return self.tensors[part.partition("#")[0]]

    def is_float(self, name: str) -> bool:
        """Whether a tensor's values can be read: F32, F16 or BF16."""
        return self.tensors[name].kind in _DTYPES

    def read_rows(self, name: str, start: int, stop: int) -> Floats:
        """Rows of a float tensor or of one expert, the last axis a row: (stop - start, columns) of float32."""
        row = self.find(name)
        values = decode(bytes(self.read_bytes(name, start, stop)), _DTYPES[row.kind])
        return values.reshape(-1, row.shape[-1])

    def read_bytes(self, name: str, start: int, stop: int) -> memoryview:
        """The same rows as they are stored, of any type."""
        row, (_, _, expert) = self.find(name), name.partition("#")
        first = int(expert or 0) * math.prod(row.shape[1:-1])
        size = compute_row_bytes(row.kind, row.shape[-1])
        return self._data[row.offset + (first + start) * size : row.offset + (first + stop) * size].data

    def close(self) -> None:
        """Let go of the file, which no system but Windows needs before it is deleted."""
        del self._data
