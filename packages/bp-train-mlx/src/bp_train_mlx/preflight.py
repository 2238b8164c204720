"""A preflight on mlx: the heaviest moments of a run, measured and undone; see `bp_data.loop.preflight`."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import mlx.core as mx

from bp_data.loop.loop import LoopParts
from bp_data.loop.preflight import report, run_heaviest_moments
from bp_runs.spec import TrainSpec
from bp_train_mlx.backend import Device
from bp_train_mlx.framework import MlxFramework


def run_preflight(spec: TrainSpec, parts: LoopParts, framework: MlxFramework, device: Device) -> None:
    """Run the heaviest moments of the run that is about to begin, report them, and check for room for its saves.

    Raises:
        OomExhaustedError: Not even a single example fits.
        DiskFullError: The checkpoints would not fit the disk.
    """
    assert framework.optimizer is not None  # noqa: S101
    with _unchanged(framework):
        framework.release_memory()
        mx.reset_peak_memory()
        run_heaviest_moments(framework, parts, spec.training.gradient_accumulation)
        peak, state = framework.peak_memory(), framework.optimizer.state_bytes
    trained = sum(weight.nbytes for weight in framework.copy_weights().values())
    report(spec, framework, parts, save_bytes=trained + state, peak=peak, memory=device.memory)


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
