"""What the GPU has free; asked again when that is old."""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from backpropagate.rails import GPUS
from backpropagate.ui.subcommand import AnswerError, ask

_FRESH_SECONDS = 60.0
_MOST_SECONDS = 120.0


@dataclass(slots=True)
class Machine:
    """The rails of this machine, from `backprop info`."""

    _rails: list[dict[str, Any]] | None = None
    _looked: float = 0.0
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def rails(self) -> list[dict[str, Any]] | None:
        """Name, usable, why, device and memory of each; None where they are unknown. May take seconds."""
        with self._lock:
            if not self._looked or time.monotonic() - self._looked > _FRESH_SECONDS:
                self._rails, self._looked = _ask_rails(), time.monotonic()
            return self._rails

    @property
    def is_known(self) -> bool:
        """Whether it has been asked before."""
        return bool(self._looked)

    def known_memory(self) -> int | None:
        """As `free_memory`, if it has been asked before; asks nothing."""
        found = (r for r in self._rails or () if r["usable"] and r["device"] in GPUS)
        memory = next((r["memory"] for r in found), None)
        return int(memory) if memory is not None else None

    def free_memory(self) -> int | None:
        """Bytes free on the GPU that training would use; None without one."""
        found = (r for r in self.rails() or () if r["usable"] and r["device"] in GPUS)
        memory = next((r["memory"] for r in found), None)
        return int(memory) if memory is not None else None


def _ask_rails() -> list[dict[str, Any]] | None:
    try:
        found: Mapping[str, Any] = ask(["info"], seconds=_MOST_SECONDS)
    except AnswerError:
        return None
    return list(found["rails"])
