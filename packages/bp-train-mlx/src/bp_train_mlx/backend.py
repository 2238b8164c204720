"""What this machine can train on with mlx; each value travels with its reason."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Literal

import psutil

from bp_runs.errors import FullModelTooLargeError, ModeError, first_line
from bp_train_mlx.errors import MlxUnavailableError

NEEDED = {"mlx": (0, 32, 4), "mlx-lm": (0, 32)}
"""Oldest versions. Before mlx 0.32.4, the backward pass of attention allocated a T × T matrix."""
FULL_PARAMETER_LIMIT = 4_500_000_000
"""What is sold as 4B has up to so many parameters; the same limit as on CUDA."""
WEIGHTS_SHARE = 0.6
"""Of the memory: 16-bit weights that take more leave too little for activations."""
CPU_PARAMETER_LIMIT = 1_000_000_000
_OUT_OF_MEMORY = ("Insufficient Memory", "malloc", "allocate", "out of memory", "OutOfMemory")
"""Parts of mlx's messages: Metal's command buffer, its allocators, and CUDA's. mlx has no error class for them."""


@dataclass(frozen=True, slots=True)
class Device:
    """Where arrays are computed."""

    kind: Literal["metal", "cuda", "cpu"]
    why: str
    memory: int
    """Bytes that training can use: on a Mac the GPU's recommended share of unified memory."""

    @property
    def label(self) -> str:
        """For people: ``metal (Apple M3 Max)``."""
        return f"{self.kind} ({self.why})"

    @property
    def is_gpu(self) -> bool:
        """Whether it is faster than a CPU and has a memory limit of its own."""
        return self.kind != "cpu"


def require_mlx() -> None:
    """Reject a machine without mlx and mlx-lm of versions that this rail is tested with.

    Raises:
        MlxUnavailableError: Which one is missing or too old.
    """
    for name, oldest in NEEDED.items():
        needed = ".".join(map(str, oldest))
        try:
            found = version(name)
        except PackageNotFoundError:
            raise MlxUnavailableError(f"{name} is not installed; this version needs {name} {needed} or newer") from None
        if _numbers(found) < oldest:
            raise MlxUnavailableError(f"{name} {found} is installed; this version needs {needed} or newer")
    try:
        import mlx.core  # noqa: F401
    except ImportError as error:
        raise MlxUnavailableError("mlx is installed and does not import", cause=first_line(error)) from error


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(".")[:3] if part.isdigit())


def choose_device() -> Device:
    """Metal on Apple silicon, else mlx's CUDA build, else the CPU.

    Raises:
        MlxUnavailableError: mlx is missing.
    """
    require_mlx()
    import mlx.core as mx

    facts = dict(mx.device_info())
    name = str(facts.get("device_name", "CPU"))
    if mx.metal.is_available():
        return Device("metal", name, int(facts["max_recommended_working_set_size"]))
    if mx.cuda.is_available():
        memory = int(facts.get("free_memory") or facts.get("total_memory") or facts.get("memory_size") or 0)
        return Device("cuda", name, memory or psutil.virtual_memory().total)
    return Device("cpu", f"{name}; mlx finds no GPU", psutil.virtual_memory().available)


def choose_dtype(wanted: Literal["auto", "float32", "bfloat16"], device: Device) -> Any:
    """The base weights' dtype: as set, else bfloat16 on a GPU and float32 on a CPU, which emulates bfloat16."""
    import mlx.core as mx

    if wanted != "auto":
        return getattr(mx, wanted)
    return mx.bfloat16 if device.is_gpu else mx.float32


@dataclass(frozen=True, slots=True)
class Mode:
    """How the base is held while its adapter is trained, or that it is trained itself."""

    name: Literal["lora", "qlora", "full"]
    why: str

    @property
    def label(self) -> str:
        """For people: ``qlora (the base is stored in 4 bits)``."""
        return f"{self.name} ({self.why})"


