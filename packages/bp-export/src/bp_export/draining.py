"""What a child process says on its standard error, read as it comes: a full pipe would stop the child."""

from __future__ import annotations

import threading
from typing import IO

_KEPT_BYTES = 8192
_CHUNK_BYTES = 65536


class Drain:
    """Reads a pipe to its end in a thread of its own, and keeps the last words.

    Args:
        pipe: Buffered; it is closed at its end, by nobody else.
    """

    def __init__(self, pipe: IO[bytes]) -> None:
        self._pipe = pipe
        self._tail = b""
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def wait(self, seconds: float) -> str:
        """The last words, once the pipe has ended; what came so far where it does not."""
        self._thread.join(seconds)
        return self._tail.decode(errors="replace").strip()

    def _read(self) -> None:
        with self._pipe as pipe:
            while chunk := pipe.read1(_CHUNK_BYTES):  # type: ignore[attr-defined]  # a BufferedReader's
                self._tail = (self._tail + chunk)[-_KEPT_BYTES:]
