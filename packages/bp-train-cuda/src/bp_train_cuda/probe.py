"""What this machine can train on; each value travels with its reason."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import psutil
import torch

CPU_PARAMETER_LIMIT = 1_000_000_000


@dataclass(frozen=True, slots=True)
class Device:
    """Where tensors go."""

    kind: Literal["cuda", "cpu"]
    why: str
    memory: int
    """Bytes free for training now."""

    @property
    def label(self) -> str:
        """For people: ``cpu (no CUDA device)``."""
        return f"{self.kind} ({self.why})"


def choose_device() -> Device:
    """The first CUDA device, else the CPU."""
    if torch.cuda.is_available():
        major, minor = torch.cuda.get_device_capability(0)
        free, _ = torch.cuda.mem_get_info(0)
        return Device("cuda", f"{torch.cuda.get_device_name(0)}, SM {major}.{minor}", free)
    why = "no CUDA device" if torch.backends.cuda.is_built() else "this torch is built without CUDA"
    return Device("cpu", why, psutil.virtual_memory().available)


def choose_dtype(wanted: Literal["auto", "float32", "bfloat16"], device: Device) -> torch.dtype:
    """The base weights' dtype: as asked, else bfloat16 where the GPU computes in it, else float32."""
    if wanted != "auto":
        dtype: torch.dtype = getattr(torch, wanted)
        return dtype
    return torch.bfloat16 if device.kind == "cuda" and torch.cuda.is_bf16_supported() else torch.float32


class PeakMemory:
    """The highest memory use seen: allocated on the GPU, or the process's resident set on a CPU."""

    def __init__(self, device: Device) -> None:
        self._cuda = device.kind == "cuda"
        self._process: Any = psutil.Process()
        self._peak = 0
        if self._cuda:
            torch.cuda.reset_peak_memory_stats()

    def read(self) -> int:
        """Bytes; to be asked once a step, since the resident set has no portable high-water mark."""
        now = torch.cuda.max_memory_allocated() if self._cuda else self._process.memory_info().rss
        self._peak = max(self._peak, int(now))
        return self._peak
