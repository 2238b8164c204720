"""How one tensor of a checkpoint becomes the GGUF's: rows or columns in another order, other values, another shape."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from bp_merge import Dtype, Floats, FoldedModel, round_to

Indices: TypeAlias = NDArray[np.intp]


@dataclass(frozen=True, slots=True, eq=False)
class Change:
    """What happens to a tensor on its way; as it stands, nothing."""

    rows: Indices | None = None
    """The checkpoint's row of each of the GGUF's rows."""
    unit: int = 1
    """Rows change places within units of so many, or units as wholes; chunks are cut between units."""
    columns: Indices | None = None
    """The checkpoint's column of each column."""
    values: Literal["same", "plus one", "minus exponential"] = "same"
    shape: tuple[int, ...] | None = None
    """In the GGUF; None for the checkpoint's."""

    def read_rows(self, model: FoldedModel, name: str, start: int, stop: int) -> Floats:
        """The GGUF's rows ``start`` to ``stop`` of a tensor: (stop - start, columns)."""
        rows = model.read_rows(name, start, stop) if self.rows is None else self._read_moved(model, name, start, stop)
        if self.columns is not None:
            rows = rows[:, self.columns]
        return _change_values(rows, self.values, model.tensors[name].dtype)

    def _read_moved(self, model: FoldedModel, name: str, start: int, stop: int) -> Floats:
        wanted = self._wanted(start, stop)
        lowest = wanted.min(axis=1, keepdims=True)
        offsets = np.arange(len(wanted))[:, None] * self.unit
        parts = [model.read_rows(name, a, b) for a, b in _join(lowest[:, 0], self.unit)]
        moved: Floats = np.concatenate(parts)[(wanted - lowest + offsets).reshape(-1)]
        return moved

    def _wanted(self, start: int, stop: int) -> Indices:
        """Rows of the checkpoint by unit: (units, unit), each a run of rows in some order."""
        if self.rows is None:
            raise ValueError("the rows stay where they are")
        return self.rows[start:stop].reshape(-1, self.unit)


KEEP = Change()


def interleave_halves(heads: int, rows: int) -> Change:
    """Each head's rows from (half, pair) order to (pair, half) order.

    transformers rotates row i with row i + head / 2, llama.cpp's arch ``llama`` row 2i with row 2i + 1
    (``LlamaModel.permute`` in llama.cpp's converter).
    """
    head = rows // heads
    order = np.arange(rows).reshape(heads, 2, head // 2).swapaxes(1, 2)  # (heads, pair, half)
    return Change(rows=order.reshape(-1), unit=head)


def _join(starts: Indices, unit: int) -> Iterator[tuple[int, int]]:
    """Ranges of units, those that follow each other as one."""
    first = last = int(starts[0])
    for start in map(int, starts[1:]):
        if start != last + unit:
            yield first, last + unit
            first = start
        last = start
    yield first, last + unit


def _change_values(rows: Floats, values: str, dtype: Dtype) -> Floats:
    """The converter computes in float32, but in float16 where the checkpoint is float16."""
    if values == "same":
        return rows
    if values == "plus one":
        changed: Floats = rows + np.float32(1)
    else:
        # By way of float64, which torch's float32 agrees with far more often than NumPy's float32 does.
        changed = -np.exp(rows.astype(np.float64)).astype(np.float32)
    return round_to(changed, "F16") if dtype == "F16" else changed
