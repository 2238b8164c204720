"""Folding: a base's weights with an adapter added, computed as they are read, a few rows at a time.

The arithmetic is that of PEFT's ``merge_and_unload()`` on the CPU with its defaults: A and B in float32,
``delta = (B @ A) * scale`` in float32, ``W + delta`` in float32, and **one** rounding to the base's dtype. (With
``safe_merge=True`` PEFT rounds twice, and some 3 % of a bf16 model's weights differ; a merge on a GPU differs too.)
Embeddings are the exception: there PEFT rounds the change and then the sum. DoRA: ``m / |W + delta| * (W + delta)`` by
the length of each row, whose sum has the library's own order, so that one value in some thousands differs by one bit.
Tensors that take the base's place are rounded to the base's dtype, where PEFT may leave them in float32.
Rows are independent of each other, so cutting them into chunks changes no bit.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType, TracebackType
from typing import Self

import numpy as np

from bp_merge.adapter import LoraAdapter, LoraPair, PairsByName
from bp_merge.errors import AdapterMismatchError
from bp_merge.product import add_in_order
from bp_merge.tensors import Dtype, Floats, TensorInfo, TensorReader, round_to


def fold_rows(rows: Floats, pair: LoraPair, start: int, dtype: Dtype) -> Floats:
    """Rows of W from ``start`` on with the pair's change added, rounded once to ``dtype``: (n, d_in), float32."""
    delta = pair.delta(start, start + rows.shape[0])
    if pair.is_embedding:
        delta = round_to(delta, dtype)
    delta += rows
    if pair.magnitude is not None:
        lengths = np.sqrt(np.square(delta, dtype=np.float64).sum(axis=1)).astype(np.float32)
        delta *= (pair.magnitude[start : start + rows.shape[0]] / lengths)[:, None]
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
        self._replaced = _match(base.tensors, adapter, adapter.replaced) if adapter else {}
        grown = {name: replace(base.tensors[name], shape=values.shape) for name, values in self._replaced.items()}
        self._tensors: Mapping[str, TensorInfo] = MappingProxyType({**base.tensors, **grown})
        self._pairs: Mapping[str, LoraPair] = _match_pairs(self._tensors, adapter) if adapter else {}
        self._rows = _match_rows(self._tensors, adapter) if adapter else {}
        self._added = _match(self._tensors, adapter, adapter.added) if adapter else {}
        self._otherwise = frozenset([*self._replaced, *self._rows, *self._added])
        """What is changed in other ways than by a pair, or in both."""
        self._changed = self._otherwise | self._pairs.keys()

    def without_adapter(self) -> FoldedModel:
        """The same base as it stands; it shares this model's files."""
        return FoldedModel(self._base)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._base.close()

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """The tensors by name: the base's, but for the shape of an embedding or head to which rows were added."""
        return self._tensors

    @property
    def base_tensors(self) -> Mapping[str, TensorInfo]:
        """The base's tensors as they stand in its files."""
        return self._base.tensors

    @property
    def changed(self) -> frozenset[str]:
        """Names of the tensors that the adapter changes."""
        return self._changed

    @property
    def pairs(self) -> Mapping[str, LoraPair]:
        """The adapter's pairs by the name of the base's tensor."""
        return self._pairs

    @property
    def is_unchanged(self) -> bool:
        """Whether the adapter, as one that was never trained, adds nothing to any weight."""
        others = self._replaced or self._rows or any(value.any() for value in self._added.values())
        return not others and not any(
            pair.magnitude is not None or (pair.a.any() and pair.b.any()) for pair in self._pairs.values()
        )

    def read_rows(self, name: str, start: int, stop: int) -> Floats:
        """Rows of a tensor with the adapter in, float32 holding values of the base's dtype: (stop - start, columns).

        Raises:
            TensorsInvalidError: The base's file cannot be read to the end.
        """
        if name not in self._changed:
            return self._base.read_rows(name, start, stop)
        dtype = self.tensors[name].dtype
        pair = self._pairs.get(name)
        if pair is not None and pair.is_plain and name not in self._otherwise:
            raw, b = self._base.read_raw(name, start, stop), pair.b[start:stop]
            if (folded := add_in_order(raw, dtype, b, pair.a, pair.scale)) is not None:
                return folded
        rows = self._read_unfolded(name, start, stop)
        if (added := self._added.get(name)) is not None:
            rows = round_to(rows + added.reshape(1, -1), dtype)
        return fold_rows(rows, pair, start, dtype) if pair else rows

    def _read_unfolded(self, name: str, start: int, stop: int) -> Floats:
        """Rows as they are before anything is added to them."""
        info = self.tensors[name]
        whole = self._replaced.get(name)
        if whole is None:
            rows = self._base.read_rows(name, start, stop)
        else:
            rows = round_to(whole.reshape(info.rows, info.columns)[start:stop], info.dtype)
        for index, row in self._rows.get(name, ()):
            if start <= index < stop:
                rows[index - start] = round_to(row, info.dtype)
        return rows


