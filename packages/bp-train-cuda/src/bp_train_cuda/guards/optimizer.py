"""An optimizer step that runs out of memory is finished: no parameter is left out, none is updated twice."""

from __future__ import annotations

from types import MethodType
from typing import Any

import torch

from bp_runs.events import Emit
from bp_train_cuda.guards.oom import try_again


def guard_optimizer(optimizer: torch.optim.Optimizer, emit: Emit, *, enabled: bool = True) -> None:
    """Make ``optimizer.step`` go on after a lack of memory, as `bp_train_cuda.guards.oom.try_again`.

    The optimizer must count each parameter's updates under ``step`` in its state, and update a parameter in place once
    it has counted: so do torch's fused AdamW and the optimizers of bitsandbytes. Memory runs out where they make a
    parameter's moments, at its first step, or the next parameter's.
    """
    plain = type(optimizer).step
    done: int | None = None

    def step(self: torch.optim.Optimizer, closure: Any = None) -> Any:
        nonlocal done
        if done is None:
            done = _count_updates(self)
        result = try_again(lambda: _step_rest(self, plain, done or 0, closure), "the optimizer step", emit)
        done += 1
        return result

    if enabled:
        # A bound method, since torch's schedulers wrap what stands behind one.
        optimizer.step = MethodType(step, optimizer)


def _step_rest(optimizer: torch.optim.Optimizer, plain: Any, done: int, closure: Any) -> Any:
    """One step over the parameters that have no more than ``done`` updates; where it fails it leaves a clean state."""
    try:
        return plain(optimizer, closure)
    except torch.OutOfMemoryError:
        for parameter in _parameters(optimizer):
            updates = _read_updates(optimizer, parameter)
            if updates > done:
                parameter.grad = None  # has had this step; optimizers pass over what has no gradient
            elif updates == 0:
                optimizer.state.pop(parameter, None)  # moments may be half made
        raise


def _count_updates(optimizer: torch.optim.Optimizer) -> int:
    return max((_read_updates(optimizer, p) for p in _parameters(optimizer)), default=0)


def _read_updates(optimizer: torch.optim.Optimizer, parameter: torch.nn.Parameter) -> int:
    return int(optimizer.state[parameter].get("step", 0)) if parameter in optimizer.state else 0


def _parameters(optimizer: torch.optim.Optimizer) -> list[torch.nn.Parameter]:
    return [p for group in optimizer.param_groups for p in group["params"]]
