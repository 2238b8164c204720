"""A base model that stays in memory from one training or evaluation to the next."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable, Hashable, Iterator
from typing import Any


class KeptBase:
    """Holds at most one base, as it was loaded; one that a failed call may have left changed is dropped."""

    def __init__(self) -> None:
        self._key: Hashable = None
        self._base: Any = None

    @contextlib.contextmanager
    def borrow(self, key: Hashable, load: Callable[[], Any]) -> Iterator[Any]:
        """Yield the base of that key, loaded only where it is not here; the borrower takes its adapter off again.

        Args:
            key: Everything that decides how the base is loaded.
            load: Loads it.
        """
        base = self._base if key == self._key else None
        self._key = self._base = None  # before loading: two bases may not fit
        if base is None:
            gc.collect()  # the run before lies in cycles, with its whole model: a card need not hold both
            base = load()
        use_cache = getattr(base.config, "use_cache", None)
        yield base
        _undo_training(base, use_cache=use_cache)
        self._key, self._base = key, base


def take_off_adapter(model: Any) -> None:
    """Give a PEFT model's base its own layers back, in place."""
    base = model.unload()
    if "peft_config" in vars(base):  # PEFT removes it itself since 0.20
        del base.peft_config


def _undo_training(base: Any, *, use_cache: bool | None) -> None:
    """What TRL sets on a base for training: recomputed activations, and no cache for generation."""
    if getattr(base, "is_gradient_checkpointing", False):
        base.gradient_checkpointing_disable()
    with contextlib.suppress(AttributeError):  # older transformers raise where nothing was enabled
        base.disable_input_require_grads()
    vars(base).pop("forward", None)  # TRL's, with its own head
    if use_cache is not None:
        base.config.use_cache = use_cache
    base.eval()
    gc.collect()  # trainer and optimizer hold each other in cycles, and the GPU's memory with them
