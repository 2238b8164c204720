"""mlx behind the shared loop: forward, backward, clip and update of `bp_data.loop.protocols.Framework`."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import mlx.core as mx
from mlx import nn
from mlx.utils import tree_flatten, tree_map

from bp_data.loop.examples import AnyExamples, Batch, CompletionExamples, RowExamples
from bp_data.loop.framework import ExampleFramework
from bp_data.loop.memory import MemoryGuard
from bp_data.loop.protocols import OneProcess
from bp_data.loop.references import References
from bp_runs.methods import METHODS, Completions, sft_loss
from bp_runs.spec import TrainingSpec
from bp_train_mlx.backend import MlxMemory, PeakMemory
from bp_train_mlx.model.log_probs import LogProbModel
from bp_train_mlx.model.lora import KeyedDropout
from bp_train_mlx.optim import AdamW


class MlxOps:
    """`bp_runs.methods.ArrayOps` of mlx arrays."""

    log_sigmoid = staticmethod(nn.log_sigmoid)
    sigmoid = staticmethod(mx.sigmoid)
    log = staticmethod(mx.log)
    expm1 = staticmethod(mx.expm1)
    at_most = staticmethod(mx.minimum)

    @staticmethod
    def where(condition: Any, yes: float, no: float) -> Any:
        """``yes`` where ``condition`` is true, else ``no``, as floats."""
        return mx.where(condition, mx.array(yes), mx.array(no))


class Trained(Protocol):
    """What is trained: an adapter, or the full model; under the names that checkpoints use."""

    dropouts: list[KeyedDropout]

    def weights(self) -> dict[str, Any]:
        """Arrays by name, in the layout of files."""
        ...

    def load(self, weights: Mapping[str, Any]) -> None:
        """Set the weights to those of the same names."""
        ...

    def rename(self, name: str) -> str:
        """The name in checkpoints of an mlx parameter."""
        ...

    def turn(self, weight: Any) -> Any:
        """An array of the mlx model in the layout of files, or the other way round."""
        ...


@dataclass
class MlxFramework(MlxMemory, ExampleFramework):
    """A model, its examples and its loss.

    Attributes:
        model: Log-probabilities of trained tokens.
        trained: The weights that training changes.
        examples: To train on.
        heldout: To validate on; None without validation.
        training: The method and its numbers.
        reader: Cuts work without gradients into chunks that fit.
        peak: Reads the peak memory.
        optimizer: None where nothing is trained.
        limit: As `MlxMemory.limit`.
    """

    model: LogProbModel
    trained: Trained
    examples: AnyExamples
    heldout: AnyExamples | None
    training: TrainingSpec
    reader: MemoryGuard
    peak: PeakMemory
    optimizer: AdamW | None = None
    limit: int | None = None
    _gradients: dict[str, Any] | None = field(default=None, init=False)
    _draws: int = field(default=0, init=False)
    """Forward passes in training so far: dropout's masks are a function of it and of the seed."""

    def __post_init__(self) -> None:
        self._preference = METHODS[self.training.method].loss
        self.references = References(
            self.sum_log_probs, self.training.batch_size, reader=self.reader, group=OneProcess()
        )
        self._value_and_grad = nn.value_and_grad(self.model.model, self._loss)

    # Gradients.

    def backward(self, chunk: Sequence[int], total: float, shared: Any) -> Any:
        """Add the gradient of the chunk's loss / ``total``; (K,) sums of loss and metrics.

        Everything is computed here and now: a graph that grew over a whole step would hold the activations of all of
        its chunks.
        """
        if not chunk:
            return mx.zeros(len(self.sum_names))
        self._set_dropout_keys()
        (_, sums), tree = self._value_and_grad(self.examples, chunk, total, shared)
        found = dict(tree_flatten(tree))
        if self._gradients is not None:
            found = {name: self._gradients[name] + gradient for name, gradient in found.items()}
        mx.eval(found, sums)
        self.require_within_limit()
        self._gradients = found
        return sums

    def _set_dropout_keys(self) -> None:
        self._draws += 1
        if not self.trained.dropouts:
            return
        keys = mx.random.split(mx.random.key(self.training.seed * 2**32 + self._draws), len(self.trained.dropouts))
        for layer, key in zip(self.trained.dropouts, keys, strict=True):
            layer.set_key(key)

    def add(self, sums: Any, more: Any) -> Any:
        """Both together."""
        return sums + more

    def clear_gradients(self) -> None:
        """Free all gradients."""
        self._gradients = None

    def sum_gradients(self) -> None:
        """One process trains alone."""

    def clip(self, max_norm: float, sums: Any) -> Callable[[], dict[str, float]]:
        """Scale gradients to at most ``max_norm``, by the same formula as torch's."""
        assert self._gradients is not None  # noqa: S101
        squares = [mx.square(gradient.astype(mx.float32)).sum() for gradient in self._gradients.values()]
        norm = mx.sqrt(mx.stack(squares).sum())
        if max_norm > 0:
            factor = mx.minimum(max_norm / (norm + 1e-6), 1.0)
            self._gradients = tree_map(lambda g: g * factor.astype(g.dtype), self._gradients)
        numbers = mx.concatenate([sums, norm.reshape(1)])
        return lambda: dict(zip((*self.sum_names, "grad_norm"), numbers.tolist(), strict=True))

    def update(self, rate: float) -> None:
        """One optimizer step, finished when called again after it ran out of memory."""
        assert self.optimizer is not None  # noqa: S101
        assert self._gradients is not None  # noqa: S101
        self.optimizer.update(self._gradients, rate)
        self.clear_gradients()

    def random_state(self) -> int:
        """Forward passes so far, from which dropout draws."""
        return self._draws

    def set_random_state(self, state: int) -> None:
        """Undo draws since `random_state`."""
        self._draws = state

    def peak_memory(self) -> int:
        """Bytes."""
        return self.peak.read()

    def require_within_limit(self) -> None:
        """As `MlxMemory.require_within_limit`; the run's own peak is read first, since mlx's counter is reset."""
        self.peak.read()
        super().require_within_limit()

    # Work without gradients.

    def sum_heldout(self, heldout: AnyExamples, indexes: Sequence[int], shared: Any) -> list[float]:
        """As `ExampleFramework.sum_heldout`."""
        with self.reading():
            _, sums = self._loss(heldout, indexes, 1.0, shared)
            values: list[float] = sums.tolist()
        self.require_within_limit()
        return values

    def sum_log_probs(self, batch: Batch) -> list[float]:
        """Of each row's trained tokens, without gradients and dropout."""
        with self.reading():
            found: list[float] = _sum_rows(self.model(batch), batch).tolist()
        self.require_within_limit()
        return found

    @contextlib.contextmanager
    def reading(self) -> Iterator[None]:
        """Without dropout; mlx computes gradients only on request."""
        was_training = self.model.model.training
        self.model.model.eval()
        try:
            yield
        finally:
            self.model.model.train(was_training)

    # The loss.

    def _loss(self, examples: AnyExamples, chunk: Sequence[int], total: float, shared: Any) -> tuple[Any, Any]:
        """The chunk's loss / ``total``, a scalar; and (K,) its summed loss and metrics."""
        batch = examples.collate(chunk)
        log_probs = self.model(batch)
        if isinstance(examples, RowExamples):
            loss = sft_loss(log_probs)
            return loss / total, mx.stop_gradient(loss.reshape(1))
        assert self._preference is not None  # noqa: S101
        found = self._completions(examples, chunk, batch, log_probs, shared)
        losses, margins = self._preference(found, self.training, MlxOps())
        loss = losses.sum()
        sums = mx.stack([loss, (margins > 0).astype(mx.float32).sum(), margins.sum()])
        return loss / total, mx.stop_gradient(sums)

    @staticmethod
    def _completions(
        examples: CompletionExamples, chunk: Sequence[int], batch: Batch, log_probs: Any, point: float | None
    ) -> Completions:
        sums = _sum_rows(log_probs, batch).reshape(-1, examples.width)
        tokens = _sum_rows(mx.ones_like(log_probs), batch).reshape(-1, examples.width)
        before, good = examples.references(chunk), examples.labels(chunk)
        return Completions(
            sums,
            tokens,
            mx.zeros_like(sums) if before is None else mx.array(before),
            None if good is None else mx.array(good),
            None if point is None else mx.array(point),
        )

    # State.

    def copy_weights(self) -> dict[str, Any]:
        """The trained weights; mlx arrays never change, so this is a copy."""
        found = self.trained.weights()
        mx.eval(found)
        return found

    def load_weights(self, weights: Mapping[str, Any]) -> None:
        """Set the trained weights."""
        self.trained.load(weights)


def _sum_rows(values: Any, batch: Batch) -> Any:
    """(rows,) sums of (N,) values over each row of the batch."""
    rows = mx.array(memoryview(batch.positions)) // batch.width
    return mx.zeros(batch.rows).at[rows].add(values)
