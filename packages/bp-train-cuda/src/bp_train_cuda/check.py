"""What is rejected before any weight is loaded."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from bp_data.loop import rows
from bp_data.preparation import AnyPrepared
from bp_runs.adapter import require_same_base
from bp_runs.errors import (
    AdapterInvalidError,
    InvalidSettingError,
    TargetModulesError,
    first_line,
)
from bp_runs.spec import LoraSpec, Settings, TrainSpec
from bp_train_cuda import backend
from bp_train_cuda.engines import unsloth
from bp_train_cuda.engines.trl_methods import require_trl
from bp_train_cuda.errors import BitsandbytesError, Fp8Error
from bp_train_cuda.model import load
from bp_train_cuda.model.experts import ALL_LINEAR, PRESETS, Targets, choose_targets
from bp_train_cuda.model.kernels import require_kernels
from bp_train_cuda.model.packing import check_packing
from bp_train_cuda.third_party import require_names


@dataclass(frozen=True, slots=True)
class Checked:
    """A model that can be trained as set."""

    device: backend.Device
    mode: backend.Mode
    parameters: int
    warnings: tuple[str, ...] = ()
    """What the user should know before the weights are fetched."""


def check_model(settings: Settings, base: Path, adapter: Path | None = None) -> Checked:
    """Look at the config in ``base`` alone, and at the shapes in ``adapter``.

    Args:
        adapter: A saved adapter that is to resume the base.

    Raises:
        VersionUntestedError: As `third_party.require_names`.
        AdapterInvalidError: As `require_adapter`.
        RemoteCodeError, ModelLoadError, GpuNotAvailableError: As `load.read_config`, `sketch_model`, `require_capable`.
        ModeError, BitsandbytesError, FullModelTooLargeError, Bf16Error: As `backend.choose_mode` and `choose_dtype`.
        UnslothError, InvalidSettingError: As `unsloth.require_unsloth`.
        VersionUntestedError, InvalidSettingError: As `engines.trl_methods.require_trl`.
        PackingError: Packing is set and a small model of this kind mixes packed examples on the device.
        Fp8Error, KernelsError: 8-bit floats, or fused kernels, are requested and cannot be had.
        TargetModulesError, InvalidSettingError: The adapter cannot be made on this model.
    """
    require_names()
    device, trust = backend.choose_device(), settings.model.trust_remote_code
    config = load.read_config(base, trust_remote_code=trust)
    sketch = load.sketch_model(config, trust_remote_code=trust)
    parameters = load.count_parameters(sketch)
    load.require_capable(parameters, device)
    mode = backend.choose_mode(settings.training.mode, parameters, device)
    backend.choose_dtype(settings.model.dtype, device)
    require_optimizer(settings)
    require_kernels(str(config.model_type), settings.training.kernels, device)
    if settings.training.fp8:
        require_fp8(device, mode)
    if settings.training.engine == "unsloth":
        unsloth.require_unsloth(settings, device)
    if settings.training.engine == "trl":
        require_trl(settings)
    if settings.training.packing:
        check_packing(config, device.kind)
    warnings: tuple[str, ...] = ()
    if mode.name != "full":
        require_targets(sketch, settings.lora)
        targets = choose_targets(sketch, settings.lora.target_modules)
        require_parameters(settings.lora, targets)
        warnings = targets.warnings
        require_start(settings.lora, mode)
    if adapter is not None:
        require_adapter(adapter, base, sketch)
    return Checked(device, mode, parameters, warnings)


def require_adapter(adapter: Path, base: Path, sketch: Any) -> None:
    """Reject an adapter of another base: one whose layers are not in ``sketch``, or that was made on other weights.

    Raises:
        AdapterInvalidError: Likewise for a folder that is no adapter.
    """
    folder = require_same_base(adapter, base)
    layers = dict(sketch.named_modules())
    parameters = {name for name, _ in sketch.named_parameters()}
    targets = [str(name) for name in folder.config.get("target_parameters") or ()]
    taken = {name.rpartition(".")[0] for name in parameters if any(f".{name}".endswith(f".{t}") for t in targets)}
    for name, side, width in _read_widths(folder.weights):
        if name.replace(".base_layer", "") in taken:
            continue  # PEFT compares the shapes when it loads them
        found = getattr(layers.get(name), side, None)
        if found != width:
            what = f"no layer {name}" if name not in layers else f"{found} {side} in {name}, not {width}"
            raise AdapterInvalidError(f"{adapter} does not fit the base model", cause=f"{base} has {what}")


def _read_widths(weights: Path) -> list[tuple[str, str, int]]:
    """Layers that an adapter continues, and how wide they must be: A is r × in_features, B is out_features × r."""
    sides = {".lora_A.weight": ("in_features", 1), ".lora_B.weight": ("out_features", 0)}
    try:
        with safe_open(weights, "pt") as file:
            shapes = {key: file.get_slice(key).get_shape() for key in file.keys()}  # noqa: SIM118  # it is no mapping
    except (OSError, SafetensorError) as error:
        raise AdapterInvalidError(f"{weights} cannot be read", cause=first_line(error)) from error
    return [
        (key.removeprefix("base_model.model.").removesuffix(end), side, int(shape[place]))
        for key, shape in shapes.items()
        for end, (side, place) in sides.items()
        if key.endswith(end)
    ]


def require_optimizer(settings: Settings) -> None:
    """Reject an 8-bit optimizer without the package that has it."""
    if "8bit" in settings.training.optim and find_spec("bitsandbytes") is None:
        raise BitsandbytesError(f"the optimizer {settings.training.optim} is bitsandbytes', which is not installed")


def require_fp8(device: backend.Device, mode: backend.Mode) -> None:
    """Reject 8-bit floats where nothing computes in them."""
    if device.kind != "cuda" or torch.cuda.get_device_capability(0) < (9, 0):
        raise Fp8Error(f"{device.label} does not train in 8-bit floats")
    if mode.name == "qlora":
        raise Fp8Error(
            "a 4-bit base can't be multiplied in 8-bit floats",
            fix="Use a 16-bit base: {set:training.fp8=true training.mode=lora}; or 4 bits alone: "
            "{set:training.fp8=false}",
        )
    if find_spec("torchao") is None:
        raise Fp8Error(
            "torchao is not installed",
            fix="Install it: {install:bp-train-cuda[fp8]}; or train without it: {set:training.fp8=false}",
        )


def require_targets(model: Any, spec: LoraSpec) -> None:
    """Reject target modules that no layer is named after, each by itself, and layers that cannot carry an adapter.

    The output layer's adapter would be passed over by the loss, which multiplies with its weight directly; and where it
    is tied to the embedding, a merge would change both.
    """
    names = {name.rsplit(".", 1)[-1]: type(m).__name__ for name, m in model.named_modules() if not list(m.children())}
    linear = sorted(name for name, kind in names.items() if kind in ("Linear", "Conv1D"))
    ends = {_find_name(model, end) for end in (model.get_input_embeddings(), model.get_output_embeddings())}
    carries = [name for name in linear if name not in ends]
    every = [name.strip() for name in spec.target_modules.split(",") if name.strip()]
    wanted = [name for name in every if name not in PRESETS]
    for name in wanted or ([] if every else [""]):
        if name.rsplit(".", 1)[-1] not in carries and wanted != [ALL_LINEAR]:
            known = f"its layers that can carry an adapter: {', '.join(carries)}"
            raise TargetModulesError(f"no layer that can carry an adapter is named {name!r}", cause=known)


def require_parameters(spec: LoraSpec, targets: Targets) -> None:
    """Reject what PEFT cannot do on parameters: experts and routers that are no linear layers."""
    if not targets.parameters:
        return
    fixes = {
        "lora.dropout": (spec.dropout, "{set:lora.dropout=0}"),
        "lora.use_dora": (spec.use_dora, "{set:lora.use_dora=false}"),
        "lora.init_lora_weights": (spec.init_lora_weights != "default", "{set:lora.init_lora_weights=default}"),
    }
    for key, (is_set, fix) in fixes.items():
        if is_set:
            raise InvalidSettingError(
                f"{key} can't be combined with LoRA on {', '.join(targets.parameters)}",
                fix=f"Leave it out: {fix}",
                setting=key,
            )


def require_start(spec: LoraSpec, mode: backend.Mode) -> None:
    """Reject a start of the adapter that its mode or form does not have."""
    start = spec.init_lora_weights
    if start == "loftq" and mode.name != "qlora":
        raise InvalidSettingError(
            "loftq makes up for what 4 bits lose",
            fix="Use a 4-bit base: {set:training.mode=qlora}; or start as usual: {set:lora.init_lora_weights=default}",
            setting="lora.init_lora_weights",
        )
    if start == "pissa" and mode.name == "qlora":
        raise InvalidSettingError(
            "pissa changes the base's weights, which 4 bits cannot hold",
            fix="Use a 16-bit base: {set:training.mode=lora}; or loftq: {set:lora.init_lora_weights=loftq}",
            setting="lora.init_lora_weights",
        )
    if start != "default" and spec.use_dora:
        raise InvalidSettingError(
            f"{start} and DoRA do not work together",
            fix="Leave one out: {set:lora.use_dora=false}, or {set:lora.init_lora_weights=default}",
            setting="lora.init_lora_weights",
        )


def require_rows_fit(spec: TrainSpec, prepared: AnyPrepared) -> None:
    """As `bp_data.loop.rows.require_rows_fit`, with the numbers of the base's config."""
    config = load.read_config(spec.base, trust_remote_code=spec.model.trust_remote_code).get_text_config()
    positions = getattr(config, "max_position_embeddings", None)
    rows.require_rows_fit(spec, prepared, positions=positions, vocabulary=config.vocab_size)


def _find_name(model: Any, module: Any) -> str:
    """The last part of a module's name; empty where the model has no such module."""
    return next((name.rsplit(".", 1)[-1] for name, m in model.named_modules() if m is module), "")