def choose_mode(
    wanted: Literal["auto", "lora", "qlora", "full"], parameters: int, device: Device, stored_bits: int | None
) -> Mode:
    """The mode as set; a base that is stored quantized is qlora, and so is one whose 16-bit weights are too large.

    Args:
        stored_bits: Bits of a quantized base's weights; None for one in 16 or 32 bits.

    Raises:
        ModeError: Full fine-tuning of a quantized base.
        FullModelTooLargeError: Full fine-tuning of over `FULL_PARAMETER_LIMIT` parameters.
    """
    if wanted == "full":
        if stored_bits is not None:
            raise ModeError(
                f"the base is stored in {stored_bits} bits, and full fine-tuning needs 16-bit weights",
                fix="Train an adapter: {set:training.mode=qlora}; or use the 16-bit model that it was made from.",
            )
        if parameters > FULL_PARAMETER_LIMIT:
            raise FullModelTooLargeError(
                f"the model has {parameters / 1e9:.1f} billion parameters; full fine-tuning goes up to 4 billion",
                details={"parameters": parameters, "limit": FULL_PARAMETER_LIMIT},
            )
        return Mode("full", "as set")
    if stored_bits is not None:
        return Mode("qlora", f"the base is stored in {stored_bits} bits")
    need, free = 2 * parameters / 2**30, device.memory / 2**30
    if wanted == "auto":
        too_large = device.is_gpu and need > WEIGHTS_SHARE * free
        return Mode("qlora" if too_large else "lora", f"{need:.1f} GiB of 16-bit weights, {free:.1f} GiB of memory")
    return Mode(wanted, "as set")


def memory_limit(device: Device) -> int | None:
    """Bytes that a chunk may use at most; None on a CPU, where the system decides."""
    return device.memory if device.is_gpu else None


class MemoryLimitError(RuntimeError):
    """A chunk used more memory than the device should; raised by us, before macOS starts to swap."""


class MlxMemory:
    """How mlx runs out of memory, for `bp_data.loop.memory.MemoryGuard`.

    Unified memory has no hard end: past the GPU's recommended share macOS swaps, and a step takes minutes. So the peak
    of every chunk is compared with `limit`.
    """

    out_of_memory_error: type[Exception] = RuntimeError
    limit: int | None = None
    """Bytes that a chunk may use at most; None: not limited."""

    def is_out_of_memory(self, error: Exception) -> bool:
        """By the message, since mlx raises RuntimeError for everything."""
        return isinstance(error, MemoryLimitError) or any(part in str(error) for part in _OUT_OF_MEMORY)

    def release_memory(self) -> None:
        """Collect cycles and give cached buffers back to the system."""
        import mlx.core as mx

        gc.collect()
        mx.clear_cache()

    def require_within_limit(self) -> None:
        """Called after each chunk.

        Raises:
            MemoryLimitError: The peak since the last call is over `limit`.
        """
        import mlx.core as mx

        if self.limit is None:
            return
        peak = mx.get_peak_memory()
        mx.reset_peak_memory()
        if peak > self.limit:
            raise MemoryLimitError(
                f"out of memory: {peak / 2**30:.1f} GiB in use, over the limit of {self.limit / 2**30:.1f} GiB"
            )


class PeakMemory:
    """The most memory that mlx has held since the run began."""

    def __init__(self) -> None:
        import mlx.core as mx

        mx.reset_peak_memory()
        self._peak = 0

    def read(self) -> int:
        """Bytes; `MlxMemory.require_within_limit` resets mlx's own counter, so the highest value is kept here."""
        import mlx.core as mx

        self._peak = max(self._peak, int(mx.get_peak_memory()))
        return self._peak


@contextmanager
def process_settings(device: Device) -> Iterator[None]:
    """While the context lasts, mlx's process-wide settings fit training; they are put back at the end.

    On a GPU, weights stay wired in physical memory and the buffer cache is bounded, since a cache that grows with
    every new shape of batch crowds out macOS. On a CPU, mlx would compile C++ for every fused operation, which takes
    minutes.
    """
    import mlx.core as mx

    if not device.is_gpu:
        mx.disable_compile()
        try:
            yield
        finally:
            mx.enable_compile()
        return
    before = [(mx.set_cache_limit, mx.set_cache_limit(device.memory // 8))]
    if device.kind == "metal":
        before.append((mx.set_wired_limit, mx.set_wired_limit(device.memory)))
        before.append((mx.set_memory_limit, mx.set_memory_limit(device.memory)))
    try:
        yield
    finally:
        for restore, value in before:
            restore(value)
