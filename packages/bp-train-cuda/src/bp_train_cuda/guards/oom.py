"""How torch runs out of memory, for `bp_data.loop.memory.MemoryGuard`."""

from __future__ import annotations

import gc

import torch


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
