"""Validation on held-out examples: the loss, the best weights so far, and when to stop early."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from bp_data.loop.memory import MemoryGuard
from bp_data.loop.protocols import Group, Measured
from bp_data.loop.sampler import ExampleOrder, StepSampler, split_evenly
from bp_runs.events import Emit, EvalDone, Notice
from bp_runs.spec import TrainingSpec


class Validator:
    """Measures the validation loss and keeps the best weights.

    Args:
        framework: Measures.
        count: Held-out examples.
        training: Settings of validation and early stop.
        emit: Receives `EvalDone`.
        guard: Cuts micro-batches that do not fit.
        group: The processes that share the work; the result is the same on each.
        before_batch: Called before each micro-batch, when the GPU may have to cool down.
    """

    def __init__(
        self,
        framework: Measured,
        count: int,
        training: TrainingSpec,
        emit: Emit,
        *,
        guard: MemoryGuard,
        group: Group,
        eval_steps: int,
        before_batch: Callable[[], None] = lambda: None,
    ) -> None:
        self._framework = framework
        self._training = training
        self._emit = emit
        self._guard = guard
        self._group = group
        self._eval_steps = eval_steps
        self._before_batch = before_batch
        order = ExampleOrder(count, 0, shuffled=False)
        self._sampler = StepSampler(order, training.batch_size, rank=group.rank, ranks=group.count)
        self.best: Any = None
        """The best weights so far; None before the first finite validation loss."""
        self.best_loss: float | None = None
        self.best_step = 0
        self._since_best = 0
        self._last_step = -1
        self._last_loss: float | None = None

    def is_due(self, step: int, *, is_last: bool) -> bool:
        """Whether to validate after ``step``."""
        return step != self._last_step and (is_last or step % self._eval_steps == 0)

    @property
    def is_stalled(self) -> bool:
        """Whether ``early_stop`` validations in a row have not improved, also those before a resumed checkpoint."""
        return bool(self._training.early_stop) and self._since_best >= self._training.early_stop

    def loss_after(self, step: int) -> float | None:
        """The validation loss after ``step``, in nats, if that was the last step validated."""
        return self._last_loss if step == self._last_step else None

    def validate(self, step: int) -> bool:
        """Validate after ``step``; returns whether ``early_stop`` validations in a row have not improved."""
        loss, tokens, metrics = self.measure()
        self._last_step, self._last_loss = step, loss
        is_best = math.isfinite(loss) and (self.best_loss is None or loss < self.best_loss)
        if is_best:
            self.best_loss, self.best_step, self._since_best = loss, step, 0
            self.best = self._framework.copy_weights()
        else:
            self._since_best += 1
        self._emit(EvalDone(step=step, loss=loss, tokens=tokens, best=is_best, metrics=metrics))
        return self.is_stalled

    def load_best(self) -> None:
        """Set the weights to the best ones so far."""
        self._framework.load_weights(self.best)

    def restore_best(self, last_step: int) -> None:
        """Set the weights back to the best ones, unless the last are the best or the settings keep the last."""
        if self.best is None or self.best_step == last_step or self._training.keep == "last":
            return
        self.load_best()
        message = (
            f"kept the weights of step {self.best_step}, whose validation loss of {self.best_loss:.4f} is the best"
        )
        self._emit(Notice(message=message, details={"best_step": self.best_step}))

    def measure(self) -> tuple[float, int, dict[str, float]]:
        """Mean loss over all held-out examples, their trained tokens, and the means of the method's metrics."""
        steps = range(self._sampler.steps_per_epoch)
        return self.measure_batches([(*self._sampler.step(step), self._sampler.all_indexes(step)) for step in steps])

    def measure_batches(self, batches: Sequence[Sequence[Sequence[int]]]) -> tuple[float, int, dict[str, float]]:
        """As `measure`, over micro-batches: this process's examples, and those of all processes."""
        sums: Counter[str] = Counter()
        for batch, everyone in batches:
            self._before_batch()
            shared = self._framework.prepare_measure(batch, everyone)
            sums.update(self._guard.split(lambda: self._measure_chunks(batch, shared), len(batch), _nothing))  # noqa: B023
        names = sorted(sums)
        totals = dict(zip(names, self._group.sum_values([float(sums[name]) for name in names]), strict=True))
        tokens, count = int(totals.pop("tokens", 0)), totals.pop("count", 0)
        means = {name: value / max(1, count) for name, value in totals.items()}
        return means.pop("loss"), tokens, means

    def _measure_chunks(self, batch: Sequence[int], shared: Any) -> Counter[str]:
        found: Counter[str] = Counter()
        for chunk in list(split_evenly(batch, self._guard.chunks)) or [batch]:
            found.update(self._framework.measure(chunk, shared))
        return found

    def read_state(self) -> dict[str, Any]:
        """For a checkpoint: everything but the best weights."""
        found = {"best_loss": self.best_loss, "best_step": self.best_step}
        return {**found, "since_best": self._since_best, "last_step": self._last_step}

    def restore_state(self, state: Mapping[str, Any]) -> None:
        """Continue to compare where the checkpoint was."""
        self.best_loss, self.best_step = state["best_loss"], state["best_step"]
        self._since_best, self._last_step = state["since_best"], state["last_step"]


def _nothing() -> None:
    """A measurement leaves nothing to undo."""
