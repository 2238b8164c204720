"""Unsloth as one more engine: it loads the model and makes the adapter, with its own kernels; all else stays as it is.

It changes transformers and TRL when it is imported, so it is imported only where it was requested.
"""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from operator import attrgetter
from typing import Any

from bp_runs.errors import InvalidSettingError, first_line
from bp_runs.spec import LoraSpec, Settings, TrainSpec
from bp_runs.wording import setting_ref
from bp_train_cuda.backend import Device, Mode, choose_dtype
from bp_train_cuda.errors import UnslothError


def require_unsloth(settings: Settings, device: Device) -> None:
    """Reject what Unsloth cannot do, without importing it.

    Raises:
        UnslothError: It is not installed, or there is no CUDA device.
        InvalidSettingError: The method, mode or adapter is not among those that it makes.
    """
    if find_spec("unsloth") is None:
        raise UnslothError(
            "unsloth is not installed",
            fix="Install it: {install:unsloth}; or train without it: {set:training.engine=native}",
        )
    if device.kind != "cuda":
        raise UnslothError(f"unsloth needs a CUDA device: {device.why}")
    training, lora = settings.training, settings.lora
    wrong = {
        "training.method": training.method != "sft",
        "training.mode": training.mode == "full",
        "training.fp8": training.fp8,
        "lora.use_dora": lora.use_dora,
        "lora.init_lora_weights": lora.init_lora_weights != "default",
    }
    if any(wrong.values()):
        key = next(key for key, is_wrong in wrong.items() if is_wrong)
        raise InvalidSettingError(
            f"the engine unsloth does not support {setting_ref(key, attrgetter(key)(settings))}",
            fix="Use our own loop: {set:training.engine=native}",
            setting=key,
        )


def load_model(spec: TrainSpec, device: Device, mode: Mode) -> Any:
    """The base as Unsloth loads it.

    Raises:
        UnslothError: It does not import, or not load the model.
    """
    try:
        fast = import_module("unsloth").FastLanguageModel
        model, _ = fast.from_pretrained(
            model_name=str(spec.base),
            max_seq_length=spec.model.max_seq_length,
            dtype=choose_dtype(spec.model.dtype, device),
            load_in_4bit=mode.name == "qlora",
            trust_remote_code=spec.model.trust_remote_code,
            local_files_only=True,
        )
    except (ImportError, NotImplementedError, RuntimeError, ValueError, TypeError, OSError) as error:
        raise UnslothError("unsloth cannot load the model", cause=first_line(error)) from error
    return model


def add_lora(model: Any, spec: LoraSpec, *, seed: int) -> Any:
    """A model of `load_model` with a new adapter; PEFT's, with Unsloth's kernels."""
    fast = import_module("unsloth").FastLanguageModel
    targets = [name.strip() for name in spec.target_modules.split(",") if name.strip()]
    return fast.get_peft_model(
        model,
        r=spec.r,
        lora_alpha=spec.resolved_alpha,
        lora_dropout=spec.dropout,
        use_rslora=spec.use_rslora,
        target_modules="all-linear" if targets == ["all-linear"] else targets,
        use_gradient_checkpointing="unsloth",
        random_state=seed,
    )
