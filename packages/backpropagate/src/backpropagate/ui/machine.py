"""What the machine's card has free, asked in a process of its own: a server must not hold a card's memory."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field
from typing import Any

import orjson

_FRESH_SECONDS = 60.0
_MOST_SECONDS = 120.0


@dataclass(slots=True)
class Machine:
    """The rails of this machine as `backprop info` tells them, looked at again when that is old."""

    _rails: list[dict[str, Any]] | None = None
    _looked: float = 0.0
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def rails(self) -> list[dict[str, Any]] | None:
        """Name, usable, why, device and memory of each; None where they cannot be told. May take seconds."""
        with self._lock:
            if not self._looked or time.monotonic() - self._looked > _FRESH_SECONDS:
                self._rails, self._looked = _ask(), time.monotonic()
            return self._rails

    def free_memory(self) -> int | None:
        """Bytes free on the card that training would take; None where there is none."""
        found = (r for r in self.rails() or () if r["usable"] and r["device"] == "cuda")
        memory = next((r["memory"] for r in found), None)
        return int(memory) if memory is not None else None


def _ask() -> list[dict[str, Any]] | None:
    command = [sys.executable, "-m", "backpropagate", "info", "--json"]
    try:
        done = subprocess.run(command, capture_output=True, check=True, timeout=_MOST_SECONDS)  # noqa: S603  # our own
        rails: list[dict[str, Any]] = orjson.loads(done.stdout)["rails"]
    except (OSError, subprocess.SubprocessError, orjson.JSONDecodeError, KeyError):
        return None
    return rails
