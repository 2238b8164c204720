"""Packed examples stay apart: a mask for attention, and the proof that the model needs nothing else.

mlx-lm's models ask their cache for the attention mask and for the position of the first token. `PackCache` stores
nothing and answers with a mask that is causal inside each example. Rotary positions run on through a pack: attention
depends on differences of positions alone, which are the same. Layers that keep a state, and models that use absolute
positions, would mix examples, so `require_packable` runs the loaded model and rejects it if they do.
"""

from __future__ import annotations

from array import array
from typing import Any

import mlx.core as mx

from bp_data import TokenRow
from bp_data.loop.examples import Batch, pad_rows
from bp_runs.errors import PackingError, first_line

_LENGTHS = (21, 19, 1, 7)
"""Tokens of the proof's examples: below a chunk of linear attention, above a small model's window."""
_EXACT, _TOLERANCE = 1e-6, 2e-4
"""Of the largest logit. Examples after another of the same length: the same bits. Against an example alone, positions
differ, and with them the rounding of sines."""
_LOW_PRECISION = 200
"""How much coarser bfloat16 and quantized products round than float32."""


class PackCache:
    """What one layer of a model gets in place of a key-value cache.

    Args:
        example: (B, T) number of each token's example in its row; padding has numbers of its own.
    """

    offset = 0
    """Position of the first token."""

    def __init__(self, example: Any) -> None:
        self._example = example

    def make_mask(self, length: int, return_array: bool = True, window_size: int | None = None) -> Any:  # noqa: ARG002
        """(B, 1, T, T): whether a token (row) reads another (column): itself and those before it in its example."""
        at = mx.arange(length)
        mask = (at[:, None] >= at[None]) & (self._example[:, :, None] == self._example[:, None, :])
        if window_size is not None:
            mask = mask & (at[:, None] < at[None] + window_size)
        return mask[:, None]

    def update_and_fetch(self, keys: Any, values: Any) -> tuple[Any, Any]:
        """Nothing is kept."""
        return keys, values


def pack_caches(model: Any, batch: Batch) -> list[PackCache]:
    """One cache for every layer; they share one table of examples."""
    numbers = array("i")
    for lengths in batch.lengths:
        end = len(numbers) + batch.width
        for number, length in enumerate(lengths):
            numbers.extend([number] * length)
        numbers.extend([len(lengths)] * (end - len(numbers)))
    cache = PackCache(mx.array(memoryview(numbers)).reshape(batch.rows, batch.width))
    return [cache] * len(model.layers)


def require_packable(model: Any, vocabulary: int, kind: str) -> None:
    """Prove on the loaded model that packed examples do not read each other.

    Two packs differ in their first example only: the others must give the same logits in both, and those that they
    give alone.

    Args:
        vocabulary: Token ids are below it.
        kind: The model's type, for the error.

    Raises:
        PackingError: Examples are mixed, or the model takes no mask.
    """
    draw = mx.random.key(0)
    count = 2 * _LENGTHS[0] + sum(_LENGTHS[1:])
    ids = mx.random.randint(0, vocabulary, (count,), key=draw).tolist()
    first, other = ids[: _LENGTHS[0]], ids[_LENGTHS[0] : 2 * _LENGTHS[0]]
    rest, at = [], 2 * _LENGTHS[0]
    for length in _LENGTHS[1:]:
        rest.append(ids[at : at + length])
        at += length
    try:
        one, two = _run_pack(model, [first, *rest]), _run_pack(model, [other, *rest])
        alone = mx.concatenate([model(mx.array([row]))[0] for row in rest]).astype(mx.float32)
        moved, off = _difference(one, two), _difference(one, alone)
    except (TypeError, ValueError, RuntimeError, AttributeError, KeyError, IndexError) as error:
        raise PackingError(f"a {kind} model takes no packed examples", cause=first_line(error)) from error
    slack = 1 if _is_float32(model) else _LOW_PRECISION
    if not (moved <= _EXACT * slack and off <= _TOLERANCE * slack):
        raise PackingError(
            f"packed examples of a {kind} model can't be kept apart",
            cause=f"another first example moves the logits of the others by {moved:.1g} of the largest, "
            f"and packing itself by {off:.1g}",
        )


def _run_pack(model: Any, rows: list[list[int]]) -> Any:
    """Logits of all examples but the first, (tokens, V) in float32."""
    batch = pad_rows([[TokenRow(0, array("i", row), bytes(len(row))) for row in rows]], 0)
    logits = model(mx.array(memoryview(batch.ids))[None], cache=pack_caches(model, batch))
    return logits[0, len(rows[0]) :].astype(mx.float32)


def _difference(one: Any, two: Any) -> float:
    return float(mx.abs(one - two).max() / mx.maximum(mx.abs(one).max(), 1e-6))


def _is_float32(model: Any) -> bool:
    from mlx.utils import tree_flatten

    return all(weight.dtype == mx.float32 for _, weight in tree_flatten(model.parameters()))
