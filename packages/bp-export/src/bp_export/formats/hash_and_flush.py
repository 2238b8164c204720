"""What follows the writing of a large file in threads of its own: its hash, and its way to the disk.

Both take about as long as the writing itself, and neither depends on what comes next: in parallel they are free, and
the last wait for the disk is a short one.
"""

from __future__ import annotations

import hashlib
import os
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from typing import IO

_MOST_PARTS = 4  # that wait for the hash; each is a chunk of memory
_FLUSH_BYTES = 64 * 2**20

# Without the file's times, where the system knows the difference.
_flush = getattr(os, "fdatasync", os.fsync)


class HashAndFlush:
    """The SHA-256 of a file's parts, and a file whose older parts are on the disk already.

    Args:
        file: Open for writing; whoever writes to it tells each part with `add`.
    """

    def __init__(self, file: IO[bytes]) -> None:
        self._descriptor = file.fileno()
        self._digest = hashlib.sha256()
        self._hasher = ThreadPoolExecutor(1, "bp-export-hash")
        self._flusher = ThreadPoolExecutor(1, "bp-export-flush")
        self._hashing: deque[Future[None]] = deque()
        self._flushing: Future[None] | None = None
        self._unflushed = 0

    def add(self, part: memoryview | bytes) -> None:
        """Follow a part that was written; it must not change any more.

        Raises:
            OSError: The disk does not take what was written earlier.
        """
        self._hashing.append(self._hasher.submit(self._digest.update, part))
        if len(self._hashing) > _MOST_PARTS:
            self._hashing.popleft().result()
        self._unflushed += len(part)
        if self._unflushed >= _FLUSH_BYTES and (self._flushing is None or self._flushing.done()):
            self._wait_for_disk()
            self._flushing, self._unflushed = self._flusher.submit(_flush, self._descriptor), 0

    def finish(self) -> str:
        """The hex SHA-256 of all parts, once nothing is under way any more.

        Raises:
            OSError: As `add`.
        """
        self._wait_for_disk()
        self._hasher.shutdown()
        return self._digest.hexdigest()

    def close(self) -> None:
        """Let go of the file; what is under way ends first."""
        for pool in (self._hasher, self._flusher):
            pool.shutdown(cancel_futures=True)

    def _wait_for_disk(self) -> None:
        if self._flushing is not None:
            self._flushing.result()
