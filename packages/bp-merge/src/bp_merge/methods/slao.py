"""SLAO: one adapter for a stream of training runs (Qiao and Mahdavi, arXiv:2512.23017), with the state between them.

A is (r, d_in), B is (d_out, r). Run 1 is plain LoRA. Run i ≥ 2 starts from ``A = Qᵀ`` of the reduced QR of the last
fine-tuned Aᵀ, columns of Q times the signs of R's diagonal, and from the last **fine-tuned** B, and trains both. Then

    A_merged = A_tuned        B_merged = B_merged + (B_tuned - B_merged) / √i

Two other arms share the merge and start elsewhere, under names of their own: ``ftba-mb`` (the paper's ablation without
QR) from the fine-tuned A itself, with which less was forgotten in docs/log/2026-11-24-continual.md, and
``slao-preserving`` (not the paper's) from Qᵀ with R moved into both B's.

The merged adapter is the one to evaluate, save and export; training continues from the fine-tuned one. A_merged is
always A_tuned, the state is one A, two B's and i. A zero on R's diagonal counts as +1, where the paper's sign() would
blank a column. The scale alpha / r has no part in it and must stay the same over the stream.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from bp_merge.adapter import LORA_A, LORA_B, PREFIX, LoraPair
from bp_merge.errors import AdapterUnmergeableError, SlaoStateError, SlaoStreamError, TensorsInvalidError
from bp_merge.lowrank import Product
from bp_merge.methods.options import ModulePlan
from bp_merge.source import AdapterSource
from bp_merge.tensors import Floats, TensorReader, read_index, read_metadata, write_tensors
from bp_runs.files import publish_file
from bp_runs.wording import setting_ref

STATE_SCHEMA = "backpropagate.slao/1"
_TUNED, _MERGED = "B_tuned", "B_merged"


def factor_rows(a: Floats) -> tuple[Floats, Floats]:
    """L (r, r) and Q (r, d_in), float32, with ``a = L @ Q``, orthonormal rows of Q, and L's diagonal from 0 on.

    Q is the Qᵀ of the reduced QR of ``aᵀ`` and L its Rᵀ, both with the signs of R's diagonal, where 0 counts as +1.
    """
    q, r = np.linalg.qr(a.T.astype(np.float32))
    signs = np.where(np.diagonal(r) < 0, np.float32(-1), np.float32(1))
    return np.ascontiguousarray(r.T * signs), np.ascontiguousarray((q * signs).T)


def orthonormal_rows(a: Floats) -> Floats:
    """The Q of `factor_rows`."""
    return factor_rows(a)[1]


def blend(merged: Floats, tuned: Floats, i: int) -> Floats:
    """``merged + (tuned - merged) / √i``, float32; i counts runs from 1."""
    moved: Floats = merged + (tuned - merged) * np.float32(1 / math.sqrt(i))
    return moved


def merge(pairs: Sequence[LoraPair], plan: ModulePlan) -> Product:
    """Adapters in the order of their training: the last A, and B's blended one after the other."""
    del plan
    merged = pairs[0].b
    for i, pair in enumerate(pairs[1:], start=2):
        merged = blend(merged, pair.b, i)
    return Product(pairs[-1].a, merged * np.float32(pairs[-1].scale))


