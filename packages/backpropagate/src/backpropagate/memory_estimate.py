"""GPU memory that a training run needs, and the largest LoRA preset that fits."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import orjson

from backpropagate import catalogue, rails, system
from backpropagate.errors import RailUnusableError
from backpropagate.presets import find_preset
from backpropagate.settings import Resolved, apply_lora_preset
from bp_runs.errors import CodedError
from bp_runs.rail import Estimates, MemoryEstimate, Rail
from bp_runs.spec import LORA_PRESETS, Settings


def estimate_memory(settings: Settings, *, memory: int | None) -> MemoryEstimate:
    """The memory of a training run with these settings, from the model's shapes alone.

    Args:
        settings: The settings.
        memory: Bytes of the GPU, by which the mode is chosen where it is ``auto``; None: unknown.

    Raises:
        RailUnusableError: No installed rail can say.
        CodedError: As `backpropagate.catalogue.find_model`.
    """
    machine = system.program_home(os.environ)
    return require_estimator().estimate(settings, read_config(settings), memory=memory, machine=machine)


def require_estimator() -> Estimates:
    """The rail that estimates.

    Raises:
        RailUnusableError: There is none.
    """
    found = rails.find_estimator()
    if found is None:
        raise RailUnusableError("no installed rail can estimate memory", fix="Install one: {install:bp-train-cuda}")
    return found


def read_config(settings: Settings) -> Mapping[str, Any]:
    """The model's config.json; of a preset what is known of it, without a download.

    Raises:
        CodedError: As `backpropagate.catalogue.find_model`.
    """
    preset = find_preset(settings.model.name)
    if preset is not None:
        return preset.config
    folder = catalogue.find_tokenizer(settings)
    found: Mapping[str, Any] = orjson.loads((folder / "config.json").read_bytes())
    return found


def settle_lora(resolved: Resolved, rail: Rail, base: Path, machine: Path | None) -> tuple[Resolved, str]:
    """Replace the LoRA preset ``auto`` by the largest that fits; returns the settings and why, empty for other presets.

    Args:
        base: Folder of the base model, of which the config is read.
        machine: Where facts about this machine are kept.
    """
    if resolved.settings.lora.preset != "auto":
        return resolved, ""
    probe = rail.probe()
    if not isinstance(rail, Estimates) or probe.device == "cpu" or probe.memory is None:
        return apply_lora_preset(resolved, "fast"), "the LoRA preset fast: there is no card to measure"
    config, free = orjson.loads((base / "config.json").read_bytes()), probe.memory
    needs: list[str] = []
    for name in LORA_PRESETS:
        chosen = apply_lora_preset(resolved, name)
        try:
            need = rail.estimate(chosen.settings, config, memory=free, machine=machine).needed
        except CodedError as error:
            return apply_lora_preset(resolved, "fast"), f"the LoRA preset fast: {error.message}"
        needs.append(f"{name} {need / 2**30:.1f}")
        if need <= free or name == list(LORA_PRESETS)[-1]:
            break
    return chosen, f"the LoRA preset {name}: {', '.join(needs)} of {free / 2**30:.1f} GiB free"
