"""A micro-batch that does not fit is halved, and the same step goes on with the same rows and the same gradient.

The loss is a sum over trained tokens divided by their number in the whole step, so the gradients of the pieces add up
to the gradient of the micro-batch. What a failed attempt has added to the gradients is taken back first, and the
random state is set back.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from bp_runs.events import Emit, Notice
from bp_train_cuda.errors import OomExhaustedError

HALVINGS = 3
"""A micro-batch is cut into at most two to the power of this many pieces."""

Batch = Mapping[str, torch.Tensor]
Step = Callable[[Batch], torch.Tensor]
"""Forward and backward of one piece; returns its share of the step's loss."""


class StepSplitter:
    """Runs micro-batches, in as many pieces as have turned out to fit.

    Args:
        parameters: Those whose gradients accumulate.
        emit: Told when a batch is halved.
        enabled: Without it, a lack of memory is passed on at once.
    """

    def __init__(self, parameters: Sequence[torch.nn.Parameter], emit: Emit, *, enabled: bool = True) -> None:
        self._parameters = list(parameters)
        self._emit = emit
        self._enabled = enabled
        self.halvings = 0
        """Kept from step to step: what did not fit once is not tried again."""

    def run(self, step: Step, batch: Batch) -> torch.Tensor:
        """The micro-batch's loss, its gradients added once.

        Args:
            step: Carries out one piece.
            batch: Tensors (B, T), padded on the right where ``attention_mask`` is 0; or packed rows (1, T) with
                ``position_ids`` that begin again at 0 with each row.

        Raises:
            OomExhaustedError: A single row, or an eighth of the rows, does not fit.
            torch.OutOfMemoryError: With the guard disabled.
        """
        if not self._enabled:
            return step(batch)
        gradients = [None if p.grad is None else p.grad.clone() for p in self._parameters]
        random = _read_random_state()
        while True:
            # Leaving the except clause frees the traceback, and with it the tensors of the failed attempt.
            try:
                return self._run_pieces(step, batch)
            except torch.OutOfMemoryError as error:
                reason = str(error).split(". ")[0]
            self._halve(_count_rows(batch), reason)
            for parameter, gradient in zip(self._parameters, gradients, strict=True):
                parameter.grad = None if gradient is None else gradient.clone()
            _write_random_state(random)
            gc.collect()
            torch.cuda.empty_cache()

    def _run_pieces(self, step: Step, batch: Batch) -> torch.Tensor:
        losses = [step(piece) for piece in split_batch(batch, 2**self.halvings)]
        return torch.stack(losses).sum()

    def _halve(self, rows: int, reason: str) -> None:
        if self.halvings == HALVINGS or rows <= 2**self.halvings:
            raise OomExhaustedError(
                f"a micro-batch of {rows} rows does not fit, nor do its {min(rows, 2**self.halvings)} pieces",
                cause=reason,
            )
        self.halvings += 1
        pieces = min(rows, 2**self.halvings)
        message = (
            f"out of GPU memory: micro-batches of {rows} rows now run in {pieces} pieces; same rows, same gradient"
        )
        self._emit(Notice(message=message, level="warning", details={"pieces": pieces, "reason": reason}))


def split_batch(batch: Batch, pieces: int) -> list[Batch]:
    """``batch`` cut along its rows into at most ``pieces`` parts, each without the columns that only pad it."""
    if pieces == 1:
        return [batch]
    if "position_ids" in batch:
        starts = _read_starts(batch)
        chosen = [part[0] for part in torch.tensor(starts).tensor_split(min(pieces, len(starts)))]
        return [dict(part) for part in _cut(batch, [int(start) for start in chosen[1:]])]
    columns = {name: value.tensor_split(min(pieces, _count_rows(batch))) for name, value in batch.items()}
    parts = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
    return [_trim(part) for part in parts]


def _trim(batch: dict[str, torch.Tensor]) -> Batch:
    if "attention_mask" not in batch:
        return batch
    width = int(batch["attention_mask"].sum(dim=1).max())
    return {name: value[:, :width] for name, value in batch.items()}


def _cut(batch: Batch, places: Sequence[int]) -> list[dict[str, torch.Tensor]]:
    columns = {name: value.tensor_split(list(places), dim=1) for name, value in batch.items()}
    return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]


def _read_starts(batch: Batch) -> list[int]:
    """Where packed rows begin."""
    return [int(place) for place in (batch["position_ids"][0] == 0).nonzero().flatten()]


def _count_rows(batch: Batch) -> int:
    return len(_read_starts(batch)) if "position_ids" in batch else len(next(iter(batch.values())))


def _read_random_state() -> tuple[torch.Tensor, Any]:
    return torch.get_rng_state(), torch.cuda.get_rng_state_all() if torch.cuda.is_available() else None


def _write_random_state(state: tuple[torch.Tensor, Any]) -> None:
    torch.set_rng_state(state[0])
    if state[1] is not None:
        torch.cuda.set_rng_state_all(state[1])
