"""Validation on held-out rows: the loss, the best adapter so far, and when to stop early."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch.utils.data import DataLoader

from bp_data import split_rows
from bp_runs.events import Emit, EvalDone, Notice
from bp_runs.spec import TrainingSpec
from bp_train_cuda.batches import fill_empty, find_longest
from bp_train_cuda.distributed.process_group import ProcessGroup
from bp_train_cuda.distributed.sharding import local_weights
from bp_train_cuda.guards.oom import Batch
from bp_train_cuda.order import RankBatches

MOST_ROWS = 500
"""A validation costs time at every visit; more rows than these would tell little more."""

Measure = Callable[[Batch], Mapping[str, float]]
"""Sums over a batch, as `bp_train_cuda.guarded.Guarded.measure` says."""


def hold_out(rows: Any, spec: TrainingSpec) -> tuple[Any, Any]:
    """Rows to train on and rows to validate on; none of these where too few would be left to tell anything.

    A share that would hold out fewer than ``eval_min_rows`` holds out none.
    """
    count = min(MOST_ROWS, round(spec.eval_share * len(rows)))
    if count < max(1, spec.eval_min_rows):
        return rows, []
    return split_rows(rows, count, spec.seed)


class Validator:
    """Measures the loss on held-out rows and remembers the best adapter, on the CPU.

    Args:
        model: The PEFT model; only its trainable weights are remembered.
        rows: Held-out rows, as a torch data set.
        measure: As `Measure`.
        collate: Rows to tensors, padded.
        team: The ranks that part the rows; what is measured is the same on all of them.
    """

    def __init__(
        self,
        model: Any,
        rows: Any,
        spec: TrainingSpec,
        emit: Emit,
        *,
        measure: Measure,
        collate: Callable[[Any], Any],
        team: ProcessGroup,
    ) -> None:
        self._model = model
        self._spec = spec
        self._emit = emit
        self._measure_batch = measure
        self._collate = collate
        self._team = team
        # A generator of its own: a DataLoader draws a number at each start, and training's draws must not move.
        own = torch.Generator()
        batches = RankBatches(range(len(rows)), spec.batch_size, team.rank, team.count)
        self._loader = DataLoader(rows, batch_sampler=batches, collate_fn=fill_empty(collate, rows), generator=own)
        self.look: Callable[[], None] = lambda: None
        """Called before each batch, when the card may have to rest."""
        self.best: dict[str, torch.Tensor] = {}
        """The best weights so far, on the CPU; of parted ones this rank's shares."""
        self._since_best = 0
        self.best_loss: float | None = None
        self.best_step = 0
        self._last_step = -1
        self._last_loss: float | None = None

    def loss_after(self, step: int) -> float | None:
        """The validation loss after ``step``, in nats, where that was the last one measured."""
        return self._last_loss if step == self._last_step else None

    def is_due(self, step: int, *, is_last: bool) -> bool:
        """Whether to validate after ``step``."""
        return step != self._last_step and (is_last or step % self._spec.eval_steps == 0)

    def visit(self, step: int) -> bool:
        """Validate after ``step``; True when training has stopped helping for ``early_stop`` visits in a row."""
        loss, tokens, metrics = self.measure()
        self._last_step, self._last_loss = step, loss
        is_best = math.isfinite(loss) and (self.best_loss is None or loss < self.best_loss)
        if is_best:
            self.best_loss, self.best_step, self._since_best = loss, step, 0
            self.best = {n: p.detach().cpu().clone() for n, p in local_weights(self._model).items()}
        else:
            self._since_best += 1
        self._emit(EvalDone(step=step, loss=loss, tokens=tokens, best=is_best, metrics=metrics))
        return bool(self._spec.early_stop) and self._since_best >= self._spec.early_stop

    def restore_best(self, last_step: int) -> None:
        """Put the best adapter back, where a later one is worse and the setting says so."""
        if not self.best or self.best_step == last_step or self._spec.keep == "last":
            return
        with torch.no_grad():
            for name, weight in local_weights(self._model).items():
                weight.copy_(self.best[name])
        message = f"the adapter of step {self.best_step} is kept: its validation loss {self.best_loss:.4f} is the best"
        self._emit(Notice(message=message, details={"best_step": self.best_step}))

    def rehearse(self) -> None:
        """Measure the longest held-out rows once, for the memory that it takes."""
        rows: Any = self._loader.dataset
        longest = find_longest(rows.lengths(), self._spec.batch_size)
        self._measure([self._collate([rows[place] for place in longest])])

    def read_state(self) -> dict[str, Any]:
        """For a checkpoint: all but the best weights."""
        found = {"best_loss": self.best_loss, "best_step": self.best_step}
        return {**found, "since_best": self._since_best, "last_step": self._last_step}

    def restore_state(self, state: Mapping[str, Any]) -> None:
        """Go on comparing where the checkpoint was."""
        self.best_loss, self.best_step = state["best_loss"], state["best_step"]
        self._since_best, self._last_step = state["since_best"], state["last_step"]

    def measure(self) -> tuple[float, int, dict[str, float]]:
        """Mean loss over the held-out rows, their trained tokens, and the means of the method's metrics."""
        return self._measure(self._loader)

    def _measure(self, batches: Iterable[Batch]) -> tuple[float, int, dict[str, float]]:
        sums: Counter[str] = Counter()
        tokens = 0.0
        was_training = self._model.training
        self._model.eval()
        try:
            with torch.no_grad():
                for batch in batches:
                    self.look()
                    on_device = {name: value.to(self._model.device) for name, value in batch.items()}
                    sums.update(self._measure_batch(on_device))
                    tokens += count_trained(batch)
        finally:
            self._model.train(was_training)
        names = sorted(sums)
        *values, tokens = self._team.sum_values([*(sums[name] for name in names), tokens])
        sums = Counter(dict(zip(names, values, strict=True)))
        means = {name: value / max(1, sums["count"]) for name, value in sums.items() if name != "count"}
        return means.pop("loss"), int(tokens), means


def count_trained(batch: Batch) -> int:
    """Tokens of a batch that carry loss, of rows that count."""
    trained = batch["labels"][..., 1:] >= 0
    return int(trained[batch["share"] > 0].sum() if "share" in batch else trained.sum())
