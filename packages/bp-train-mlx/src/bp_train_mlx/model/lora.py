"""LoRA and DoRA on a loaded model, by mlx-lm's layers, under the names that PEFT reads.

    mlx     model.layers.0.self_attn.q_proj.lora_a            (d_in, r)
    PEFT    base_model.model.model.layers.0.self_attn.q_proj.lora_A.default.weight   (r, d_in), the transpose

PEFT's names are those of the base's own tensors, which mlx-lm sometimes renames while it loads; so the name of a layer
is the one under which its weight is in the base's files.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx import nn
from mlx.utils import tree_flatten, tree_unflatten
from mlx_lm.tuner.dora import DoRALinear
from mlx_lm.tuner.lora import LoRALinear

from bp_runs.adapter import read_adapter_folder
from bp_runs.errors import AdapterInvalidError, TargetModulesError, first_line
from bp_runs.spec import LoraSpec
from bp_train_mlx.model.load import tensor_names

ALL_LINEAR = "all-linear"
PREFIX = "base_model.model."
_SIDES = {"lora_a": "lora_A", "lora_b": "lora_B", "m": "lora_magnitude_vector"}
_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts", "num_routed_experts")


@dataclass(frozen=True, slots=True)
class Targets:
    """The layers that get an adapter."""

    names: Mapping[str, str]
    """PEFT's name of each layer, without prefix, by its path in the mlx model."""
    leaves: tuple[str, ...]
    """As PEFT's ``target_modules``: last parts of the names, or whole names where those would mean other layers too."""
    warnings: tuple[str, ...] = ()
    """What the user should know before training."""


def choose_targets(model: Any, base: Path, config: Mapping[str, Any], target_modules: str) -> Targets:
    """The layers that ``target_modules`` means on ``model``.

    Args:
        model: Without an adapter; its weights need not be read.
        base: Its folder, whose tensors name the layers; may lack the weights.
        config: The content of its config.json.
        target_modules: ``all-linear``, or last parts of names joined by commas.

    Raises:
        TargetModulesError: No layer that can carry an adapter has the name, or its name in PEFT is not known.
    """
    carriers = _find_carriers(model, config)
    wanted = [name.strip() for name in target_modules.split(",") if name.strip()]
    known = sorted({path.rsplit(".", 1)[-1] for path in carriers})
    for name in wanted or [""]:
        if wanted != [ALL_LINEAR] and name.rsplit(".", 1)[-1] not in known:
            raise TargetModulesError(
                f"no layer that can carry an adapter is named {name!r}",
                cause=f"its layers that can carry an adapter: {', '.join(known)}",
            )
    chosen = [
        path for path in carriers if wanted == [ALL_LINEAR] or any(f".{path}".endswith(f".{name}") for name in wanted)
    ]
    names = _name_layers(chosen, base)
    linear = [path for path, module in model.named_modules() if isinstance(module, nn.Linear | nn.QuantizedLinear)]
    leaves = {path.rsplit(".", 1)[-1] for path in chosen}
    is_plain = all(path in chosen for path in linear if path.rsplit(".", 1)[-1] in leaves)
    warnings: tuple[str, ...] = ()
    if any("SwitchLinear" in type(module).__name__ for _, module in model.named_modules()):
        adapted = ", ".join(sorted(leaves))
        warnings = (f"The model is a mixture of experts: its experts and routers are not adapted, {adapted} are.",)
    return Targets(names, tuple(sorted(leaves if is_plain else names.values())), warnings)


def _find_carriers(model: Any, config: Mapping[str, Any]) -> list[str]:
    """Paths of linear layers that may carry an adapter: not the head, which the loss multiplies with, and no router."""
    text = config.get("text_config") if isinstance(config.get("text_config"), dict) else config
    counts = {text.get(name) for name in _COUNTS} - {None, 0, 1} if text else set()
    found = []
    for path, module in model.named_modules():
        if not isinstance(module, nn.Linear | nn.QuantizedLinear):
            continue
        leaf = path.rsplit(".", 1)[-1]
        is_router = module.weight.shape[0] in counts and (leaf == "gate" or "router" in path)
        if leaf != "lm_head" and not is_router:
            found.append(path)
    return sorted(found)


