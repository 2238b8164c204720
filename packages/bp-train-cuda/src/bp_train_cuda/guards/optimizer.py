"""An optimizer step that runs out of memory is finished: no parameter is left out, none is updated twice.

Also: an optimizer as it was before its first step, and moments that lie where they lay before a resumption.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from types import MethodType
from typing import Any
from weakref import WeakKeyDictionary

import torch

from bp_runs.events import Emit
from bp_train_cuda.guards.oom import try_again

Updates = dict[torch.nn.Parameter, int]

_updates: WeakKeyDictionary[torch.optim.Optimizer, Updates] = WeakKeyDictionary()
"""How often guarded optimizers have updated each parameter: asking the GPU at each step would make the CPU wait."""


def guard_optimizer(optimizer: torch.optim.Optimizer, emit: Emit, *, enabled: bool = True) -> None:
    """Make ``optimizer.step`` go on after a lack of memory, as `bp_train_cuda.guards.oom.try_again`.

    For optimizers that count each parameter's updates under ``step`` in its state and update it in place, without a
    need of memory, once they have counted: torch's fused AdamW and those of bitsandbytes. Memory runs out where they
    make a parameter's moments, at its first step, or the next parameter's. Others, which may have changed the moments
    and not yet the weight, are left as they are: a lack of memory ends their step.
    """
    plain = type(optimizer).step

    def step(self: torch.optim.Optimizer, closure: Any = None) -> Any:
        if self not in _updates:
            _updates[self] = _read_all_updates(self)
        before = _updates[self]
        updated = [p for p in _parameters(self) if p.grad is not None]
        result = try_again(lambda: _step_rest(self, plain, before, closure), "the optimizer step", emit)
        for parameter in updated:
            before[parameter] += 1
        return result

    if enabled and "step" not in vars(optimizer) and _updates_in_place(optimizer):
        # A bound method, since torch's schedulers wrap what stands behind one.
        optimizer.step = MethodType(step, optimizer)


def keep_paged(optimizer: torch.optim.Optimizer) -> None:
    """Make ``optimizer.load_state_dict`` put moments where the optimizer itself makes them.

    bitsandbytes moves what it loads to the GPU, paged moments too: those of a fully trained 3B model take 6 GiB there.
    """
    if getattr(optimizer, "is_paged", False):
        optimizer.load_state_dict = MethodType(_load_paged, optimizer)


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


def _load_paged(self: Any, state_dict: Any) -> None:
    type(self).load_state_dict(self, state_dict, move_to_device=False)
    made: list[tuple[torch.Tensor, torch.Tensor]] = []
    for parameter, state in self.state.items():
        for name, value in state.items():
            if name in ("state1", "state2"):
                state[name] = self.get_state_buffer(parameter, dtype=value.dtype)
                made.append((state[name], value))
            elif torch.is_tensor(value):
                state[name] = value.to(parameter.device)
    if torch.cuda.is_available():
        torch.cuda.synchronize()  # the buffers are being filled with zeros there
    for buffer, value in made:
        buffer.copy_(value)


def _updates_in_place(optimizer: torch.optim.Optimizer) -> bool:
    is_fused = all(group.get("fused") for group in optimizer.param_groups)
    return is_fused or type(optimizer).__module__.startswith("bitsandbytes.")


def _step_rest(optimizer: torch.optim.Optimizer, plain: Any, before: Updates, closure: Any) -> Any:
    """One step over the parameters that have had no more than ``before``; where it fails it leaves a clean state."""
    try:
        return plain(optimizer, closure)
    except torch.OutOfMemoryError:
        for parameter in _parameters(optimizer):
            updates = _read_updates(optimizer, parameter)
            if updates > before[parameter]:
                parameter.grad = None  # has had this step; optimizers pass over what has no gradient
            elif updates == 0 and not _has_moments(optimizer.state.get(parameter, {})):
                optimizer.state.pop(parameter, None)  # half made
        raise


def _has_moments(state: Mapping[str, Any]) -> bool:
    """Whether all was made that a first step makes; paged moments that are thrown away stay in memory for ever."""
    if "exp_avg_sq" in state:
        return True
    return "state2" in state and (state["state2"].dtype != torch.uint8 or "absmax2" in state)


def _read_all_updates(optimizer: torch.optim.Optimizer) -> Updates:
    return {parameter: _read_updates(optimizer, parameter) for parameter in _parameters(optimizer)}


def _read_updates(optimizer: torch.optim.Optimizer, parameter: torch.nn.Parameter) -> int:
    return int(optimizer.state[parameter].get("step", 0)) if parameter in optimizer.state else 0


def _parameters(optimizer: torch.optim.Optimizer) -> list[torch.nn.Parameter]:
    return [p for group in optimizer.param_groups for p in group["params"]]
