"""Windows moves GPU memory into system RAM when the GPU is full: nothing fails, and training crawls.

The driver calls it the CUDA sysmem fallback. It shows by more memory than the GPU has, or by a collapse of the speed
while the GPU is full.
"""

from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import torch

from bp_runs.events import Emit, Notice

DRIVER_SETTING = (
    "NVIDIA Control Panel > Manage 3D Settings > Program Settings > python.exe > "
    "CUDA - Sysmem Fallback Policy > Prefer No Sysmem Fallback"
)
_COLLAPSE = 3.0  # times slower than the median of what came before
_FULL = 0.03  # share of the GPU's memory left free
_LOOK_BACK = 20  # steps


@dataclass(frozen=True, slots=True)
class GpuMemory:
    """The GPU's memory, in bytes."""

    reserved: int
    """By this process, wherever the driver has put it."""
    free: int
    physical: int


class SpillDetector:
    """Looks at memory and speed after each step; tells once.

    Args:
        read: The GPU's memory now.
    """

    def __init__(self, read: Callable[[], GpuMemory], emit: Emit) -> None:
        self._read = read
        self._emit = emit
        self._speeds: deque[float] = deque(maxlen=_LOOK_BACK)
        self._is_reported = False

    def end_step(self, tokens_per_second: float) -> None:
        """Take a step's speed into account."""
        if self._is_reported:
            return
        memory = self._read()
        why = self._find_sign(memory, tokens_per_second)
        self._speeds.append(tokens_per_second)
        if why:
            self._is_reported = True
            message = (
                f"GPU memory seems to spill into system RAM: {why}. Set {DRIVER_SETTING}; "
                "then a batch that does not fit is halved instead"
            )
            self._emit(Notice(message=message, level="warning", details={"spill": why, "setting": DRIVER_SETTING}))

    def _find_sign(self, memory: GpuMemory, speed: float) -> str:
        if memory.reserved > memory.physical:
            return f"{memory.reserved / 2**30:.1f} GiB are in use on a GPU of {memory.physical / 2**30:.1f} GiB"
        if len(self._speeds) < _LOOK_BACK // 4 or memory.free > _FULL * memory.physical:
            return ""
        usual = statistics.median(self._speeds)
        if speed * _COLLAPSE < usual:
            return f"{speed:,.0f} tokens/s after {usual:,.0f}, with {memory.free / 2**20:,.0f} MiB of the GPU free"
        return ""


def read_gpu_memory() -> GpuMemory:
    """Of torch's current CUDA device."""
    free, physical = torch.cuda.mem_get_info()
    return GpuMemory(reserved=torch.cuda.memory_reserved(), free=free, physical=physical)


def cap_allocator() -> None:
    """Let torch's own allocator reject what is more than the GPU has, before the driver moves it elsewhere."""
    torch.cuda.set_per_process_memory_fraction(1.0)
