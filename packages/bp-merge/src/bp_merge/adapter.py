"""LoRA adapters as arrays: A (r, d_in), B (d_out, r) and the factor on their product, for each adapted module.

The factor follows PEFT: alpha / r (LoRA, arXiv:2106.09685), or alpha / sqrt(r) with ``use_rslora``
(rsLoRA, arXiv:2312.03732), where ``rank_pattern`` and ``alpha_pattern`` may give a module its own r and alpha.

Besides the pairs, an adapter may hold DoRA's magnitudes (arXiv:2402.09353), whole tensors that take the base's place
(``modules_to_save``, trained biases), rows of them (trainable tokens), biases that are added to the base's, and pairs
of all experts of a layer at once (``target_parameters``, see `experts`). What else there is gets rejected, never
ignored; `read_refusals` lists it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache, partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, Generic, TypeVar

import numpy as np

from bp_merge.errors import AdapterUnfoldableError
from bp_merge.experts import ExpertLora, parse_expert
from bp_merge.product import multiply_in_order
from bp_merge.tensors import Floats, TensorReader, read_index
from bp_runs.adapter import AdapterFolder, read_adapter_folder
from bp_runs.errors import AdapterInvalidError

PREFIX = "base_model.model."
LORA_A, LORA_B, _B_BIAS = ".lora_A.weight", ".lora_B.weight", ".lora_B.bias"
_EMBEDDING_A, _EMBEDDING_B = ".lora_embedding_A", ".lora_embedding_B"
_MAGNITUDE = ".lora_magnitude_vector"
_NESTED = ".base_layer"
_TOKENS = ".token_adapter.trainable_tokens_delta"
_OWN_NAME = re.compile(r"(\.lora_(?:embedding_)?[AB]|\.lora_magnitude_vector)\.default(?=\.|$)")
# As many as are in use at once: threads work on the end of one tensor and the start of the next.
_PAIRS_KEPT = 4
# Of all experts of a layer: the one that is read, and the next.
_FUSED_KEPT = 2
# What PEFT's wrappers leave in the names of tensors that they save whole.
_WRAPPERS = (".base_layer.", ".modules_to_save.", ".original_module.")

# Settings that change the merged weights in ways that B @ A does not carry.
_UNFOLDABLE_SETTINGS: Mapping[str, str] = MappingProxyType(
    {
        "layer_replication": "replicated layers",
        "use_qalora": "QA-LoRA",
        "use_bdlora": "BD-LoRA",
        "alora_invocation_tokens": "activated LoRA",
        "arrow_config": "Arrow routing",
        "kasa_config": "KaSA",
        "monteclora_config": "MonteCLoRA",
        "megatron_config": "Megatron layers",
    }
)
# Other ways of starting (PiSSA, OLoRA, CorDA, LoftQ, …) also change the base, which the saved base does not show.
_HARMLESS_INITS = (True, False, None, "true", "gaussian", "eva", "orthogonal")


@dataclass(frozen=True, slots=True)
class LoraPair:
    """One module's low-rank change."""

    a: Floats
    """(r, d_in)"""
    b: Floats
    """(d_out, r)"""
    scale: float
    """Factor on ``b @ a``."""
    magnitude: Floats | None = None
    """DoRA's length of each row of the weight, (d_out,); None without DoRA."""
    is_transposed: bool = False
    """Whether the weight is stored as (d_in, d_out): embeddings, and linear layers with ``fan_in_fan_out``."""
    rounds_change: bool = False
    """Whether PEFT rounds the change before it adds it, as it does for embeddings and parameters."""

    @property
    def shape(self) -> tuple[int, int]:
        """The shape of the weight that it changes."""
        shape = int(self.b.shape[0]), int(self.a.shape[1])
        return shape[::-1] if self.is_transposed else shape

    @property
    def is_plain(self) -> bool:
        """Whether it is nothing but ``scale * b @ a``, added to a weight that is stored as (d_out, d_in)."""
        return self.magnitude is None and not self.is_transposed

    def delta(self, start: int = 0, stop: int | None = None) -> Floats:
        """Rows ``start`` to ``stop`` of ``(b @ a) * scale``, all in float32: (stop - start, columns)."""
        if self.is_transposed:
            product = np.ascontiguousarray(multiply_in_order(self.b, self.a[:, start:stop]).T)
        else:
            product = multiply_in_order(self.b[start:stop], self.a)
        product *= np.float32(self.scale)
        return product


