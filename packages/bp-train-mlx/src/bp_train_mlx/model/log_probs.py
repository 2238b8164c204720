"""Log-probabilities of trained tokens: the head runs on those tokens alone, in tiles.

mlx-lm's models compute logits of every token. Here the decoder runs first, and the model's own code then turns the
hidden states of the trained tokens into logits, with whatever it does there: tied embeddings, scaling, soft caps. For
this, the model's ``__call__`` runs on a stand-in whose decoder returns hidden states that are there already.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx
from mlx import nn
from mlx.utils import tree_flatten, tree_unflatten

from bp_data.loop.examples import Batch
from bp_train_mlx.model.packing import pack_caches

TILE = 2**24
"""Logits of a tile: 64 MiB in float32. mlx launches ahead, so about six tiles are in memory at a time."""
_PROBE = 5
"""Tokens on which the split into decoder and head is compared with the whole model."""


class _Decoder:
    """Returns hidden states in place of the decoder that computed them."""

    def __init__(self, decoder: Any, hidden: Any) -> None:
        self._decoder, self._hidden = decoder, hidden

    def __call__(self, *_: Any, **__: Any) -> Any:
        return self._hidden

    def __getattr__(self, name: str) -> Any:
        return getattr(self._decoder, name)


class _Model:
    """A model with its decoder replaced, for one call of its head."""

    def __init__(self, model: Any, decoder: _Decoder) -> None:
        self._model, self.model = model, decoder

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)


class LogProbModel:
    """A causal language model of mlx-lm that returns log-probabilities of the trained tokens.

    Args:
        model: As mlx-lm loads it, with or without an adapter.
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        self._inner = getattr(model, "language_model", model)
        self.has_head = self._splits_exactly()

    def __call__(self, batch: Batch) -> Any:
        """(N,) log-probabilities in nats, float32, of the batch's trained tokens."""
        ids = mx.array(memoryview(batch.ids)).reshape(batch.rows, batch.width)
        caches = pack_caches(self.model, batch) if batch.is_packed else None
        at, targets = mx.array(memoryview(batch.positions)), mx.array(memoryview(batch.targets))
        if not self.has_head:
            logits = self.model(ids, cache=caches)
            return pick(logits.reshape(-1, logits.shape[-1])[at], targets)
        hidden = self._inner.model(ids, cache=caches)
        return self._in_tiles(hidden.reshape(-1, hidden.shape[-1])[at], targets)

    def _in_tiles(self, hidden: Any, targets: Any) -> Any:
        """The head over as many tokens at a time as `TILE` allows; each tile is computed again in backward."""
        rows = max(1, TILE // self.vocabulary)
        if hidden.shape[0] <= rows:
            return pick(self._head(hidden), targets)
        trained = self._trained_beside_layers()
        starts = range(0, hidden.shape[0], rows)
        return mx.concatenate([self._tile(targets[at : at + rows])(trained, hidden[at : at + rows]) for at in starts])

    def _tile(self, targets: Any) -> Any:
        """A function of weights and hidden states (n, H) that keeps neither logits nor their softmax."""

        def run(weights: Any, hidden: Any) -> Any:
            self.model.update(weights)  # so that gradients reach a head or embedding that is trained
            return pick(self._head(hidden), targets)

        return mx.checkpoint(run)

    def _head(self, hidden: Any) -> Any:
        """(N, V) logits of hidden states (N, H)."""
        stand_in = _Model(self._inner, _Decoder(self._inner.model, hidden[None]))
        return type(self._inner).__call__(stand_in, mx.zeros((1, hidden.shape[0]), mx.int32))[0]

    @property
    def vocabulary(self) -> int:
        """Logits of a token."""
        embedding = getattr(self._inner.model, "embed_tokens", None)
        return int(embedding.weight.shape[0]) if embedding is not None else 2**17

    def _trained_beside_layers(self) -> Any:
        own = tree_flatten(self.model.trainable_parameters())
        return tree_unflatten([(name, weight) for name, weight in own if ".layers." not in name])

    def _splits_exactly(self) -> bool:
        """Whether decoder and head give what the whole model gives, to the last bit but for batching."""
        if not isinstance(getattr(self._inner, "model", None), nn.Module):
            return False
        ids = mx.arange(_PROBE)[None] + 1
        try:
            whole = self.model(ids)[0]
            split = self._head(self._inner.model(ids).reshape(_PROBE, -1))
            return split.shape == whole.shape and bool(mx.allclose(split, whole, rtol=1e-3, atol=1e-3))
        except (AttributeError, TypeError, ValueError, IndexError):
            return False  # a model that is built in another way computes all of its logits


def pick(logits: Any, targets: Any) -> Any:
    """(N,) log-probabilities of ``targets`` (N,) under ``logits`` (N, V), in float32."""
    logits = logits.astype(mx.float32)
    chosen = mx.take_along_axis(logits, targets[:, None], axis=1)[:, 0]
    return chosen - mx.logsumexp(logits, axis=1)
