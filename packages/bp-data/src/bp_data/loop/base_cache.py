"""A base model that stays in memory from one training run or evaluation to the next."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable, Hashable, Iterator
from typing import Any


class BaseCache:
    """Holds at most one base, as it was loaded; one that a failed call may have changed is dropped.

    Args:
        restore: Puts a base back into the state in which it was loaded.
        free: Returns the framework's unused memory, after Python's.
    """

    def __init__(self, restore: Callable[[Any], object], free: Callable[[], object] | None = None) -> None:
        self._restore = restore
        self._free = free
        self._key: Hashable = None
        self._base: Any = None

    @contextlib.contextmanager
    def borrow(self, key: Hashable, load: Callable[[], Any]) -> Iterator[Any]:
        """Yield the base of that key, loaded unless it is here; the borrower removes its adapter again.

        Args:
            key: Everything that decides how the base is loaded.
            load: Loads it.
        """
        base = self._base if key == self._key else None
        self._key = self._base = None  # before loading: two bases may not fit
        if base is None:
            gc.collect()  # the run before may be in cycles, with its whole model: a GPU need not hold both
            base = load()
        yield base
        self._restore(base)
        gc.collect()  # optimizer state and activations, before the next run needs the memory
        if self._free is not None:
            self._free()
        self._key, self._base = key, base
