"""Before the first step of a long run: the longest batch, an optimizer step, a validation, and room for the saves.

It reports the peak and leaves nothing behind: weights, optimizer and dropout's draws are bit for bit what they were.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import mlx.core as mx

from bp_data.loop.examples import find_longest
from bp_data.loop.loop import LoopParts
from bp_data.loop.sampler import split_evenly
from bp_runs.events import Notice
from bp_runs.files import require_free_space
from bp_runs.spec import TrainSpec
from bp_train_mlx.backend import Device
from bp_train_mlx.framework import MlxFramework

LONG_RUN = 50
"""Steps from which on a run on a GPU has a preflight by default."""


def is_due(spec: TrainSpec, device: Device) -> bool:
    """Whether the run has a preflight."""
    if spec.checkpoint is not None:
        return False
    setting = spec.training.preflight
    return setting == "on" or (setting == "auto" and device.is_gpu and spec.training.planned_steps >= LONG_RUN)


def run_preflight(spec: TrainSpec, parts: LoopParts, framework: MlxFramework, device: Device) -> None:
    """Run the heaviest moments of the run that is about to begin, report them, and check for room for its saves.

    Raises:
        OomExhaustedError: Not even a single example fits.
        DiskFullError: The checkpoints would not fit the disk.
    """
    training = spec.training
    batch = find_longest(framework.examples.lengths(), training.batch_size)
    assert framework.optimizer is not None  # noqa: S101
    with _unchanged(framework):
        framework.release_memory()
        mx.reset_peak_memory()
        _accumulate(framework, parts, batch, min(2, training.gradient_accumulation))
        parts.guard.retry(lambda: framework.update(0.0), "the optimizer step")
        if parts.validator is not None:
            heldout = framework.longest_heldout()
            parts.validator.measure_batches([(heldout, heldout)])
        peak = framework.peak_memory()
    trained = sum(weight.nbytes for weight in framework.copy_weights().values())
    size = trained + framework.optimizer.state_bytes
    saves = training.keep_checkpoints + 1 if training.save_steps else 1  # one where the run is stopped
    require_free_space(spec.folders.run, saves * size, "a checkpoint" if saves == 1 else f"{saves} checkpoints")
    found = framework.examples.collate(framework.expand(batch))
    steps = "an optimizer step and a validation" if parts.validator is not None else "and an optimizer step"
    message = (
        f"preflight: ran the longest batch ({found.rows} × {found.width} tokens), {steps}: at most "
        f"{peak / 2**30:.2f} of {device.memory / 2**30:.1f} GiB in use; a checkpoint takes {size / 2**20:,.1f} MiB"
    )
    details = {"peak_bytes": peak, "save_bytes": size, "rows": found.rows, "tokens": len(found.ids)}
    parts.emit(Notice(message=message, details={"preflight": details}))


def _accumulate(framework: MlxFramework, parts: LoopParts, batch: Sequence[int], count: int) -> None:
    """Gradients of ``count`` micro-batches."""
    examples = framework.expand(batch)
    shared = framework.prepare(batch, batch)

    def run() -> None:
        for _ in range(count):
            for chunk in split_evenly(examples, parts.guard.chunks):
                framework.backward(chunk, 1.0, shared)

    parts.guard.split(run, len(examples), framework.clear_gradients)


@contextlib.contextmanager
def _unchanged(framework: MlxFramework) -> Iterator[None]:
    """Put back what a step changes."""
    weights, draws = framework.copy_weights(), framework.random_state()
    try:
        yield
    finally:
        framework.load_weights(weights)
        framework.clear_gradients()
        assert framework.optimizer is not None  # noqa: S101
        framework.optimizer.reset()
        framework.set_random_state(draws)