Key = TypeVar("Key")


class PairsByName(Mapping[str, LoraPair], Generic[Key]):
    """Pairs that are read when they are requested, since an adapter can be larger than all else that an export holds.

    Args:
        modules: The module of each name, or what else a pair is found by.
        read: Reads the pair of a module.
    """

    def __init__(self, modules: Mapping[str, Key], read: Callable[[Key], LoraPair]) -> None:
        self._modules, self._read = modules, read

    def __getitem__(self, name: str) -> LoraPair:
        return self._read(self._modules[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self._modules)

    def __len__(self) -> int:
        return len(self._modules)


@dataclass(frozen=True, slots=True)
class LoraAdapter:
    """An adapter; its pairs stay in the file until they are requested."""

    folder: AdapterFolder
    modules: Mapping[str, LoraPair]
    """By the module's name in the base, for example ``model.layers.0.self_attn.q_proj``."""
    replaced: Mapping[str, Floats] = field(default_factory=dict)
    """Tensors that take the place of the base's, by tensor name."""
    rows: Mapping[str, tuple[tuple[int, ...], Floats]] = field(default_factory=dict)
    """Rows that take the place of the base's: their numbers and values, by tensor name."""
    added: Mapping[str, Floats] = field(default_factory=dict)
    """What is added to the base's tensors, by tensor name: biases of lora_B with their factor."""
    experts: tuple[ExpertLora, ...] = ()
    """LoRA on parameters that hold all experts of a layer."""

    @property
    def is_plain(self) -> bool:
        """Whether it is nothing but ``scale * B @ A`` on linear weights, which is what merge methods work on."""
        others = self.replaced or self.rows or self.added or self.experts
        return not others and all(pair.is_plain for pair in self.modules.values())


def load_adapter(path: Path) -> LoraAdapter:
    """Read a PEFT LoRA adapter folder, as float32. All of it is checked now; pairs are read again when needed.

    Raises:
        AdapterInvalidError: Files are missing, a module lacks its A or B, ranks disagree, or a weight is not finite.
        AdapterUnfoldableError: The adapter does what a fold would lose.
        TensorsInvalidError: Its safetensors file is damaged.
    """
    folder = read_adapter_folder(path)
    if refusals := read_refusals(folder.config):
        raise AdapterUnfoldableError(
            f"{path} uses what cannot be folded yet: {', '.join(refusals)}", details={"features": refusals}
        )
    stored = {clean_name(name): info for name, info in read_index(folder.weights).items()}
    with TensorReader(stored) as reader:
        rest = dict.fromkeys(reader.tensors)
        linears = _read_modules(reader, LORA_A, LORA_B)
        fused = [module for module in linears if _is_fused(module)]
        linears = [module for module in linears if module not in fused]
        for module in fused:
            _check_experts(folder, *_load_both(folder, reader, module, (LORA_A, LORA_B), rest), module)
        embeddings = _read_modules(reader, _EMBEDDING_A, _EMBEDDING_B)
        for module in linears:
            _load_pair(folder, reader, module, rest)
        for module in embeddings:
            _load_embedding(folder, reader, module, rest)
        added = dict(_load_added(folder, reader, rest))
        rows = dict(_load_rows(folder, reader, rest))
        replaced = dict(_load_replaced(path, reader, rest))
        index = reader.tensors
    names = {module: module for module in (*linears, *embeddings)}
    if not (names or rows or replaced or fused):
        raise AdapterInvalidError(f"{folder.weights} holds no LoRA weights")

    @lru_cache(maxsize=_PAIRS_KEPT)
    def read(module: str) -> LoraPair:
        load = _load_embedding if module in embeddings else _load_pair
        with TensorReader(index) as reader:
            return load(folder, reader, module, dict.fromkeys(index))

    @lru_cache(maxsize=_FUSED_KEPT)
    def read_experts(module: str) -> tuple[Floats, Floats]:
        with TensorReader(index) as reader:
            return _load_both(folder, reader, module, (LORA_A, LORA_B), dict.fromkeys(index))

    shapes = {end: [index[PREFIX + module + end].shape for module in fused] for end in (LORA_A, LORA_B)}
    experts = tuple(
        ExpertLora(module.replace(_NESTED, ""), a_shape, b_shape, partial(read_experts, module))
        for module, a_shape, b_shape in zip(fused, shapes[LORA_A], shapes[LORA_B], strict=True)
    )
    frozen = MappingProxyType
    return LoraAdapter(folder, PairsByName(names, read), frozen(replaced), frozen(rows), frozen(added), experts)


def clean_name(name: str) -> str:
    """A tensor's name without the adapter's own, which state dicts that were saved by hand still have."""
    return _OWN_NAME.sub(r"\1", name)


def read_refusals(config: Mapping[str, Any]) -> list[str]:
    """The features of an ``adapter_config.json`` that a fold would lose, in words; empty when it can be folded."""
    found = [words for key, words in _UNFOLDABLE_SETTINGS.items() if config.get(key)]
    if config.get("use_dora") and config.get("fan_in_fan_out"):
        found.append("DoRA on transposed weights (fan_in_fan_out)")
    init = config.get("init_lora_weights", True)
    if (init.lower() if isinstance(init, str) else init) not in _HARMLESS_INITS:
        found.append(f"a start that changes the base (init_lora_weights={init})")
    return found


def compute_scale(config: Mapping[str, Any], module: str) -> tuple[int, float]:
    """Rank and factor of a module by PEFT's rules.

    A pattern is a regular expression that must match the module's whole name or its end after a dot; the first match
    counts (PEFT, ``get_pattern_key``). Of a weight that is a target parameter, such as a router's, the name ends in
    ``.weight`` there.
    """
    if any(f".{module}.weight".endswith(f".{target}") for target in config.get("target_parameters") or ()):
        module = f"{module}.weight"
    r = int(_find_in_pattern(config.get("rank_pattern"), module, config["r"]))
    alpha = float(_find_in_pattern(config.get("alpha_pattern"), module, config.get("lora_alpha", r)))
    return r, alpha / math.sqrt(r) if config.get("use_rslora") else alpha / r


def _find_in_pattern(pattern: Mapping[str, Any] | None, module: str, default: Any) -> Any:
    for key, value in (pattern or {}).items():
        try:
            if re.match(rf"(.*\.)?({key})$", module):
                return value
        except re.error as error:
            raise AdapterInvalidError(f"{key!r} is no pattern for modules", cause=str(error)) from error
    return default


def _read_modules(reader: TensorReader, *ends: str) -> list[str]:
    """Names of the modules that have an A or a B of a kind."""
    names = {n.removeprefix(PREFIX).removesuffix(end) for n in reader.tensors for end in ends if n.endswith(end)}
    return sorted(names)


def _is_fused(module: str) -> bool:
    """Whether a module's LoRA is on a parameter of all experts of a layer, perhaps one inside another's."""
    return module.replace(_NESTED, "").rpartition(".")[2] == "experts"


def _check_experts(folder: AdapterFolder, a: Floats, b: Floats, module: str) -> None:
    _require_finite(f"{module} of {folder.path}", a, b)
    if a.ndim != 2 or b.ndim != 2 or a.shape[0] != b.shape[1]:
        raise AdapterInvalidError(f"{module} has lora_A {a.shape} and lora_B {b.shape}, whose ranks differ")


def _is_parameter(config: Mapping[str, Any], module: str) -> bool:
    """Whether PEFT takes a module's weight as a parameter: an expert's, or one that the config names."""
    return parse_expert(f"{module}.weight") is not None or any(
        f".{module}.weight".endswith(f".{name}") for name in config.get("target_parameters") or ()
    )


def _load_pair(folder: AdapterFolder, reader: TensorReader, module: str, rest: dict[str, None]) -> LoraPair:
    a, b = _load_both(folder, reader, module, (LORA_A, LORA_B), rest)
    found = [key for end in ("", ".weight") if (key := PREFIX + module + _MAGNITUDE + end) in reader.tensors]
    magnitude = reader.read(found[0]).reshape(-1) if found else None
    for key in found:
        del rest[key]
    has_dora = bool(folder.config.get("use_dora"))
    if (magnitude is not None) != has_dora or (magnitude is not None and magnitude.shape != b.shape[:1]):
        raise AdapterInvalidError(f"{module} and adapter_config.json disagree about DoRA")
    scale = check_pair(folder, module, a, b)
    return LoraPair(
        a,
        b,
        scale,
        magnitude,
        is_transposed=bool(folder.config.get("fan_in_fan_out")),
        rounds_change=_is_parameter(folder.config, module),
    )


def _load_embedding(folder: AdapterFolder, reader: TensorReader, module: str, rest: dict[str, None]) -> LoraPair:
    a, b = _load_both(folder, reader, module, (_EMBEDDING_A, _EMBEDDING_B), rest)
    if PREFIX + module + _MAGNITUDE in reader.tensors or folder.config.get("use_dora"):
        raise AdapterUnfoldableError(f"{folder.weights} has DoRA on the embedding {module}")
    return LoraPair(a, b, check_pair(folder, module, a, b), is_transposed=True, rounds_change=True)


def _load_both(
    folder: AdapterFolder, reader: TensorReader, module: str, ends: tuple[str, str], rest: dict[str, None]
) -> tuple[Floats, Floats]:
    keys = [PREFIX + module + end for end in ends]
    if any(key not in reader.tensors for key in keys):
        raise AdapterInvalidError(f"{folder.weights} has only one of lora_A and lora_B of {module}")
    for key in keys:
        del rest[key]
    return reader.read(keys[0]), reader.read(keys[1])


def check_pair(folder: AdapterFolder, module: str, a: Floats, b: Floats) -> float:
    """The factor on a module's product, once ranks and values are as they should be.

    Raises:
        AdapterInvalidError: Ranks disagree with the config, or a weight is not finite.
    """
    r, scale = compute_scale(folder.config, module)
    if a.ndim != 2 or b.ndim != 2 or a.shape[0] != r or b.shape[1] != r:
        raise AdapterInvalidError(
            f"{module} has lora_A {a.shape} and lora_B {b.shape}; adapter_config.json says rank {r}"
        )
    _require_finite(f"{module} of {folder.path}", a, b)
    return scale


def _require_finite(name: str, *values: Floats) -> None:
    if not all(np.isfinite(value).all() for value in values):
        raise AdapterInvalidError(f"{name} has weights that are not finite: the training diverged")


def _load_added(folder: AdapterFolder, reader: TensorReader, rest: dict[str, None]) -> Iterator[tuple[str, Floats]]:
    for key in [key for key in rest if key.endswith(_B_BIAS)]:
        del rest[key]
        module = key.removeprefix(PREFIX).removesuffix(_B_BIAS)
        values = reader.read(key) * np.float32(compute_scale(folder.config, module)[1])
        _require_finite(key, values)
        yield f"{module}.bias", values


def _load_rows(
    folder: AdapterFolder, reader: TensorReader, rest: dict[str, None]
) -> Iterator[tuple[str, tuple[tuple[int, ...], Floats]]]:
    told = folder.config.get("trainable_token_indices") or {}
    for key in [key for key in rest if key.endswith(_TOKENS)]:
        del rest[key]
        module = key.removeprefix(PREFIX).removesuffix(_TOKENS)
        named = told.get(module.rpartition(".")[2], told.get(module)) if isinstance(told, dict) else told
        values = reader.read(key)
        if not named or len(named) != len(values):
            raise AdapterInvalidError(f"{folder.weights} has {len(values)} rows for {module}, the config other ones")
        _require_finite(key, values)
        yield f"{module}.weight", (tuple(int(i) for i in named), values)


def _load_replaced(path: Path, reader: TensorReader, rest: dict[str, None]) -> Iterator[tuple[str, Floats]]:
    """Whole tensors: what is left and has the name of one."""
    for key in rest:
        name = key.removeprefix(PREFIX)
        for wrapper in _WRAPPERS:
            name = name.replace(wrapper, ".")
        if not key.startswith(PREFIX) or ".lora_" in key or not name.endswith((".weight", ".bias")):
            raise AdapterUnfoldableError(f"{path} holds {key}, which a fold would not know where to put")
        values = reader.read(key)
        _require_finite(key, values)
        yield name, values
