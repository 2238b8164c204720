"""What a training would take of a card's memory, asked of whichever rail can say."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import orjson

from backpropagate import catalogue, rails, system
from backpropagate.errors import RailUnusableError
from backpropagate.presets import find_preset
from bp_runs.rail import Estimates, MemoryEstimate
from bp_runs.spec import Settings


def estimate_memory(wanted: Settings, *, memory: int | None) -> MemoryEstimate:
    """The memory of a training with these settings, from the model's shapes alone.

    Args:
        wanted: The settings.
        memory: Bytes of the card, by which the mode is chosen where it is ``auto``; None: unknown.

    Raises:
        RailUnusableError: No installed rail can say.
        CodedError: As `backpropagate.catalogue.find_model`.
    """
    machine = system.program_home(os.environ)
    return require_estimator().estimate(wanted, read_config(wanted), memory=memory, machine=machine)


def require_estimator() -> Estimates:
    """The rail that estimates.

    Raises:
        RailUnusableError: There is none.
    """
    found = rails.find_estimator()
    if found is None:
        raise RailUnusableError("no installed rail can estimate memory", fix="Install one: {install:bp-train-cuda}")
    return found


def read_config(wanted: Settings) -> Mapping[str, Any]:
    """The model's config.json; of a preset what is known of it, without a download.

    Raises:
        CodedError: As `backpropagate.catalogue.find_model`.
    """
    preset = find_preset(wanted.model.name)
    if preset is not None:
        return preset.config
    folder = catalogue.find_tokenizer(wanted)
    found: Mapping[str, Any] = orjson.loads((folder / "config.json").read_bytes())
    return found
