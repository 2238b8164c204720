"""A base model that stays in memory from one training run or evaluation to the next."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable, Hashable, Iterator
from typing import Any

import mlx.core as mx


class BaseCache:
    """Holds at most one base, as it was loaded; one that a failed call may have changed is dropped."""

    def __init__(self) -> None:
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
            gc.collect()
            base = load()
        yield base
        base.eval()
        gc.collect()
        mx.clear_cache()
        self._key, self._base = key, base
