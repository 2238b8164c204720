"""What this machine and installation are, for records and `backprop info`."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

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


def _memory_bytes() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None  # Windows has no sysconf


def program_home(environ: Mapping[str, str]) -> Path:
    """Where downloads and caches of ours live: ``BACKPROPAGATE_HOME``, else ``~/.backpropagate``."""
    return Path(environ.get("BACKPROPAGATE_HOME") or Path.home() / ".backpropagate").expanduser()


def is_offline(environ: Mapping[str, str]) -> bool:
    """Whether the user forbade the network, by our variable or the Hub's."""
    truths = {"1", "true", "yes", "on"}
    return any(environ.get(n, "").lower() in truths for n in ("BACKPROPAGATE_OFFLINE", "HF_HUB_OFFLINE"))


def silence_telemetry(environ: dict[str, str] | os._Environ[str]) -> None:
    """Switch off the usage reports of the Hub's client and of TRL; must precede their import."""
    environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
    environ["TRL_DISABLE_TELEMETRY"] = "1"
    environ.setdefault("TOKENIZERS_PARALLELISM", "false")
