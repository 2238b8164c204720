"""Which expert each part of an adapter belongs to, and what belongs to none."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from bp_merge.adapter import LoraAdapter, LoraPair, compute_scale
from bp_merge.errors import AdapterMismatchError
from bp_merge.experts import DOWN, GATE, GATE_UP, PARAMETERS, ExpertLora, parse_expert
from bp_merge.tensors import StoredTensor, TensorInfo, strip_wrappers
from bp_runs.errors import AdapterInvalidError

_JOINED = re.compile(r"(?P<module>.*\.experts)\.(?P<parameter>gate_up_proj|down_proj)s\.(?P<index>\d+)")
_TURNED_BEFORE = (0, 19)
"""PEFT's version that gave "in" and "out" of such parameters their meaning of today."""


@dataclass(frozen=True, slots=True)
class ExpertSlot:
    """One expert's part of an `ExpertLora`."""

    lora: ExpertLora
    experts: int
    index: int
    rows: slice
    """The projection's rows of the parameter's."""
    is_turned: bool
    """Whether "in" and "out" are those of PEFT before 0.19."""
    scale: float

    def read(self) -> LoraPair:
        """The pair of the one matrix: A (r, d_in) and B (d_out, r)."""
        whole_a, whole_b = self.lora.read()
        rank = whole_a.shape[0] // self.experts
        a, b = whole_a[self.index * rank : (self.index + 1) * rank], whole_b[:, self.index :: self.experts]
        if self.is_turned:
            a, b = b.T, a.T
        return LoraPair(np.ascontiguousarray(a), np.ascontiguousarray(b[self.rows]), self.scale, rounds_change=True)


@dataclass(frozen=True, slots=True)
class ModuleSlot:
    """Some rows of a module's pair: gate or up of an expert that has both in one layer, as in Unsloth's gpt-oss."""

    pair: Callable[[], LoraPair]
    rows: slice

    def read(self) -> LoraPair:
        """The pair of the one matrix."""
        pair = self.pair()
        return LoraPair(pair.a, np.ascontiguousarray(pair.b[self.rows]), pair.scale, rounds_change=pair.rounds_change)


@dataclass(frozen=True, slots=True)
class Mixture:
    """The experts of one layer in a base."""

    module: str
    """Without wrappers: ``layers.0.mlp.experts``."""
    names: Mapping[tuple[int, str], str]
    """The tensors by expert and projection."""
    has_pairs: bool
    """As `StoredTensor.has_pairs`."""
    experts: int
    width: int
    """d: of the model."""
    inner: int
    """f: of an expert."""

    def shape(self, parameter: str) -> tuple[int, int]:
        """(out, in) of one expert's part of a parameter."""
        return (2 * self.inner, self.width) if parameter == GATE_UP else (self.width, self.inner)

    def rows(self, projection: str) -> slice:
        """A projection's rows of its parameter's."""
        if projection == DOWN:
            return slice(None)
        place = 0 if projection == GATE else 1
        return slice(place, None, 2) if self.has_pairs else slice(place * self.inner, (place + 1) * self.inner)


def find_mixtures(tensors: Mapping[str, TensorInfo], stored: Mapping[str, StoredTensor]) -> dict[str, Mixture]:
    """The base's mixtures of experts by module."""
    names: dict[str, dict[tuple[int, str], str]] = {}
    for name in tensors:
        expert = parse_expert(name)
        if expert is not None and name.endswith(".weight"):
            names.setdefault(strip_wrappers(expert.module), {})[expert.index, expert.projection] = name
    has_pairs = any(tensor.has_pairs for tensor in stored.values())
    found = {}
    for module, own in names.items():
        first = own.get((0, GATE))
        if first is not None:
            inner, width = tensors[first].shape
            experts = 1 + max(index for index, _ in own)
            found[module] = Mixture(module, own, has_pairs, experts, width, inner)
    return found


def match_experts(adapter: LoraAdapter, mixtures: Mapping[str, Mixture]) -> dict[str, ExpertSlot]:
    """Each expert's part of the adapter, by the base's name of its tensor.

    Raises:
        AdapterMismatchError: The base has no such experts, or the shapes fit none of their parameters.
        AdapterInvalidError: Parameters that the adapter's config names have no weights in it.
    """
    config = adapter.folder.config
    fits = [_Fit(lora, _find_mixture(lora, mixtures, adapter)) for lora in adapter.experts]
    is_turned = _find_orientation(fits, config)
    slots: dict[str, ExpertSlot] = {}
    for fit in fits:
        lora, mixture = fit.lora, fit.mixture
        parameter = fit.choose(is_turned=is_turned)
        rank, scale = compute_scale(config, f"{lora.module}.{parameter}")
        if lora.a_shape[0] != rank * mixture.experts:
            raise AdapterInvalidError(
                f"{lora.module}.{parameter} has lora_A {lora.a_shape}; adapter_config.json says rank {rank}, "
                f"and the base has {mixture.experts} experts"
            )
        for (index, projection), name in mixture.names.items():
            if projection in PARAMETERS[parameter]:
                rows = mixture.rows(projection)
                slots[name] = ExpertSlot(lora, mixture.experts, index, rows, is_turned, scale)
    _require_all(config, mixtures, slots)
    return slots


