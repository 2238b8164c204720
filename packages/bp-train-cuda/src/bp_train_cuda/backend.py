"""What this machine can train on; each value travels with its reason."""

from __future__ import annotations

import gc
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, Literal

import psutil
import torch

from bp_runs.errors import FullModelTooLargeError, ModeError
from bp_train_cuda.errors import Bf16Error, BitsandbytesError
from bp_train_cuda.memory.estimate import WEIGHTS_SHARE

CPU_PARAMETER_LIMIT = 1_000_000_000
FULL_PARAMETER_LIMIT = 4_500_000_000
"""What is sold as 4B has up to so many; weights and gradients take 4 bytes each, so 16 GiB hold little more."""


@dataclass(frozen=True, slots=True)
class Device:
    """Where tensors go."""

    kind: Literal["cuda", "cpu"]
    why: str
    memory: int
    """Bytes free for training now."""
    card: str = "cpu"
    """The GPU's name and its memory, by which it is remembered."""
    driver_too_old: bool = False
    """Whether there is a GPU that only an older CUDA can use."""

    @property
    def label(self) -> str:
        """For people: ``cpu (no CUDA device)``."""
        return f"{self.kind} ({self.why})"


def choose_device() -> Device:
    """The first CUDA device, else the CPU."""
    if torch.cuda.is_available():
        major, minor = torch.cuda.get_device_capability(0)
        free, total = torch.cuda.mem_get_info(0)
        name = torch.cuda.get_device_name(0)
        return Device("cuda", f"{name}, SM {major}.{minor}", free, f"{name} {total / 2**30:.1f} GiB")
    too_old = _has_old_driver()
    why = "no CUDA device" if torch.backends.cuda.is_built() else "this torch is built without CUDA"
    why = f"the NVIDIA driver is too old for CUDA {torch.version.cuda}" if too_old else why
    return Device("cpu", why, psutil.virtual_memory().available, driver_too_old=too_old)


def _has_old_driver() -> bool:
    """Whether CUDA rejects to start because of the driver's age; torch tells by the text of its error alone."""
    if not torch.backends.cuda.is_built():
        return False
    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:
        return "too old" in str(error)
    return False


def choose_dtype(wanted: Literal["auto", "float32", "bfloat16"], device: Device) -> torch.dtype:
    """The base weights' dtype: as set, else bfloat16 where the GPU computes in it, else float32.

    Raises:
        Bf16Error: bfloat16 was requested and the GPU only emulates it.
    """
    can = device.kind == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    if wanted == "bfloat16" and device.kind == "cuda" and not can:
        raise Bf16Error(f"{device.label} does not compute in bfloat16")
    if wanted != "auto":
        dtype: torch.dtype = getattr(torch, wanted)
        return dtype
    return torch.bfloat16 if can else torch.float32


@dataclass(frozen=True, slots=True)
class Mode:
    """How the base is held while its adapter is trained, or that it is trained itself."""

    name: Literal["lora", "qlora", "full"]
    why: str

    @property
    def label(self) -> str:
        """For people: ``qlora (14.2 GiB of 16-bit weights, 15.1 GiB free)``."""
        return f"{self.name} ({self.why})"


def choose_mode(wanted: Literal["auto", "lora", "qlora", "full"], parameters: int, device: Device) -> Mode:
    """The mode as set, else qlora where 16-bit weights would take over `WEIGHTS_SHARE` of the free GPU memory.

    Raises:
        ModeError: 4-bit weights on a CPU.
        BitsandbytesError: 4-bit weights without bitsandbytes.
        FullModelTooLargeError: All weights of a model of over `FULL_PARAMETER_LIMIT` parameters.
    """
    if wanted == "full" and parameters > FULL_PARAMETER_LIMIT:
        raise FullModelTooLargeError(
            f"the model has {parameters / 1e9:.1f} billion parameters; all weights of up to 4 billion can be trained",
            details={"parameters": parameters, "limit": FULL_PARAMETER_LIMIT},
        )
    need, free = 2 * parameters / 2**30, device.memory / 2**30
    too_large = device.kind == "cuda" and need > WEIGHTS_SHARE * free
    mode = Mode(
        ("qlora" if too_large else "lora") if wanted == "auto" else wanted,
        f"{need:.1f} GiB of 16-bit weights, {free:.1f} GiB free" if wanted == "auto" else "as set",
    )
    if mode.name == "qlora" and device.kind == "cpu":
        raise ModeError("4-bit weights cannot be trained on a CPU")
    if mode.name == "qlora" and find_spec("bitsandbytes") is None:
        raise BitsandbytesError("bitsandbytes is not installed", cause=mode.label)
    return mode


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


class TorchMemory:
    """Torch's error for a full GPU, and how to free what no tensor uses."""

    out_of_memory_error: type[Exception] = torch.OutOfMemoryError

    def is_out_of_memory(self, error: Exception) -> bool:  # noqa: ARG002
        """Always: torch has a type of its own for it."""
        return True

    def release_memory(self) -> None:
        """Collect cycles and give cached blocks back to the driver."""
        gc.collect()
        torch.cuda.empty_cache()
