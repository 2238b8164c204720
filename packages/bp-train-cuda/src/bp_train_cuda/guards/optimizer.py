"""An optimizer step that runs out of memory is finished: no parameter is left out, none is updated twice.

Also: an optimizer as it was before its first step.
"""

from __future__ import annotations

import sys
from types import MethodType
from typing import Any
from weakref import WeakKeyDictionary

import torch

from bp_runs.events import Emit
from bp_train_cuda.guards.oom import try_again

_updates: WeakKeyDictionary[torch.optim.Optimizer, int] = WeakKeyDictionary()
"""Steps that guarded optimizers have done: asking the GPU for it at each step would make the CPU wait."""


def guard_optimizer(optimizer: torch.optim.Optimizer, emit: Emit, *, enabled: bool = True) -> None:
    """Make ``optimizer.step`` go on after a lack of memory, as `bp_train_cuda.guards.oom.try_again`.

    The optimizer must count each parameter's updates under ``step`` in its state, and update a parameter in place once
    it has counted: so do torch's fused AdamW and the optimizers of bitsandbytes. Memory runs out where they make a
    parameter's moments, at its first step, or the next parameter's.
    """
    plain = type(optimizer).step

    def step(self: torch.optim.Optimizer, closure: Any = None) -> Any:
        done = _updates[self] if self in _updates else _count_updates(self)
        result = try_again(lambda: _step_rest(self, plain, done, closure), "the optimizer step", emit)
        _updates[self] = done + 1
        return result

    if enabled and "step" not in vars(optimizer):
        # A bound method, since torch's schedulers wrap what stands behind one.
        optimizer.step = MethodType(step, optimizer)


def forget_moments(optimizer: Any) -> None:
    """Set all that steps have left behind to what it is at the first one: zero.

    It is not thrown away: bitsandbytes never frees its paged memory.
    """
    _updates.pop(_raw(optimizer), None)
    for state in _raw(optimizer).state.values():
        for name, value in state.items():
            if not torch.is_tensor(value):
                state[name] = 0 if name == "step" else value
            elif getattr(value, "is_paged", False):
                from bitsandbytes import functional

                functional.fill(value, 0)  # on the GPU; torch takes paged memory for the CPU's
            elif not name.startswith("qmap"):  # tables of bitsandbytes, which steps only read
                value.zero_()


def count_moment_bytes(optimizer: Any) -> int:
    """Bytes that the optimizer keeps for its parameters."""
    tensors = (v for state in _raw(optimizer).state.values() for v in state.values() if torch.is_tensor(v))
    return sum(tensor.nbytes for tensor in {id(tensor): tensor for tensor in tensors}.values())


def release_model(model: Any) -> None:
    """Let bitsandbytes forget ``model``: its one registry of overrides would keep the embedding's memory for ever.

    transformers enters every embedding there when it makes an 8-bit optimizer, so that its moments stay in 32 bits. By
    a weight's place in the optimizer the override would also pass to the next model's.
    """
    if "bitsandbytes" not in sys.modules:
        return
    from bitsandbytes.optim import GlobalOptimManager

    registry: Any = GlobalOptimManager.get_instance()
    ours = {id(module) for module in model.modules()}
    kept = [entry for entry in registry.module_weight_config_triple if id(entry[0]) not in ours]
    registry.module_weight_config_triple[:] = kept
    registry.index2config.clear()
    for weight in model.parameters():
        registry.pid2config.pop(id(weight), None)


def _raw(optimizer: Any) -> torch.optim.Optimizer:
    """The optimizer inside Accelerate's."""
    raw: torch.optim.Optimizer = getattr(optimizer, "optimizer", optimizer)
    return raw


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
