"""Before the first step of a long run: the longest batch, an optimizer step, a validation, and room for the saves.

Runs that run out of memory do so late: at the longest examples, when the optimizer makes its state, at a validation, at
a save. A preflight meets all of it in the first minute and reports the peak. A rail puts weights, optimizer and
generators back afterwards, bit for bit.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from bp_data.loop.examples import find_longest
from bp_data.loop.loop import LoopParts
from bp_data.loop.sampler import split_evenly
from bp_runs.events import Notice
from bp_runs.files import require_free_space
from bp_runs.spec import TrainSpec

LONG_RUN = 50
"""Steps from which on a run on a GPU has a preflight by default."""


def is_due(spec: TrainSpec, *, on_gpu: bool) -> bool:
    """Whether the run has a preflight."""
    if spec.ranks is not None and spec.ranks.sharded:
        return False  # a rank that cannot continue would leave the others waiting
    if spec.checkpoint is not None:
        return False
    setting = spec.training.preflight
    return setting == "on" or (setting == "auto" and on_gpu and spec.training.planned_steps >= LONG_RUN)


def run_heaviest_moments(framework: Any, parts: LoopParts, accumulation: int) -> None:
    """What needs the most memory in a run: nothing else in it needs more.

    Args:
        framework: A `Framework` that is also an `ExampleFramework`.
        parts: Everything that the loop uses.
        accumulation: Micro-batches of a step; from the second on there are gradients already.

    Raises:
        OomExhaustedError: Not even a single example fits.
    """
    batch = find_longest(framework.examples.lengths(), parts.sampler.batch_size)
    _accumulate(framework, parts, batch, min(2, accumulation))
    parts.guard.retry(lambda: framework.update(0.0), "the optimizer step")
    _accumulate(framework, parts, batch, min(2, accumulation))  # once more, now that there is optimizer state
    framework.clear_gradients()
    if parts.validator is not None:
        heldout = framework.longest_heldout()
        parts.validator.measure_batches([(heldout, heldout)])


def _accumulate(framework: Any, parts: LoopParts, batch: Sequence[int], count: int) -> None:
    """Gradients of ``count`` micro-batches."""
    examples = framework.expand(batch)
    shared = framework.prepare(batch, batch)

    def run() -> None:
        for _ in range(count):
            for chunk in split_evenly(examples, parts.guard.chunks):
                framework.backward(chunk, 1.0, shared)

    parts.guard.split(run, len(examples), framework.clear_gradients)


def report(spec: TrainSpec, framework: Any, parts: LoopParts, *, save_bytes: int, peak: int, memory: int) -> None:
    """Check for room for the run's saves, and say what the preflight found.

    Args:
        spec: Names the run's folder and how many checkpoints it keeps.
        framework: As for `run_heaviest_moments`.
        parts: As for `run_heaviest_moments`.
        save_bytes: Of one checkpoint: trained weights and optimizer state.
        peak: Bytes of the GPU in use at most; 0 on a CPU.
        memory: Bytes of the GPU; 0 on a CPU.

    Raises:
        DiskFullError: The checkpoints would not fit the disk.
    """
    training = spec.training
    saves = training.keep_checkpoints + 1 if training.save_steps else 1  # one where the run is stopped
    what = "a checkpoint" if saves == 1 else f"{saves} checkpoints"
    require_free_space(spec.folders.run, saves * save_bytes, what)
    batch = find_longest(framework.examples.lengths(), parts.sampler.batch_size)
    found = framework.examples.collate(framework.expand(batch))
    rows, tokens = min(len(batch), found.rows), len(found.ids)  # packs are joined to one row; a pair has two
    usage = f"at most {peak / 2**30:.2f} of {memory / 2**30:.1f} GiB in use; " if memory else ""
    steps = "an optimizer step and a validation" if parts.validator is not None else "and an optimizer step"
    message = (
        f"preflight: ran the longest batch ({rows} × {tokens // rows} tokens), {steps}: "
        f"{usage}a checkpoint takes {save_bytes / 2**20:,.1f} MiB"
    )
    details = {"peak_bytes": peak, "save_bytes": save_bytes, "rows": rows, "tokens": tokens}
    parts.emit(Notice(message=message, details={"preflight": details}))
