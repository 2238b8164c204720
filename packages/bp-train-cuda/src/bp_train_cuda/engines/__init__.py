"""Engines: what runs the training steps once the base model and the examples are ready.

    native  our own loop; the default
    trl     plain TRL trainers: the reference that tests compare native with
    unsloth Unsloth's model and kernels under our loop

Reading starts in ``native.py``. Every engine takes the same examples in the same order and leaves the same adapter
folder, so a run can be repeated with another engine.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from bp_train_cuda.probe import Device, Mode


@dataclass(frozen=True, slots=True)
class Loaded:
    """A base model in memory."""

    device: Device
    mode: Mode
    parameters: int
    """Of the base, counted before it was quantized."""
    base: Any
    """The transformers model, without an adapter, on the device."""
