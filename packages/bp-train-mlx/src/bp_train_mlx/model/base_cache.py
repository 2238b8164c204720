"""The shared cache of a base model, with what mlx needs between two runs."""

from __future__ import annotations

import mlx.core as mx

from bp_data.loop import base_cache


class BaseCache(base_cache.BaseCache):
    """Keeps one mlx model, in evaluation mode; mlx's own cache of buffers is emptied after a run."""

    def __init__(self) -> None:
        super().__init__(lambda base: base.eval(), mx.clear_cache)
