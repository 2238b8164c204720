"""The base model from a local folder, by mlx-lm: checked first, then loaded."""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx import nn
from mlx.utils import tree_flatten, tree_map
from mlx_lm.utils import load_model as load_with_mlx_lm

from bp_runs.errors import ModelLoadError, RemoteCodeError, first_line
from bp_train_mlx.backend import Mode

GROUP_SIZE, BITS = 64, 4
"""Quantization on load, as `mlx_lm.convert` quantizes by default."""
_LOAD_ERRORS = (OSError, ValueError, KeyError, AttributeError, TypeError, RuntimeError, ImportError)


def read_config(base: Path, *, trust_remote_code: bool) -> dict[str, Any]:
    """The content of config.json.

    Raises:
        ModelLoadError: It is missing or not JSON.
        RemoteCodeError: The model brings Python code of its own, which was not allowed.
    """
    try:
        config: dict[str, Any] = json.loads((base / "config.json").read_bytes())
    except (OSError, ValueError) as error:
        raise ModelLoadError(f"the config of {base} cannot be used", cause=first_line(error)) from error
    if config.get("model_file") and not trust_remote_code:
        raise RemoteCodeError(f"{base} needs its own Python code, {config['model_file']}")
    return config


def text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The language model's part of a config; wrapped models keep it under ``text_config``."""
    inner = config.get("text_config")
    return {**config, **inner} if isinstance(inner, dict) else config


def stored_bits(config: Mapping[str, Any]) -> int | None:
    """Bits of the weights of a quantized base; None for 16 or 32 bits."""
    found = config.get("quantization") or config.get("quantization_config")
    if not isinstance(found, dict):
        return None
    bits = found.get("bits")
    return bits if isinstance(bits, int) else 4


def sketch_model(base: Path, config: Mapping[str, Any], *, trust_remote_code: bool) -> Any:
    """The model that the config describes, without reading weights: mlx arrays are lazy.

    Raises:
        ModelLoadError: mlx-lm does not know the model, or its files do not fit.
    """
    return _load(base, config, trust_remote_code=trust_remote_code, needs_weights=False)


def load_model(base: Path, config: Mapping[str, Any], mode: Mode, dtype: Any, *, trust_remote_code: bool) -> Any:
    """The base model in memory.

    Floating-point weights become ``dtype``; in mode qlora the linear layers of a 16-bit base are quantized to
    `BITS` bits in groups of `GROUP_SIZE`, one weight at a time.

    Raises:
        ModelLoadError: Files are missing, damaged or do not fit the config.
    """
    model = _load(base, config, trust_remote_code=trust_remote_code, needs_weights=True)
    try:
        model.update(
            tree_map(lambda a: a.astype(dtype) if mx.issubdtype(a.dtype, mx.floating) else a, model.parameters())
        )
        if mode.name == "qlora" and stored_bits(config) is None:
            nn.quantize(model, GROUP_SIZE, BITS, class_predicate=_is_quantizable)
        for _, weight in tree_flatten(model.parameters()):
            mx.eval(weight)  # one at a time: a 16-bit weight is freed once it is quantized
    except _LOAD_ERRORS as error:
        raise ModelLoadError(f"the weights in {base} cannot be loaded", cause=first_line(error)) from error
    model.freeze()
    model.eval()
    return model


def _load(base: Path, config: Mapping[str, Any], *, trust_remote_code: bool, needs_weights: bool) -> Any:
    try:
        model, _ = load_with_mlx_lm(
            base,
            lazy=True,
            strict=needs_weights,
            model_config=plain_rope(config),
            trust_remote_code=trust_remote_code,
        )
    except _LOAD_ERRORS as error:
        raise ModelLoadError(f"mlx-lm cannot load {base}", cause=first_line(error)) from error
    return model


def plain_rope(config: Mapping[str, Any]) -> dict[str, Any]:
    """Rotary settings under the names that all of mlx-lm's models read.

    transformers 5 writes ``rope_parameters``; some models of mlx-lm read only ``rope_theta`` and ``rope_scaling``, and
    would compute with a base of 10,000 whatever the model was trained with.
    """
    found: dict[str, Any] = {}
    for place in (config, config.get("text_config")):
        if not isinstance(place, dict):
            continue
        rope = place.get("rope_parameters")
        if not isinstance(rope, dict) or any(isinstance(value, dict) for value in rope.values()):
            continue  # by kind of layer: models that have those read them themselves
        flat = dict(place) if place is not config else found
        if "rope_theta" in rope:
            flat.setdefault("rope_theta", rope["rope_theta"])
        if rope.get("rope_type", "default") != "default" and not place.get("rope_scaling"):
            flat["rope_scaling"] = dict(rope)
        if place is not config:
            found["text_config"] = flat
    return {name: value for name, value in found.items() if name == "text_config" or config.get(name) is None}


def _is_float(array: Any) -> bool:
    return bool(mx.issubdtype(array.dtype, mx.floating))


def _is_quantizable(path: str, module: Any) -> bool:
    """Linear layers of the decoder, as nf4 does on CUDA: embeddings and head stay in 16 bits."""
    is_linear = isinstance(module, nn.Linear) or type(module).__name__ == "SwitchLinear"
    is_head = path.rsplit(".", 1)[-1] == "lm_head"
    return is_linear and not is_head and hasattr(module, "to_quantized") and module.weight.shape[-1] % GROUP_SIZE == 0


def count_parameters(model: Any) -> int:
    """Parameters of the model; of packed ones as many as they unpack to."""
    total = 0
    for _, module in model.named_modules():
        for name, value in module.items():
            if isinstance(value, mx.array) and name not in ("scales", "biases"):
                total += value.size * 32 // module.bits if name == "weight" and value.dtype == mx.uint32 else value.size
    return total


def tensor_names(base: Path) -> dict[str, tuple[int, ...]]:
    """Shapes of the tensors in a folder's safetensors files, by name; no tensor is read."""
    found: dict[str, tuple[int, ...]] = {}
    for file in sorted(base.glob("*.safetensors")):
        with file.open("rb") as stream:
            length = struct.unpack("<Q", stream.read(8))[0]
            header = json.loads(stream.read(length))
        found |= {name: tuple(entry["shape"]) for name, entry in header.items() if name != "__metadata__"}
    return found


def config_digest(base: Path) -> str:
    """Hex SHA-256 of config.json."""
    return hashlib.sha256((base / "config.json").read_bytes()).hexdigest()
