"""What this machine and installation are, for records and `backprop info`."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bp_runs.errors import PathUnusableError

if TYPE_CHECKING:
    from bp_runs.rail import Probe

OURS = ("backpropagate", "bp-runs", "bp-data", "bp-merge", "bp-export", "bp-train-cuda", "bp-train-mlx")
THEIRS = (
    "torch",
    "transformers",
    "peft",
    "trl",
    "accelerate",
    "datasets",
    "tokenizers",
    "safetensors",
    "bitsandbytes",
    "unsloth",
    "mlx",
    "mlx-lm",
    "numpy",
    "gguf",
    "libggml-python",
    "xllamacpp",
)
_TRUTHS = frozenset({"1", "true", "yes", "on"})


def installed_versions() -> dict[str, str]:
    """Versions of our packages and of the libraries that decide results; those not installed are left out."""
    from importlib.metadata import PackageNotFoundError, version

    found = {"python": platform.python_version()}
    for name in (*OURS, *THEIRS):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def describe_machine() -> dict[str, Any]:
    """System, processor, cores and bytes of memory."""
    return {
        "system": platform.platform(),
        "machine": platform.machine(),
        "cores": os.cpu_count(),
        "memory": _memory_bytes(),
    }


def describe_device(probe: Probe) -> dict[str, Any]:
    """What a rail trains on, and the bytes of memory that were free when the run began."""
    return {"device": probe.device, "device_facts": probe.why, "device_memory": probe.memory}


def _memory_bytes() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None  # Windows has no sysconf


def program_home(environ: Mapping[str, str]) -> Path:
    """Where downloads and caches of ours live: ``BACKPROPAGATE_HOME``, else ``~/.backpropagate``."""
    return to_path(environ.get("BACKPROPAGATE_HOME") or "~/.backpropagate")


def is_offline(environ: Mapping[str, str]) -> bool:
    """Whether the user forbade the network, by our variable or the Hub's."""
    return is_network_forbidden(environ) or environ.get("HF_HUB_OFFLINE", "").lower() in _TRUTHS


def is_network_forbidden(environ: Mapping[str, str]) -> bool:
    """Whether nothing at all may leave this machine: ``--offline`` or ``BACKPROPAGATE_OFFLINE``."""
    return environ.get("BACKPROPAGATE_OFFLINE", "").lower() in _TRUTHS


def path_exists(path: Path | str) -> bool:
    """Whether something is at the path; False for what no system takes as one, such as a name of 3,000 characters."""
    return os.path.exists(path)  # noqa: PTH110  # Path.exists raises for those


def to_path(text: str | Path) -> Path:
    """A path as a user writes it, ``~`` included.

    Raises:
        PathUnusableError: The home that ``~`` names is unknown.
    """
    try:
        return Path(text).expanduser()
    except RuntimeError as error:
        raise PathUnusableError(f"{text} names no folder", cause=str(error)) from error