def _name_layers(paths: Sequence[str], base: Path) -> dict[str, str]:
    """PEFT's name of each layer: where its weight is in the base's files; the path itself without files."""
    tensors = tensor_names(base)
    if not tensors:
        return {path: path for path in paths}
    found = {}
    for path in paths:
        name = next((name for name in other_names(path) if f"{name}.weight" in tensors), None)
        if name is None:
            raise TargetModulesError(
                f"the adapter of {path} would have no name outside mlx",
                cause="the base's files store its weight in another layout than mlx-lm computes with",
                fix="Adapt other layers, for example the attention: "
                "{set:lora.target_modules=q_proj,k_proj,v_proj,o_proj}",
            )
        found[path] = name
    return found


def other_names(path: str) -> tuple[str, ...]:
    """A path, and what the layer may be called in a Hugging Face folder of a wrapped model."""
    inner = path.removeprefix("language_model.")
    bare = inner.removeprefix("model.")
    return path, inner, f"model.language_model.{bare}", f"language_model.model.{bare}", f"model.{inner}"


class KeyedDropout(nn.Module):  # type: ignore[misc]  # mlx is not typed for a strict check
    """Dropout whose mask is a function of a key that the loop sets before each forward pass.

    A layer that is recomputed in backward then drops the same values, and a resumed run those of the run before.
    """

    def __init__(self, share: float) -> None:
        super().__init__()
        self._share = share
        self._key: Any = None

    def set_key(self, key: Any) -> None:
        """The key of the next mask."""
        self._key = key

    def __call__(self, x: Any) -> Any:
        """``x`` with a share of its values set to zero and the others scaled up, in training."""
        if not self.training or self._key is None:
            return x
        keep = 1 - self._share
        return mx.where(mx.random.bernoulli(keep, x.shape, key=self._key), x / keep, 0).astype(x.dtype)


class AdapterLinear(LoRALinear):  # type: ignore[misc]
    """mlx-lm's LoRA layer, whose products run in its input's dtype.

    The adapter itself is float32, since 16 bits would lose small updates. mlx-lm multiplies it with a float32 copy of
    every input, which backward keeps: twice the memory, and half the speed on a GPU.
    """

    def __call__(self, x: Any) -> Any:
        """(…, d_out) of x (…, d_in)."""
        low = (self.dropout(x) @ self.lora_a.astype(x.dtype)) @ self.lora_b.astype(x.dtype)
        return self.linear(x) + (self.scale * low).astype(x.dtype)


@dataclass
class Adapter:
    """An adapter on a model, with its weights under PEFT's names."""

    model: Any
    targets: Targets
    dropouts: list[KeyedDropout] = field(default_factory=list)

    def weights(self) -> dict[str, Any]:
        """Float32 arrays by PEFT's names, as checkpoints hold them: A (r, d_in), B (d_out, r), magnitudes (d_out,)."""
        own = dict(tree_flatten(self.model.trainable_parameters()))
        return {self.rename(name): self.turn(weight) for name, weight in own.items()}

    @staticmethod
    def turn(weight: Any) -> Any:
        """An array of this model in the layout of files, or the other way round."""
        return mx.contiguous(weight.T) if weight.ndim == 2 else weight

    def load(self, weights: Mapping[str, Any]) -> None:
        """Set the weights to those of the same names."""
        own = dict(tree_flatten(self.model.trainable_parameters()))
        new = [(name, self.turn(weights[self.rename(name)]).astype(own[name].dtype)) for name in own]
        self.model.update(tree_unflatten(new))
        mx.eval(self.model.trainable_parameters())

    def rename(self, name: str) -> str:
        """PEFT's name of an mlx parameter."""
        path, side = name.rsplit(".", 1)
        return f"{PREFIX}{self.targets.names[path]}.{_SIDES[side]}.default.weight"

    @contextlib.contextmanager
    def disabled(self) -> Iterator[None]:
        """While the context lasts, the model is the base."""
        adapted = [(path, module) for path, module in self.model.named_modules() if path in self.targets.names]
        self.model.update_modules(tree_unflatten([(path, module.linear) for path, module in adapted]))
        try:
            yield
        finally:
            self.model.update_modules(tree_unflatten(adapted))

    def remove(self) -> None:
        """Give the base its own layers back."""
        own = [(path, module.linear) for path, module in self.model.named_modules() if path in self.targets.names]
        self.model.update_modules(tree_unflatten(own))
        self.model.freeze()


def file_name(name: str) -> str:
    """A weight's name in an adapter's file, of its name in a checkpoint: without PEFT's name of the adapter."""
    name = name.replace(".default", "", 1)
    return name.removesuffix(".weight") if "lora_magnitude_vector" in name else name


