"""Before the first step of a long run: the longest batch, an optimizer step, a validation, and room for the saves.

Runs that run out of memory do so late: at the longest examples, when the optimizer makes its state, at a validation, at
a save. A preflight meets all of it in the first minute, reports the peak, and leaves nothing behind: weights,
optimizer, generators and the order of examples are bit for bit what they were.
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from bp_data.loop.examples import find_longest
from bp_data.loop.loop import LoopParts
from bp_data.loop.memory import MemoryGuard
from bp_data.loop.sampler import split_evenly
from bp_runs.events import Notice
from bp_runs.files import require_free_space
from bp_runs.spec import TrainSpec
from bp_train_cuda.backend import Device
from bp_train_cuda.engines.framework import TorchFramework
from bp_train_cuda.optim import count_state_bytes, reset_state

LONG_RUN = 50
"""Steps from which on a run on a GPU has a preflight by default."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Preflight:
    """What a preflight found."""

    peak: int
    """Bytes: the GPU's allocation, or 0 on a CPU."""
    rows: int
    tokens: int
    """Of the longest batch, padding included."""
    save_bytes: int
    """Of one checkpoint: trained weights and optimizer state."""
    validated: bool
    """Whether there was a validation to measure too."""


def is_due(spec: TrainSpec, device: Device) -> bool:
    """Whether the run has a preflight."""
    if spec.ranks is not None and spec.ranks.sharded:
        return False  # a rank that cannot continue would leave the others waiting
    if spec.checkpoint is not None:
        return False
    setting = spec.training.preflight
    return setting == "on" or (setting == "auto" and device.kind == "cuda" and spec.training.planned_steps >= LONG_RUN)


def run_preflight(spec: TrainSpec, parts: LoopParts, framework: TorchFramework, device: Device) -> Preflight:
    """Run the heaviest moments of the run that is about to begin, report them, and check for room for its saves.

    Raises:
        OomExhaustedError: Not even a single example fits.
        DiskFullError: The checkpoints would not fit the disk.
    """
    found = _measure(framework, parts, spec.training.gradient_accumulation)
    training = spec.training
    saves = training.keep_checkpoints + 1 if training.save_steps else 1  # one where the run is stopped
    what = "a checkpoint" if saves == 1 else f"{saves} checkpoints"
    require_free_space(spec.folders.run, saves * found.save_bytes, what)
    parts.emit(_notice(found, device))
    return found


def _measure(framework: TorchFramework, parts: LoopParts, accumulation: int) -> Preflight:
    guard, validator = parts.guard, parts.validator
    batch = find_longest(framework.examples.lengths(), parts.sampler.batch_size)
    on_gpu = framework.device.type == "cuda"
    optimizer = framework.optimizer
    assert optimizer is not None  # noqa: S101
    with _unchanged(framework):
        framework.release_memory()
        if on_gpu:
            torch.cuda.reset_peak_memory_stats()
        _accumulate(framework, guard, batch, min(2, accumulation))
        guard.retry(lambda: framework.update(0.0), "the optimizer step")
        state = count_state_bytes(optimizer)
        _accumulate(framework, guard, batch, min(2, accumulation))  # once more, now that there is optimizer state
        framework.clear_gradients()
        if validator is not None and framework.heldout is not None:
            heldout = framework.longest_heldout()
            validator.measure_batches([(heldout, heldout)])
        peak = torch.cuda.max_memory_allocated() if on_gpu else 0
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    longest = framework.examples.collate(framework.expand(batch))
    trained = sum(weight.nbytes for weight in framework.own_weights().values())
    return Preflight(
        peak=peak,
        rows=min(len(batch), longest.rows),  # packs are joined to one row; a pair has two
        tokens=len(longest.ids),
        save_bytes=trained + state,
        validated=validator is not None,
    )


def _accumulate(framework: TorchFramework, guard: MemoryGuard, batch: Sequence[int], count: int) -> None:
    """Gradients of ``count`` micro-batches."""
    examples = framework.expand(batch)
    shared = framework.prepare(batch, batch)

    def run() -> None:
        for _ in range(count):
            for chunk in split_evenly(examples, guard.chunks):
                framework.backward(chunk, 1.0, shared)

    guard.split(run, len(examples), framework.clear_gradients)


@contextlib.contextmanager
def _unchanged(framework: TorchFramework) -> Iterator[None]:
    """Put back what a step changes. Weights are kept on the CPU meanwhile."""
    weights = framework.copy_weights()
    states = random.getstate(), framework.random_state()
    try:
        yield
    finally:
        framework.load_weights(weights)
        framework.clear_gradients()
        assert framework.optimizer is not None  # noqa: S101
        reset_state(framework.optimizer)
        random.setstate(states[0])
        framework.set_random_state(states[1])


def _notice(found: Preflight, device: Device) -> Notice:
    on_gpu = device.kind == "cuda"
    total = torch.cuda.get_device_properties(0).total_memory if on_gpu else 0
    peak = f"at most {found.peak / 2**30:.2f} of {total / 2**30:.1f} GiB in use; " if on_gpu else ""
    steps = "an optimizer step and a validation" if found.validated else "and an optimizer step"
    message = (
        f"preflight: ran the longest batch ({found.rows} × {found.tokens // found.rows} tokens), {steps}: "
        f"{peak}a checkpoint takes {found.save_bytes / 2**20:,.1f} MiB"
    )
    details = {"peak_bytes": found.peak, "save_bytes": found.save_bytes, "rows": found.rows, "tokens": found.tokens}
    return Notice(message=message, details={"preflight": details})