@dataclass(frozen=True, slots=True)
class SlaoState:
    """A stream after run i; each mapping is by module."""

    stream: str
    """Id of the stream that it belongs to."""
    i: int
    """Runs folded in, from 1."""
    a: Mapping[str, Floats]
    """The last fine-tuned A, (r, d_in)."""
    tuned: Mapping[str, Floats]
    """The last fine-tuned B, (d_out, r)."""
    merged: Mapping[str, Floats]
    """The merged B, (d_out, r)."""
    scales: Mapping[str, float]
    """Factors on ``B @ A``, which must stay the same."""

    def fold(self, adapter: Path) -> SlaoState:
        """The state after the next run, whose fine-tuned adapter this is.

        Raises:
            SlaoStreamError: It has other layers, shapes, ranks or scales than the stream.
            CodedError: As `AdapterSource`.
        """
        with AdapterSource(adapter) as source:
            self._require_kin(source)
            pairs = {module: source.read(module) for module in source.modules}
        i = self.i + 1
        return SlaoState(
            self.stream,
            i,
            _freeze({module: pair.a for module, pair in pairs.items()}),
            _freeze({module: pair.b for module, pair in pairs.items()}),
            _freeze({module: blend(self.merged[module], pair.b, i) for module, pair in pairs.items()}),
            self.scales,
        )

    def next_start(self, *, qr: bool) -> dict[str, Floats]:
        """Tensors of the adapter that the next run starts from, by PEFT's names.

        Args:
            qr: Whether A gets orthonormal rows, as in the paper. With the same B's that changes what the adapter does,
                and what the merged one will do once the next A has taken its A's place.

        Raises:
            AdapterUnmergeableError: With ``qr``, the rank is larger than a layer's inputs.
        """
        if qr:
            self._require_wide()
        a = {module: orthonormal_rows(a) for module, a in self.a.items()} if qr else self.a
        return _name_tensors(a, self.tuned)

    def turn(self) -> SlaoState:
        """The same two changes of the weights with orthonormal rows of A: of A = L Q the L goes into both B's.

        Not the paper's. ``B @ A = (B @ L) @ Q`` holds for the fine-tuned and the merged B, since they share their A.

        Raises:
            AdapterUnmergeableError: The rank is larger than a layer's inputs.
        """
        self._require_wide()
        factors = {module: factor_rows(a) for module, a in self.a.items()}
        turned = [{m: b @ factors[m][0] for m, b in values.items()} for values in (self.tuned, self.merged)]
        a = _freeze({module: q for module, (_, q) in factors.items()})
        return SlaoState(self.stream, self.i, a, _freeze(turned[0]), _freeze(turned[1]), self.scales)

    def merged_adapter(self) -> dict[str, Floats]:
        """Tensors of the merged adapter, by PEFT's names."""
        return _name_tensors(self.a, self.merged)

    def _require_wide(self) -> None:
        """A (r, d_in) has at most d_in orthonormal rows."""
        for module, a in self.a.items():
            r, inputs = a.shape
            if r > inputs:
                raise AdapterUnmergeableError(
                    f"{module} has {inputs} inputs, so its A can't have {r} orthonormal rows, one for each rank",
                    fix=f"Train with a rank of at most {inputs}: {setting_ref('lora.r', inputs)}; or use "
                    "another merge: {set:multirun.merge=ftba-mb}",
                )

    def _require_kin(self, source: AdapterSource) -> None:
        mine = {m: (b.shape[0], self.a[m].shape[1], b.shape[1], self.scales[m]) for m, b in self.tuned.items()}
        theirs = {m: (*source.shape(m), source.rank(m), source.scale(m)) for m in source.modules}
        if mine == theirs:
            return
        module = next(m for m in sorted({*mine, *theirs}) if mine.get(m) != theirs.get(m))
        words = "(d_out, d_in, rank, scale)"
        raise SlaoStreamError(
            f"{module} is {mine.get(module, 'not adapted')} in the stream {self.stream} and "
            f"{theirs.get(module, 'not adapted')} in {source.path}, as {words}"
        )


def start_stream(stream: str, adapter: Path) -> SlaoState:
    """The state after run 1, whose fine-tuned adapter this is.

    Raises:
        CodedError: As `AdapterSource`.
    """
    with AdapterSource(adapter) as source:
        pairs = {module: source.read(module) for module in source.modules}
    b = _freeze({module: pair.b for module, pair in pairs.items()})
    a = _freeze({module: pair.a for module, pair in pairs.items()})
    return SlaoState(stream, 1, a, b, b, _freeze({module: pair.scale for module, pair in pairs.items()}))


def write_state(file: Path, state: SlaoState) -> None:
    """Write a state to one safetensors file, whole or not at all.

    Raises:
        DiskFullError, OutputNotWritableError: The old file stays.
    """
    tensors = {f"{m}.A": a for m, a in state.a.items()}
    tensors |= {f"{m}.{_TUNED}": b for m, b in state.tuned.items()}
    tensors |= {f"{m}.{_MERGED}": b for m, b in state.merged.items()}
    facts = {
        "schema": STATE_SCHEMA,
        "stream": state.stream,
        "i": str(state.i),
        "scales": json.dumps(dict(state.scales)),
    }
    with publish_file(file) as partial:
        write_tensors(partial, tensors, metadata=facts)


def read_state(file: Path, *, stream: str) -> SlaoState:
    """Read the state of a stream.

    Raises:
        SlaoStateError: The file is missing, damaged or no such state.
        SlaoStreamError: It is another stream's.
    """
    try:
        facts: Mapping[str, Any] = read_metadata(file)
        with TensorReader(read_index(file)) as reader:
            tensors = {name: reader.read(name) for name in reader.tensors}
        if facts["schema"] != STATE_SCHEMA:
            raise SlaoStateError(f"{file} is {facts['schema']!r}, not {STATE_SCHEMA!r}")
        scales = {str(m): float(s) for m, s in json.loads(facts["scales"]).items()}
        a, tuned, merged = ({m: tensors[f"{m}.{end}"] for m in scales} for end in ("A", _TUNED, _MERGED))
        i = int(facts["i"])
    except TensorsInvalidError as error:
        raise SlaoStateError(f"{file} cannot be used", cause=error.message) from error
    except (KeyError, ValueError, AttributeError) as error:
        raise SlaoStateError(f"{file} holds no state of a stream", cause=repr(error)) from error
    if facts.get("stream") != stream:
        raise SlaoStreamError(f"{file} belongs to the stream {facts.get('stream')}, not to {stream}")
    return SlaoState(stream, i, _freeze(a), _freeze(tuned), _freeze(merged), _freeze(scales))


def _name_tensors(a: Mapping[str, Floats], b: Mapping[str, Floats]) -> dict[str, Floats]:
    named = {f"{PREFIX}{module}{LORA_A}": value for module, value in a.items()}
    return named | {f"{PREFIX}{module}{LORA_B}": value for module, value in b.items()}


def _freeze(values: dict[str, Any]) -> Mapping[str, Any]:
    return MappingProxyType(values)
