"""Checks that act: does this machine compute what training on mlx needs, and compute it right?"""

from __future__ import annotations

import math
import platform
from collections.abc import Sequence
from importlib.metadata import version

from bp_runs.errors import CodedError
from bp_runs.rail import Check, Finding
from bp_train_mlx import backend

OLDEST_MACOS = (14, 0)
"""mlx's wheels for macOS are built for it."""
_UPDATE = "Update: {install:-U mlx mlx-lm}"
_MACOS = "Update macOS to 14 or newer: System Settings, General, Software Update."
_PYTHON = "Install a Python for Apple silicon, not Intel: `brew install python`, or uv's own: `uv python install`."
_STEPS = 3


def checks() -> Sequence[Check]:
    """Versions of mlx, macOS, Metal, and a LoRA step."""
    return (
        Check("mlx", check_versions, _UPDATE),
        Check("macos", check_macos, _MACOS),
        Check("metal", check_metal, _UPDATE),
        Check("mlx lora step", check_lora_step, _UPDATE),
    )


def check_versions() -> Finding:
    """Whether mlx and mlx-lm are there, and new enough."""
    try:
        backend.require_mlx()
    except CodedError as error:
        return Finding(state="failed", message=error.message, fix=error.hint)
    return Finding(state="ok", message=", ".join(f"{name} {version(name)}" for name in backend.NEEDED))


def check_macos() -> Finding:
    """Whether macOS is one that mlx runs on, and Python one for this processor."""
    if platform.system() != "Darwin":
        return Finding(state="skipped", message=f"this is {platform.system()}, not macOS")
    return judge_mac(platform.mac_ver()[0], platform.machine())


def judge_mac(release: str, machine: str) -> Finding:
    """What a macOS release and the processor that Python was built for mean for mlx.

    Args:
        release: As in ``14.5``.
        machine: ``arm64``; ``x86_64`` on an Intel Mac, or under Rosetta.
    """
    if machine != "arm64":
        return Finding(
            state="failed", message=f"this Python is built for {machine}; mlx needs Apple silicon", fix=_PYTHON
        )
    numbers = tuple(int(part) for part in release.split(".")[:2] if part.isdigit())
    if numbers < OLDEST_MACOS:
        return Finding(state="failed", message=f"macOS {release} is too old for mlx", fix=_MACOS)
    return Finding(state="ok", message=f"macOS {release} on Apple silicon")


def check_metal() -> Finding:
    """Whether mlx computes on a GPU, and how much memory that may use."""
    device = backend.choose_device()
    if not device.is_gpu:
        message = f"{device.why}: models of up to 1 billion parameters train on the CPU"
        return Finding(state="warning", message=message)
    return Finding(state="ok", message=f"{device.label}: {device.memory / 2**30:.1f} GiB for training")


def check_lora_step() -> Finding:
    """Whether a few steps of AdamW on a small adapter lower a loss, with gradients that are finite."""
    import mlx.core as mx
    from mlx import nn
    from mlx.utils import tree_flatten

    from bp_train_mlx.model.lora import AdapterLinear
    from bp_train_mlx.optim import AdamW

    device = backend.choose_device()
    with backend.process_settings(device):
        layer = AdapterLinear(16, 16, r=4, scale=2.0)
        layer.freeze()
        layer.unfreeze(keys=["lora_a", "lora_b"], recurse=False)
        inputs = mx.random.normal((8, 16), key=mx.random.key(0))
        goal = mx.random.normal((8, 16), key=mx.random.key(1))
        optimizer, losses = AdamW(layer, 0.0, 0), []
        for _ in range(_STEPS):
            loss, gradients = nn.value_and_grad(layer, lambda: mx.square(layer(inputs) - goal).mean())()
            losses.append(float(loss.item()))
            optimizer.update(dict(tree_flatten(gradients)), 0.05)
    shown = " → ".join(f"{loss:.3f}" for loss in losses)
    if not all(map(math.isfinite, losses)) or not losses[-1] < losses[0]:
        return Finding(state="failed", message=f"a LoRA step does not learn: loss {shown}", fix=_UPDATE)
    return Finding(state="ok", message=f"a LoRA step learns: loss {shown}")
