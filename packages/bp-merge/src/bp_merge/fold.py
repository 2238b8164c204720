"""Folding: a base's weights with an adapter added, computed as they are read, a few rows at a time.

The arithmetic is that of PEFT's ``merge_and_unload()`` on the CPU with its defaults: A and B in float32,
``delta = (B @ A) * scale`` in float32, ``W + delta`` in float32, and **one** rounding to the base's dtype. (With
``safe_merge=True`` PEFT rounds twice, and some 3 % of a bf16 model's weights differ; a merge on a GPU differs too.)
Rows are independent of each other, so cutting them into chunks changes no bit.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import TracebackType
from typing import Self

from bp_merge.adapter import LoraAdapter, LoraPair
from bp_merge.errors import AdapterMismatchError
from bp_merge.tensors import Dtype, Floats, TensorInfo, TensorReader, round_to


def fold_rows(rows: Floats, pair: LoraPair, start: int, dtype: Dtype) -> Floats:
    """Rows of W from ``start`` on with the pair's change added, rounded once to ``dtype``: (n, d_in), float32."""
    delta = pair.delta(start, start + rows.shape[0])
    delta += rows
    return round_to(delta, dtype)


class FoldedModel:
    """A base model read through an adapter; with no adapter it is the base as it stands.

    Args:
        base: The base's tensors; the model closes it.
        adapter: What to add to them.

    Raises:
        AdapterMismatchError: A module of the adapter is not in the base, or its shape differs.
    """

    def __init__(self, base: TensorReader, adapter: LoraAdapter | None = None) -> None:
        self._base = base
        self._pairs = _match_pairs(base.tensors, adapter) if adapter else {}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._base.close()

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """The base's tensors by name."""
        return self._base.tensors

    @property
    def changed(self) -> frozenset[str]:
        """Names of the tensors that the adapter changes."""
        return frozenset(self._pairs)

    @property
    def is_unchanged(self) -> bool:
        """Whether the adapter, as one that was never trained, adds nothing to any weight."""
        return not any(pair.a.any() and pair.b.any() for pair in self._pairs.values())

    def read_rows(self, name: str, start: int, stop: int) -> Floats:
        """Rows of a tensor with the adapter in, float32 holding values of the base's dtype: (stop - start, columns).

        Raises:
            TensorsInvalidError: The base's file cannot be read to the end.
        """
        rows = self._base.read_rows(name, start, stop)
        pair = self._pairs.get(name)
        return fold_rows(rows, pair, start, self.tensors[name].dtype) if pair else rows


def _match_pairs(tensors: Mapping[str, TensorInfo], adapter: LoraAdapter) -> dict[str, LoraPair]:
    pairs = {}
    for module, pair in adapter.modules.items():
        info = _find_weight(tensors, module)
        if info is None:
            raise AdapterMismatchError(
                f"the adapter changes {module}, and the base has no such module",
                cause=f"the adapter names {adapter.folder.base} as its base",
            )
        if info.shape != pair.shape:
            raise AdapterMismatchError(
                f"the adapter changes {module} as {pair.shape}, and the base has it as {info.shape}",
                cause=f"the adapter names {adapter.folder.base} as its base",
            )
        pairs[info.name] = pair
    return pairs


def _find_weight(tensors: Mapping[str, TensorInfo], module: str) -> TensorInfo | None:
    """The weight of a module; a language model that was loaded out of a larger one has its names without its place."""
    inside = module.removeprefix("model.")
    names = (module, f"model.language_model.{inside}", f"language_model.model.{inside}")
    return next((tensors[f"{name}.weight"] for name in names if f"{name}.weight" in tensors), None)