def _match_pairs(tensors: Mapping[str, TensorInfo], adapter: LoraAdapter) -> PairsByName:
    modules = {
        _find(tensors, adapter, f"{module}.weight", pair.shape).name: module for module, pair in adapter.modules.items()
    }
    return PairsByName(modules, adapter.modules.__getitem__)


def _match(tensors: Mapping[str, TensorInfo], adapter: LoraAdapter, values: Mapping[str, Floats]) -> dict[str, Floats]:
    """Whole tensors by the base's names; a head that is saved with the embedding it shares is no change of its own."""
    shared = {name for name in values if _is_shared_head(tensors, values, name)}
    return {_find(tensors, adapter, n, v.shape).name: v for n, v in values.items() if n not in shared}


def _match_rows(tensors: Mapping[str, TensorInfo], adapter: LoraAdapter) -> dict[str, list[tuple[int, Floats]]]:
    found = {}
    for name, (indices, values) in adapter.rows.items():
        info = _find(tensors, adapter, name)
        if max(indices) >= info.rows or values.shape[1] != info.columns:
            raise AdapterMismatchError(f"the adapter changes row {max(indices)} of {name}, which is {info.shape}")
        found[info.name] = list(zip(indices, values, strict=True))
    return found


def _is_shared_head(tensors: Mapping[str, TensorInfo], values: Mapping[str, Floats], name: str) -> bool:
    if name != "lm_head.weight" or name in tensors:
        return False
    return any(n.endswith("embed_tokens.weight") and np.array_equal(v, values[name]) for n, v in values.items())


def _find(
    tensors: Mapping[str, TensorInfo], adapter: LoraAdapter, name: str, shape: tuple[int, ...] | None = None
) -> TensorInfo:
    """A tensor of the base; a language model loaded out of a larger one has its names without its place in that."""
    inside = name.removeprefix("model.")
    names = (name, f"model.language_model.{inside}", f"language_model.model.{inside}")
    info = next((tensors[n] for n in names if n in tensors), None)
    cause = f"the adapter names {adapter.folder.base} as its base"
    module = name.removesuffix(".weight")
    if info is None:
        raise AdapterMismatchError(f"the adapter changes {module}, and the base has no such module", cause=cause)
    if shape is not None and info.shape != shape and not _has_grown(info, shape):
        raise AdapterMismatchError(
            f"the adapter changes {module} as {shape}, and the base has it as {info.shape}", cause=cause
        )
    return info


def _has_grown(info: TensorInfo, shape: tuple[int, ...]) -> bool:
    """Whether a table of tokens got rows for new ones."""
    is_table = info.name.endswith(("embed_tokens.weight", "lm_head.weight"))
    return is_table and info.shape[1:] == shape[1:] and info.shape[0] < shape[0]
