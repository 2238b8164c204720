"""Folding: a base's weights with an adapter added, computed as they are read, a few rows at a time.

The arithmetic is that of PEFT's ``merge_and_unload()`` on the CPU with its defaults: A and B in float32,
``delta = (B @ A) * scale`` in float32, ``W + delta`` in float32, and **one** rounding to the base's dtype. (With
``safe_merge=True`` PEFT rounds twice, and some 3 % of a bf16 model's weights differ; a merge on a GPU differs too.)
Embeddings and parameters (experts, routers) are the exception: there PEFT rounds the change and then the sum.
DoRA: ``m / |W + delta| * (W + delta)`` by
the length of each row, whose sum has the library's own order. In bf16 some ten values in a million differ, by one
bit. In float32, where no rounding hides it, 30 to 48 % do (rows of 1,024 to 4,096), by up to five units in the last
place.
Tensors that take the base's place are rounded to the base's dtype, where PEFT may leave them in float32.
Rows are independent of each other, so cutting them into chunks changes no bit.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from types import MappingProxyType, TracebackType
from typing import Self

import numpy as np

from bp_merge.adapter import LoraAdapter, LoraPair, PairsByName
from bp_merge.errors import AdapterMismatchError
from bp_merge.expert_pairs import (
    Mixture,
    find_mixtures,
    list_joined_modules,
    list_unreached,
    match_experts,
    match_modules,
)
from bp_merge.product import add_in_order
from bp_merge.tensors import Dtype, Floats, Raw, StoredTensor, TensorInfo, TensorReader, round_to, strip_wrappers


def fold_rows(rows: Floats, pair: LoraPair, start: int, dtype: Dtype) -> Floats:
    """Rows of W from ``start`` on with the pair's change added, rounded once to ``dtype``: (n, d_in), float32."""
    delta = pair.delta(start, start + rows.shape[0])
    if pair.rounds_change:
        delta = round_to(delta, dtype)
    delta += rows
    if pair.magnitude is not None:
        lengths = np.sqrt(np.square(delta, dtype=np.float64).sum(axis=1)).astype(np.float32)
        delta *= (pair.magnitude[start : start + rows.shape[0]] / lengths)[:, None]
    return round_to(delta, dtype)