@dataclass(frozen=True, slots=True)
class _Fit:
    """The parameters that a LoRA's shapes could be of, as (parameter, turned)."""

    lora: ExpertLora
    mixture: Mixture

    @property
    def choices(self) -> set[tuple[str, bool]]:
        found = (self.lora.b_shape[0], self.lora.a_shape[1])
        shapes = {parameter: self.mixture.shape(parameter) for parameter in PARAMETERS}
        return {
            (parameter, turned)
            for parameter, shape in shapes.items()
            for turned in (False, True)
            if found == (shape[::-1] if turned else shape)
        }

    def choose(self, *, is_turned: bool) -> str:
        found = [parameter for parameter, turned in self.choices if turned == is_turned]
        if len(found) != 1:
            raise AdapterMismatchError(
                f"{self.lora.module} has lora_A {self.lora.a_shape} and lora_B {self.lora.b_shape}; the base's experts "
                f"are {self.mixture.shape(GATE_UP)} and {self.mixture.shape(DOWN)}"
            )
        return found[0]


def match_modules(adapter: LoraAdapter, mixtures: Mapping[str, Mixture]) -> dict[str, ModuleSlot]:
    """Pairs of modules ``experts.gate_up_projs.3`` and ``experts.down_projs.3``, by the base's name of each matrix.

    Raises:
        AdapterMismatchError: The base has no such expert, or of another shape.
    """
    slots = {}
    for module, (parent, parameter, index) in list_joined_modules(adapter).items():
        mixture = mixtures.get(strip_wrappers(parent))
        pair = adapter.modules[module]
        if mixture is None or index >= mixture.experts or pair.shape != mixture.shape(parameter):
            raise AdapterMismatchError(
                f"the adapter changes {module} as {pair.shape}, and the base has no such expert",
                cause=f"the adapter names {adapter.folder.base} as its base",
            )
        for projection in PARAMETERS[parameter]:
            slots[mixture.names[index, projection]] = ModuleSlot(
                partial(adapter.modules.__getitem__, module), mixture.rows(projection)
            )
    return slots


def list_joined_modules(adapter: LoraAdapter) -> dict[str, tuple[str, str, int]]:
    """Modules that are one expert's gate and up, or its down, by name: the experts' module, parameter and expert."""
    found = ((module, _JOINED.fullmatch(module)) for module in adapter.modules)
    return {m: (match["module"], match["parameter"], int(match["index"])) for m, match in found if match}


def _find_mixture(lora: ExpertLora, mixtures: Mapping[str, Mixture], adapter: LoraAdapter) -> Mixture:
    found = mixtures.get(strip_wrappers(lora.module))
    if found is None:
        raise AdapterMismatchError(
            f"the adapter changes {lora.module}, and the base has no such experts",
            cause=f"the adapter names {adapter.folder.base} as its base",
        )
    return found


def _find_orientation(fits: Iterable[_Fit], config: Mapping[str, Any]) -> bool:
    """Whether "in" and "out" are those of PEFT before 0.19: by the shapes, and where those fit both by the version.

    Raises:
        AdapterMismatchError: Neither tells.
    """
    told = {next(iter(turned)) for fit in fits if len(turned := {turned for _, turned in fit.choices}) == 1}
    if len(told) == 1:
        return told.pop()
    version = re.match(r"(\d+)\.(\d+)", str(config.get("peft_version") or ""))
    if told or (fits and version is None):
        raise AdapterMismatchError(
            "the adapter's weights on experts fit both ways round, and it does not name PEFT's version",
            fix='Add "peft_version" to adapter_config.json: the version of PEFT that trained it, such as "0.21.2".',
        )
    return version is not None and (int(version[1]), int(version[2])) < _TURNED_BEFORE


def _require_all(config: Mapping[str, Any], mixtures: Mapping[str, Mixture], slots: Mapping[str, ExpertSlot]) -> None:
    """PEFT puts LoRA on every parameter whose name ends as one of ``target_parameters``; so one without is a loss."""
    targets = [strip_wrappers(str(name)) for name in config.get("target_parameters") or ()]
    for module, mixture in mixtures.items():
        for parameter, projections in PARAMETERS.items():
            if not any(f".{module}.{parameter}".endswith(f".{target}") for target in targets):
                continue
            lost = [name for (_, projection), name in mixture.names.items() if projection in projections]
            if missing := [name for name in lost if name not in slots]:
                raise AdapterInvalidError(
                    f"adapter_config.json names {parameter} of {module} as trained, and the adapter has no weights "
                    f"for {len(missing)} of its {len(lost)} matrices, such as {missing[0]}",
                    fix="Save the adapter again from the model that was trained; without them it would be the base's.",
                )


def list_unreached(mixtures: Mapping[str, Mixture], changed: Iterable[str]) -> list[str]:
    """Experts' matrices that no change reached although it reached others of the same projection."""
    reached = set(changed)
    touched = {
        projection
        for mixture in mixtures.values()
        for (_, projection), name in mixture.names.items()
        if name in reached
    }
    return sorted(
        name
        for mixture in mixtures.values()
        for (_, projection), name in mixture.names.items()
        if projection in touched and name not in reached
    )