def add_lora(model: Any, targets: Targets, spec: LoraSpec, seed: int) -> Adapter:
    """Freeze ``model`` and put adapters on the targets: A uniform in ±1/sqrt(d_in) as in PEFT, B zero; float32.

    Each layer draws from the seed and its own name, so the start does not depend on the order of layers.
    """
    model.freeze()
    layer = DoRALinear if spec.use_dora else LoRALinear
    scale = spec.resolved_alpha / (math.sqrt(spec.r) if spec.use_rslora else spec.r)
    adapter = Adapter(model, targets)
    modules = dict(model.named_modules())
    new = []
    for number, path in enumerate(sorted(targets.names)):
        made = layer.from_base(modules[path], r=spec.r, dropout=0.0, scale=scale)
        if layer is LoRALinear:
            made.__class__ = AdapterLinear  # from_base names its class, so it can't be called on ours
        width = made.lora_a.shape[0]
        key = mx.random.key(seed * 2**20 + number)
        made.lora_a = mx.random.uniform(-1 / math.sqrt(width), 1 / math.sqrt(width), (width, spec.r), key=key)
        if spec.dropout:
            made.dropout = KeyedDropout(spec.dropout)
            adapter.dropouts.append(made.dropout)
        made.freeze(recurse=True)
        made.unfreeze(keys=[name for name in _SIDES if name in made], recurse=False)
        new.append((path, made))
    model.update_modules(tree_unflatten(new))
    mx.eval(model.trainable_parameters())
    return adapter


def read_weights(folder: Path) -> dict[str, Any]:
    """An adapter folder's weights by their names in a checkpoint.

    Raises:
        AdapterInvalidError: The file cannot be read.
    """
    file = read_adapter_folder(folder).weights
    try:
        weights: dict[str, Any] = mx.load(str(file))
    except (RuntimeError, OSError, ValueError) as error:
        raise AdapterInvalidError(f"{file} cannot be read", cause=first_line(error)) from error
    found = {}
    for name, weight in weights.items():
        stem = name.removesuffix(".weight")
        found[f"{stem}.default.weight"] = weight
    return found


def set_weights(adapter: Adapter, folder: Path, spec: LoraSpec) -> None:
    """Let a model's new adapter begin with the weights of a saved one of the same rank, scale and layers.

    Raises:
        AdapterInvalidError: It has other ones, both sides' values named.
    """
    saved = read_adapter_folder(folder)
    mine = (spec.r, spec.resolved_alpha, spec.use_rslora, spec.use_dora)
    is_rs, is_dora = (bool(saved.config.get(name)) for name in ("use_rslora", "use_dora"))
    theirs = (saved.r, saved.alpha, is_rs, is_dora)
    if mine != theirs:
        words = "(r, alpha, use_rslora, use_dora)"
        raise AdapterInvalidError(f"the run trains an adapter of {mine} and {folder} is one of {theirs}, as {words}")
    weights, own = read_weights(folder), adapter.weights()
    if missing := sorted(own.keys() ^ weights.keys()):
        lacking = folder if missing[0] in own else "the run's adapter"
        name = file_name(missing[0])
        raise AdapterInvalidError(f"{folder} and the run adapt other layers: {lacking} lacks {name}")
    for name, weight in own.items():
        if weights[name].shape != weight.shape:
            raise AdapterInvalidError(
                f"{folder} does not fit the base model",
                cause=f"{file_name(name)} is {weights[name].shape}, not {weight.shape}",
            )
    adapter.load(weights)


def saved_spec(folder: Path, spec: LoraSpec) -> LoraSpec:
    """The settings that a saved adapter was made with, over those of a run.

    Raises:
        AdapterInvalidError: Layers have ranks or scales of their own, or it trains more than LoRA's matrices.
    """
    from dataclasses import replace

    saved = read_adapter_folder(folder)
    for name in ("rank_pattern", "alpha_pattern", "modules_to_save", "trainable_token_indices", "target_parameters"):
        if saved.config.get(name):
            raise AdapterInvalidError(
                f"{folder} has {name}, which the MLX rail does not load", cause=str(saved.config[name])
            )
    targets = saved.config.get("target_modules")
    names = targets if isinstance(targets, str) else ",".join(targets or ())
    return replace(
        spec,
        r=saved.r,
        alpha=saved.alpha,
        dropout=0.0,
        use_rslora=bool(saved.config.get("use_rslora")),
        use_dora=bool(saved.config.get("use_dora")),
        target_modules=names or ALL_LINEAR,
    )