HEAD, TABLE = "lm_head.weight", "embed_tokens.weight"
"""The head's and the embedding's names, without wrappers."""
_BLOCK_ROWS = 4096


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
        table = _find_shared_table(base.tensors)
        self._shared = {HEAD: table} if adapter and table and _tells_head_apart(adapter, base, table) else {}
        """The stored tensor of a head that has none of its own, where the adapter makes the two differ."""
        head = {name: replace(base.tensors[stored], name=name) for name, stored in self._shared.items()}
        self._mixtures = find_mixtures(base.tensors, base.stored)
        found = _Matches({**base.tensors, **head}, adapter, self._mixtures, drops_head=table is not None and not head)
        self._replaced = found.match_values(adapter.replaced) if adapter else {}
        resized = {name: replace(found.tensors[name], shape=value.shape) for name, value in self._replaced.items()}
        self._tensors: Mapping[str, TensorInfo] = MappingProxyType({**found.tensors, **resized})
        found = replace(found, tensors=self._tensors)
        self._pairs: Mapping[str, LoraPair] = found.match_pairs(adapter) if adapter else {}
        self._rows = found.match_rows(adapter.rows) if adapter else {}
        self._added = found.match_values(adapter.added) if adapter else {}
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
        """The tensors by name: the base's, but for an embedding or head of another size, and a head of its own.

        A tied base stores no ``lm_head.weight``. It is listed if the adapter makes it differ from the embedding.
        """
        return self._tensors

    @property
    def base_tensors(self) -> Mapping[str, TensorInfo]:
        """The base's tensors as they are in its files."""
        return self._base.tensors

    @property
    def changed(self) -> frozenset[str]:
        """Names of the tensors that the adapter changes."""
        return self._changed

    @property
    def stored(self) -> Mapping[str, StoredTensor]:
        """What the base's files hold as one tensor and `tensors` as several: experts, by their name in the files."""
        return self._base.stored

    def list_unreached_experts(self) -> list[str]:
        """Experts' matrices that the adapter leaves as they are although it changes others of their kind."""
        return list_unreached(self._mixtures, self._changed)

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
        stored = self._shared.get(name, name)
        if name not in self._changed:
            return self._base.read_rows(stored, start, stop)
        dtype = self.tensors[name].dtype
        pair = self._pairs.get(name)
        if pair is not None and pair.is_plain and not pair.rounds_change and name not in self._otherwise:
            raw, b = self._base.read_raw(stored, start, stop), pair.b[start:stop]
            if (folded := add_in_order(raw, dtype, b, pair.a, pair.scale)) is not None:
                return folded
        rows = self._read_unfolded(name, start, stop)
        if (added := self._added.get(name)) is not None:
            rows = round_to(rows + added.reshape(1, -1), dtype)
        return fold_rows(rows, pair, start, dtype) if pair else rows

    def read_packed(self, name: str, start: int, stop: int) -> Raw | None:
        """As `TensorReader.read_packed`; None also for a tensor that the adapter changes."""
        return None if name in self._changed else self._base.read_packed(self._shared.get(name, name), start, stop)

    def _read_unfolded(self, name: str, start: int, stop: int) -> Floats:
        """Rows as they are before anything is added to them."""
        info = self.tensors[name]
        whole = self._replaced.get(name)
        if whole is None:
            rows = self._base.read_rows(self._shared.get(name, name), start, stop)
        else:
            rows = round_to(whole.reshape(info.rows, info.columns)[start:stop], info.dtype)
        for index, row in self._rows.get(name, ()):
            if start <= index < stop:
                rows[index - start] = round_to(row, info.dtype)
        return rows


@dataclass(frozen=True, slots=True)
class _Matches:
    """Finds the base's tensors by the adapter's names."""

    tensors: Mapping[str, TensorInfo]
    adapter: LoraAdapter | None
    mixtures: Mapping[str, Mixture]
    drops_head: bool
    """Whether what the adapter says of a tied head is left out, since it is the embedding's."""

    def match_pairs(self, adapter: LoraAdapter) -> PairsByName[Callable[[], LoraPair]]:
        """Pairs by the base's names."""
        joined = list_joined_modules(adapter)
        named = {
            self._find(f"{module}.weight", pair.shape, is_whole=False).name: partial(
                adapter.modules.__getitem__, module
            )
            for module, pair in adapter.modules.items()
            if module not in joined and not self._is_dropped(f"{module}.weight")
        }
        modules = {name: slot.read for name, slot in match_modules(adapter, self.mixtures).items()}
        experts = {name: slot.read for name, slot in match_experts(adapter, self.mixtures).items()}
        return PairsByName({**named, **modules, **experts}, lambda read: read())

    def match_values(self, values: Mapping[str, Floats]) -> dict[str, Floats]:
        """Whole tensors by the base's names."""
        return {self._find(n, v.shape).name: v for n, v in values.items() if not self._is_dropped(n)}

    def match_rows(self, rows: Mapping[str, tuple[tuple[int, ...], Floats]]) -> dict[str, list[tuple[int, Floats]]]:
        """Rows by the base's names."""
        found = {}
        for name, (indices, values) in rows.items():
            if self._is_dropped(name):
                continue
            info = self._find(name)
            if max(indices) >= info.rows or values.shape[1] != info.columns:
                raise AdapterMismatchError(f"the adapter changes row {max(indices)} of {name}, which is {info.shape}")
            found[info.name] = list(zip(indices, values, strict=True))
        return found

    def _is_dropped(self, name: str) -> bool:
        return self.drops_head and _is_head(name)

    def _find(self, name: str, shape: tuple[int, ...] | None = None, *, is_whole: bool = True) -> TensorInfo:
        info = self.tensors.get(name) or self.tensors.get(self._inner_names().get(_name_inside(name), ""))
        cause = f"the adapter names {self.adapter.folder.base} as its base" if self.adapter else None
        module = name.removesuffix(".weight")
        if info is None:
            raise AdapterMismatchError(f"the adapter changes {module}, and the base has no such module", cause=cause)
        if shape is not None and info.shape != shape and not (is_whole and _is_resized(info, shape)):
            raise AdapterMismatchError(
                f"the adapter changes {module} as {shape}, and the base has it as {info.shape}", cause=cause
            )
        return info

    def _inner_names(self) -> Mapping[str, str]:
        """The tensors without the wrappers that libraries put around a language model; ambiguous ones are left out."""
        return _index_inner_names(tuple(self.tensors))


