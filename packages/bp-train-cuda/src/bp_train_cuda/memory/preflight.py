"""A preflight on torch: the heaviest moments of a run, measured and undone; see `bp_data.loop.preflight`."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator

import torch

from bp_data.loop.loop import LoopParts
from bp_data.loop.preflight import report, run_heaviest_moments
from bp_runs.spec import TrainSpec
from bp_train_cuda.engines.framework import TorchFramework
from bp_train_cuda.optim import count_state_bytes, reset_state


def run_preflight(spec: TrainSpec, parts: LoopParts, framework: TorchFramework) -> None:
    """Run the heaviest moments of the run that is about to begin, report them, and check for room for its saves.

    Raises:
        OomExhaustedError: Not even a single example fits.
        DiskFullError: The checkpoints would not fit the disk.
    """
    on_gpu = framework.device.type == "cuda"
    assert framework.optimizer is not None  # noqa: S101
    with _unchanged(framework):
        framework.release_memory()
        if on_gpu:
            torch.cuda.reset_peak_memory_stats()
        run_heaviest_moments(framework, parts, spec.training.gradient_accumulation)
        state = count_state_bytes(framework.optimizer)
        peak = torch.cuda.max_memory_allocated() if on_gpu else 0
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    trained = sum(weight.nbytes for weight in framework.own_weights().values())
    memory = torch.cuda.get_device_properties(0).total_memory if on_gpu else 0
    report(spec, framework, parts, save_bytes=trained + state, peak=peak, memory=memory)


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
