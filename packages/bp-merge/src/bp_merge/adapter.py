"""LoRA adapters as arrays: A (r, d_in), B (d_out, r) and the factor on their product, for each adapted module.

The factor follows PEFT: alpha / r (LoRA, arXiv:2106.09685), or alpha / sqrt(r) with ``use_rslora``
(rsLoRA, arXiv:2312.03732), where ``rank_pattern`` and ``alpha_pattern`` may give a module its own r and alpha.

What adds more than ``scale * B @ A`` to linear weights is refused, never ignored; `read_refusals` lists it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from bp_merge.errors import AdapterUnfoldableError
from bp_merge.product import multiply_in_order
from bp_merge.tensors import Floats, TensorReader, read_index
from bp_runs.adapter import AdapterFolder, read_adapter_folder
from bp_runs.errors import AdapterInvalidError

_PREFIX = "base_model.model."
_A, _B = ".lora_A.weight", ".lora_B.weight"

# Settings that change the merged weights in ways that B @ A does not carry.
_UNFOLDABLE_SETTINGS: Mapping[str, str] = MappingProxyType(
    {
        "use_dora": "DoRA",
        "lora_bias": "a bias on lora_B",
        "modules_to_save": "whole modules trained beside LoRA (modules_to_save)",
        "trainable_token_indices": "trainable tokens",
        "fan_in_fan_out": "transposed base weights (fan_in_fan_out)",
        "target_parameters": "LoRA on bare parameters (target_parameters)",
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

    @property
    def shape(self) -> tuple[int, int]:
        """(d_out, d_in): the shape of the weight that it changes."""
        return int(self.b.shape[0]), int(self.a.shape[1])

    def delta(self, start: int = 0, stop: int | None = None) -> Floats:
        """Rows ``start`` to ``stop`` of ``(b @ a) * scale``, all in float32: (stop - start, d_in)."""
        product = multiply_in_order(self.b[start:stop], self.a)
        product *= np.float32(self.scale)
        return product


@dataclass(frozen=True, slots=True)
class LoraAdapter:
    """An adapter in memory."""

    folder: AdapterFolder
    modules: Mapping[str, LoraPair]
    """By the module's name in the base, for example ``model.layers.0.self_attn.q_proj``."""


def load_adapter(path: Path) -> LoraAdapter:
    """Read a PEFT LoRA adapter folder whole, as float32.

    Raises:
        AdapterInvalidError: Files are missing, a module lacks its A or B, ranks disagree, or a weight is not finite.
        AdapterUnfoldableError: The adapter is more than ``scale * B @ A`` on linear weights.
        TensorsInvalidError: Its safetensors file is damaged.
    """
    folder = read_adapter_folder(path)
    if refusals := read_refusals(folder.config):
        raise AdapterUnfoldableError(
            f"{path} uses what cannot be folded yet: {', '.join(refusals)}", details={"features": refusals}
        )
    with TensorReader(read_index(folder.weights)) as reader:
        modules = {name: _load_pair(folder, reader, name) for name in _read_modules(path, reader)}
    if not modules:
        raise AdapterInvalidError(f"{folder.weights} holds no LoRA weights")
    return LoraAdapter(folder, MappingProxyType(modules))


def read_refusals(config: Mapping[str, Any]) -> list[str]:
    """The features of an ``adapter_config.json`` that a fold would lose, in words; empty when it can be folded."""
    found = [words for key, words in _UNFOLDABLE_SETTINGS.items() if config.get(key)]
    if config.get("bias", "none") not in ("none", None):
        found.append(f"trained biases (bias={config['bias']})")
    init = config.get("init_lora_weights", True)
    if (init.lower() if isinstance(init, str) else init) not in _HARMLESS_INITS:
        found.append(f"a start that changes the base (init_lora_weights={init})")
    return found


def compute_scale(config: Mapping[str, Any], module: str) -> tuple[int, float]:
    """Rank and factor of a module by PEFT's rules.

    A pattern is a regular expression that must match the module's whole name or its end after a dot; the first match
    counts (PEFT, ``get_pattern_key``).
    """
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


def _read_modules(path: Path, reader: TensorReader) -> list[str]:
    """Names of the adapted modules, after a look that every tensor is an A or a B of one."""
    names = set()
    for tensor in reader.tensors:
        module = tensor.removeprefix(_PREFIX).removesuffix(_A).removesuffix(_B)
        if not tensor.startswith(_PREFIX) or not tensor.endswith((_A, _B)):
            raise AdapterUnfoldableError(f"{path} holds {tensor}, which is no lora_A or lora_B of a linear module")
        names.add(module)
    return sorted(names)


def _load_pair(folder: AdapterFolder, reader: TensorReader, module: str) -> LoraPair:
    keys = (_PREFIX + module + _A, _PREFIX + module + _B)
    if any(key not in reader.tensors for key in keys):
        raise AdapterInvalidError(f"{folder.weights} has only one of lora_A and lora_B of {module}")
    a, b = (reader.read(key) for key in keys)
    r, scale = compute_scale(folder.config, module)
    if a.ndim != 2 or b.ndim != 2 or a.shape[0] != r or b.shape[1] != r:
        raise AdapterInvalidError(
            f"{module} has lora_A {a.shape} and lora_B {b.shape}; adapter_config.json says rank {r}"
        )
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        raise AdapterInvalidError(f"{module} has weights that are not finite: the training diverged")
    return LoraPair(a, b, scale)