@lru_cache(maxsize=4)
def _index_inner_names(names: tuple[str, ...]) -> Mapping[str, str]:
    found: dict[str, str] = {}
    for name in names:
        inner = _name_inside(name)
        found[inner] = "" if inner in found else name
    return found


def _name_inside(name: str) -> str:
    """Without wrappers; transformers 5 calls Mixtral's block ``mlp``, and its files ``block_sparse_moe``."""
    return strip_wrappers(name).replace(".block_sparse_moe.", ".mlp.")


def _find_shared_table(tensors: Mapping[str, TensorInfo]) -> str | None:
    """The embedding's name, if it is the head too: a checkpoint of a tied model has no tensor of the head."""
    tables = [name for name in tensors if strip_wrappers(name) == TABLE]
    return None if len(tables) != 1 or any(map(_is_head, tensors)) else tables[0]


def _tells_head_apart(adapter: LoraAdapter, base: TensorReader, table: str) -> bool:
    """Whether head and embedding of a tied base are two different matrices with the adapter.

    PEFT trains each of the two alone: LoRA on one leaves the other as it was while it trains, although a merge in place
    changes both; and a whole copy (``modules_to_save``) of one leaves the other. ``ensure_weight_tying`` ties them.
    Trained rows are PEFT's exception: those are tied by themselves.
    """
    if any(map(_is_head, adapter.rows)):
        return True
    pairs = {_is_head(f"{m}.weight"): p for m, p in adapter.modules.items() if _is_table(f"{m}.weight")}
    whole = {_is_head(name): values for name, values in adapter.replaced.items() if _is_table(name)}
    if not any(pairs) and not any(whole) and (adapter.folder.config.get("ensure_weight_tying") or not (pairs or whole)):
        return False
    info = base.tensors[table]
    if len(whole) == 1 and whole.get(False, whole.get(True, np.empty(0))).shape != info.shape:
        return False  # one table of another size, and no other: it is resized, and both are it
    if any(pair.shape != whole.get(is_head, info).shape for is_head, pair in pairs.items()):
        return True  # which does not fit, and is rejected where it is looked for
    sides = [(whole.get(is_head), pairs.get(is_head)) for is_head in (False, True)]
    count = max([info.rows, *(len(values) for values in whole.values())])
    for start in range(0, count, _BLOCK_ROWS):
        embedding, head = (_fold_side(base, table, *side, start) for side in sides)
        if not np.array_equal(embedding, head):
            return True
    return False


def _fold_side(base: TensorReader, table: str, whole: Floats | None, pair: LoraPair | None, start: int) -> Floats:
    info = base.tensors[table]
    stop = min(start + _BLOCK_ROWS, info.rows if whole is None else whole.shape[0])
    rows = base.read_rows(table, start, stop) if whole is None else round_to(whole[start:stop], info.dtype)
    return rows if pair is None else fold_rows(rows, pair, start, info.dtype)


def _is_head(name: str) -> bool:
    return strip_wrappers(name) == HEAD


def _is_table(name: str) -> bool:
    return strip_wrappers(name) in (HEAD, TABLE)


def _is_resized(info: TensorInfo, shape: tuple[int, ...]) -> bool:
    """Whether a table of tokens has another number of rows: for new tokens, or without rows that padded it."""
    return _is_table(info.name) and info.shape[1:] == shape[1:]
