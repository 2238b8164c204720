"""Before the first step of a long run: the longest batch, an optimizer step, a validation, and room for the saves.

Memory runs out late where it does: at the longest rows, when the optimizer makes its moments, at a validation, at a
save. A rehearsal meets all of it in the first minute, says the peak, and leaves nothing behind: weights, optimizer,
random state and the rows' order are bit for bit what they were.
"""

from __future__ import annotations

import contextlib
import copy
import random
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from bp_runs.events import Emit, Notice
from bp_runs.files import require_free_space
from bp_runs.spec import TrainSpec
from bp_train_cuda.batches import find_longest
from bp_train_cuda.evaluation import Validator
from bp_train_cuda.guards.oom import release_memory
from bp_train_cuda.guards.optimizer import count_moment_bytes, forget_moments
from bp_train_cuda.lora import trainable_weights
from bp_train_cuda.probe import Device

LONG_RUN = 50
"""Steps from which on a run on a GPU is rehearsed without being asked."""

_COUNTERS = (
    "tokens",
    "_own_tokens",
    "seen",
    "_seen_since",
    "_metrics",
    "_total_train_tokens",
    "current_gradient_accumulation_steps",
)
"""What a trainer counts as it goes: ours, TRL's, transformers'."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rehearsed:
    """What a rehearsal found."""

    peak: int
    """Bytes: the GPU's allocation, or 0 on a CPU."""
    rows: int
    tokens: int
    """Of the longest batch, padding included."""
    save_bytes: int
    """Of one checkpoint: trained weights and the optimizer's moments."""
    validated: bool
    """Whether there are rows to validate on, so that this was rehearsed too."""


class Rehearsal(TrainerCallback):  # type: ignore[misc]  # transformers is not typed for a strict check
    """Rehearses when the loop is about to begin, unless the run goes on from a checkpoint.

    Args:
        trainer: Asked for when the loop begins.
        validator: Likewise; None: there is nothing to validate on.
    """

    def __init__(
        self,
        spec: TrainSpec,
        device: Device,
        emit: Emit,
        *,
        trainer: Callable[[], Any],
        validator: Callable[[], Validator | None],
    ) -> None:
        self._spec = spec
        self._device = device
        self._emit = emit
        self._trainer = trainer
        self._validator = validator
        self.found: Rehearsed | None = None

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Rehearse; the optimizer and the model are those of the loop."""
        if state.global_step or not is_due(self._spec, self._device):
            return
        self.found = rehearse(self._trainer(), self._device, self._validator())
        training = self._spec.training
        saves = training.keep_checkpoints + 1 if training.save_steps else 1  # one where the run is stopped
        require_free_space(
            self._spec.folders.run,
            saves * self.found.save_bytes,
            "a checkpoint" if saves == 1 else f"{saves} checkpoints",
        )
        self._emit(_tell(self.found, self._device))


def is_due(spec: TrainSpec, device: Device) -> bool:
    """Whether the run is to be rehearsed."""
    if spec.ranks is not None and spec.ranks.sharded:
        return False  # a rank that cannot go on would leave the others waiting
    wanted = spec.training.preflight
    return wanted == "on" or (wanted == "auto" and device.kind == "cuda" and spec.training.steps >= LONG_RUN)


def rehearse(trainer: Any, device: Device, validator: Validator | None) -> Rehearsed:
    """Run the heaviest moments of the loop that ``trainer`` is about to begin.

    Raises:
        OomExhaustedError: Not even a single row fits.
    """
    batch = _collate_longest(trainer)
    on_gpu = device.kind == "cuda"
    with _unchanged(trainer):
        release_memory()
        if on_gpu:
            torch.cuda.reset_peak_memory_stats()
        _accumulate(trainer, batch)
        trainer.optimizer.step()
        moments = count_moment_bytes(trainer.optimizer)
        trainer.model.zero_grad()
        _accumulate(trainer, batch)  # once more, now that the moments are there
        trainer.model.zero_grad()
        if validator is not None:
            validator.rehearse()
        peak = torch.cuda.max_memory_allocated() if on_gpu else 0
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    rows, tokens = len(next(iter(batch.values()))), int(batch["input_ids"].numel())
    trained = sum(weight.nbytes for weight in trainable_weights(trainer.model).values())
    save = trained + moments
    return Rehearsed(peak=peak, rows=rows, tokens=tokens, save_bytes=save, validated=validator is not None)


def _accumulate(trainer: Any, batch: Mapping[str, torch.Tensor]) -> None:
    """Gradients of two micro-batches where the loop adds some up, else of one."""
    count = min(2, trainer.args.gradient_accumulation_steps)
    # On the device, as the loop's loader gives them: kto looks at a micro-batch before transformers moves it.
    ready = [trainer._prepare_inputs(dict(batch)) for _ in range(count)]  # noqa: SLF001
    batches, items = trainer.get_batch_samples(iter(ready), count, trainer.args.device)
    trainer.current_gradient_accumulation_steps = count
    for micro_batch in batches:
        trainer.training_step(trainer.model_wrapped, micro_batch, items)


def _collate_longest(trainer: Any) -> Mapping[str, torch.Tensor]:
    rows = trainer.train_dataset
    places = find_longest(rows.lengths(), trainer.args.per_device_train_batch_size)
    batch: Mapping[str, torch.Tensor] = trainer.data_collator([rows[place] for place in places])
    return batch


@contextlib.contextmanager
def _unchanged(trainer: Any) -> Iterator[None]:
    """Put back what a step changes. Weights are kept on the CPU meanwhile."""
    weights = {name: weight.detach().to("cpu", copy=True) for name, weight in trainable_weights(trainer.model).items()}
    counters = {name: copy.deepcopy(getattr(trainer, name)) for name in _COUNTERS if hasattr(trainer, name)}
    states = random.getstate(), torch.get_rng_state()
    on_gpu = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    was_training = trainer.model.training
    try:
        yield
    finally:
        with torch.no_grad():
            for name, weight in trainable_weights(trainer.model).items():
                weight.copy_(weights[name])
                weight.grad = None
        forget_moments(trainer.optimizer)
        for name, value in counters.items():
            setattr(trainer, name, value)
        random.setstate(states[0])
        torch.set_rng_state(states[1])
        if on_gpu:
            torch.cuda.set_rng_state_all(on_gpu)
        trainer.model.train(was_training)


def _tell(found: Rehearsed, device: Device) -> Notice:
    on_gpu = device.kind == "cuda"
    total = torch.cuda.get_device_properties(0).total_memory if on_gpu else 0
    peak = f"at most {found.peak / 2**30:.2f} of {total / 2**30:.1f} GiB in use; " if on_gpu else ""
    steps = "an optimizer step and a validation" if found.validated else "and an optimizer step"
    message = (
        f"rehearsed the longest batch ({found.rows} × {found.tokens // found.rows} tokens), {steps}: "
        f"{peak}a checkpoint takes {found.save_bytes / 2**20:,.1f} MiB"
    )
    details = {"peak_bytes": found.peak, "save_bytes": found.save_bytes, "rows": found.rows, "tokens": found.tokens}
    return Notice(message=message, details={"rehearsal": details})
