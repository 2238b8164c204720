"""A micro-batch that does not fit is halved, and the same step goes on with the same rows and the same gradient.

The loss is a sum over trained tokens divided by their number in the whole step, so the gradients of the pieces add up
to the gradient of the micro-batch. A failed attempt leaves a part of its gradient behind, so the gradients of the
optimizer step are cleared and its earlier micro-batches run again, each from the random state that it had: nothing
needs to be copied while all goes well.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from bp_runs.events import Emit, Notice
from bp_train_cuda.errors import OomExhaustedError

HALVINGS = 3
"""A micro-batch is cut into at most two to the power of this many pieces, and other work is tried again so often."""

Batch = Mapping[str, torch.Tensor]
Step = Callable[[Batch], torch.Tensor]
"""Forward and backward of one piece; returns its share of the step's loss, or of several sums (K,)."""
Result = TypeVar("Result")


@dataclass(frozen=True, slots=True)
class _MicroBatch:
    """One that has run in this optimizer step, so that it can run again."""

    step: Step
    batch: Batch
    random: tuple[torch.Tensor, Any]


class StepSplitter:
    """Runs micro-batches, in as many pieces as have turned out to fit.

    Args:
        parameters: Those whose gradients accumulate, and are None when an optimizer step begins; none for work without
            gradients.
        emit: Told when a batch is halved.
        enabled: Without it, a lack of memory is passed on at once.
        halvings: Where to begin: what fitted an earlier run.
    """

    def __init__(
        self, parameters: Sequence[torch.nn.Parameter], emit: Emit, *, enabled: bool = True, halvings: int = 0
    ) -> None:
        self._parameters = list(parameters)
        self.emit = emit
        self.enabled = enabled
        self._earlier: list[_MicroBatch] = []
        self.halvings = halvings
        """Kept from step to step: what did not fit once is not tried again."""

    def without_gradients(self) -> StepSplitter:
        """One for work between the micro-batches that leaves gradients alone; it starts where this one has come to."""
        return StepSplitter((), self.emit, enabled=self.enabled, halvings=self.halvings)

    def read_state(self) -> dict[str, Any]:
        """For a checkpoint: what did not fit."""
        return {"halvings": self.halvings}

    def restore_state(self, state: Mapping[str, Any]) -> None:
        """Go on in pieces of the size that fitted."""
        self.halvings = state["halvings"]

    def run(self, step: Step, batch: Batch) -> torch.Tensor:
        """The micro-batch's loss, its gradients added once.

        Args:
            step: Carries out one piece; may be called again within the same optimizer step.
            batch: Tensors (B, T) or (B, A, T), padded on the right where ``attention_mask`` is 0, and values of rows
                (B, …); or packed rows (1, T) with ``position_ids`` that begin again at 0 with each row.

        Raises:
            OomExhaustedError: A single row, or an eighth of the rows, does not fit.
            torch.OutOfMemoryError: With the guard disabled.
        """
        if not self.enabled:
            return step(batch)
        if all(p.grad is None for p in self._parameters):
            self._earlier.clear()
        this = _MicroBatch(step, batch, _read_random_state())
        failed = False
        while True:
            # Leaving the except clause frees the traceback, and with it the tensors of the failed attempt.
            try:
                if failed:
                    self._repeat_earlier()
                    _write_random_state(this.random)
                loss = self._run_pieces(this)
            except torch.OutOfMemoryError as error:
                reason = _read_reason(error)
            else:
                self._earlier.append(this)
                return loss
            failed = True
            self._halve(_count_rows(batch), reason)
            for parameter in self._parameters:
                parameter.grad = None
            release_memory()

    def _run_pieces(self, micro_batch: _MicroBatch) -> torch.Tensor:
        losses = [micro_batch.step(piece) for piece in split_batch(micro_batch.batch, 2**self.halvings)]
        return torch.stack(losses).sum(dim=0)

    def _repeat_earlier(self) -> None:
        for micro_batch in self._earlier:
            _write_random_state(micro_batch.random)
            self._run_pieces(micro_batch)

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
        self.emit(Notice(message=message, level="warning", details={"pieces": pieces, "reason": reason}))


def try_again(action: Callable[[], Result], what: str, emit: Emit, *, enabled: bool = True) -> Result:
    """What ``action`` returns; where it runs out of GPU memory, all that can be freed is freed and it is tried again.

    Args:
        action: May be called up to `HALVINGS` times more; must stand having been cut off.
        what: For the notice: ``the optimizer step``.

    Raises:
        OomExhaustedError: It never fitted.
        torch.OutOfMemoryError: With the guard disabled.
    """
    if not enabled:
        return action()
    for _ in range(HALVINGS):
        try:
            return action()
        except torch.OutOfMemoryError as error:
            reason = _read_reason(error)
        release_memory()
        message = f"out of GPU memory in {what}: unused memory was freed and it is tried again"
        emit(Notice(message=message, level="warning", details={"what": what, "reason": reason}))
    try:
        return action()
    except torch.OutOfMemoryError as error:
        raise OomExhaustedError(f"{what} does not fit the GPU's memory", cause=_read_reason(error)) from error


def release_memory() -> None:
    """Give back what no tensor holds."""
    gc.collect()
    torch.cuda.empty_cache()


def _read_reason(error: torch.OutOfMemoryError) -> str:
    return str(error).split(". ")[0]


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
    whole = batch["attention_mask"].shape[-1]
    width = int(batch["attention_mask"].sum(dim=-1).max())
    return {
        n: value[..., :width] if value.dim() > 1 and value.shape[-1] == whole else value for n, value in batch.items()
    }


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
