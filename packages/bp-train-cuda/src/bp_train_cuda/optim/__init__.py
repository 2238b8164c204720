"""Optimizers. All are AdamW and survive a step that runs out of memory: called again, they finish it.

`AdamW` is torch's fused one with optimizer state in 32 bits. adamw_8bit.py has bitsandbytes' with 8-bit state, plain or
paged; bfloat16 weights are updated by adamw_update.py, or its Triton form, and rounded stochastically.
"""

from __future__ import annotations

from typing import Any

import torch

from bp_runs.spec import TrainingSpec
from bp_train_cuda.backend import Device, Mode

_NORMS = ("norm", "bias")
BETAS, EPS = (0.9, 0.999), 1e-8


def choose_optimizer(training: TrainingSpec, mode: Mode, device: Device, *, is_sharded: bool = False) -> str:
    """``adamw_torch``, ``adamw_8bit`` or ``paged_adamw_8bit``: as set, else what the mode's memory needs.

    Sharded weights take torch's, since bitsandbytes does not know them.
    """
    if training.optim != "auto":
        return training.optim
    has_8bit = device.kind == "cuda" and not is_sharded
    return (
        {"qlora": "adamw_8bit", "full": "paged_adamw_8bit"}.get(mode.name, "adamw_torch") if has_8bit else "adamw_torch"
    )


def build_optimizer(name: str, model: Any, training: TrainingSpec) -> torch.optim.Optimizer:
    """The optimizer of that name over the model's trainable weights.

    Norms and biases have no weight decay, as in transformers. The state of embeddings stays in 32 bits, since their
    rows are updated so unevenly (Dettmers et al., arXiv:2110.02861).
    """
    groups = _group_weights(model, training.weight_decay)
    options = {"lr": training.resolved_learning_rate, "betas": BETAS, "eps": EPS}
    if name == "adamw_torch":
        return AdamW(groups, **options)
    from bp_train_cuda.optim import adamw_8bit

    kind = adamw_8bit.PagedAdamW8bitStochastic if name.startswith("paged") else adamw_8bit.AdamW8bitStochastic
    return kind(groups, seed=training.seed, **options)


def count_state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of the optimizer's state."""
    tensors = (v for state in optimizer.state.values() for v in state.values() if torch.is_tensor(v))
    return sum(tensor.nbytes for tensor in {id(tensor): tensor for tensor in tensors}.values())


def reset_state(optimizer: torch.optim.Optimizer) -> None:
    """Set the optimizer's state to what it is before the first step: zeros.

    It is not thrown away: bitsandbytes never frees its paged memory.
    """
    for state in optimizer.state.values():
        for name, value in state.items():
            if not torch.is_tensor(value):
                state[name] = 0 if name == "step" else value
            elif getattr(value, "is_paged", False):
                from bitsandbytes import functional

                functional.fill(value, 0)  # on the GPU; torch takes paged memory for the CPU's
            elif not name.startswith("qmap"):  # bitsandbytes' tables, which steps only read
                value.zero_()


def rounds_away(optimizer: torch.optim.Optimizer) -> bool:
    """Whether small updates of bfloat16 weights are lost to rounding."""
    if getattr(optimizer, "rounds_stochastically", False):
        return False
    return any(p.dtype == torch.bfloat16 for group in optimizer.param_groups for p in group["params"])


def _group_weights(model: Any, weight_decay: float) -> list[dict[str, Any]]:
    """Weights by whether they decay and how many bits their state needs at least; groups without weights left out."""
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, torch.nn.Embedding)}
    plain = {
        id(weight)
        for module in model.modules()
        if "norm" in type(module).__name__.lower()
        for weight in module.parameters(recurse=False)
    }
    groups: dict[tuple[bool, bool], dict[str, Any]] = {}
    for name, weight in model.named_parameters():
        if not weight.requires_grad:
            continue
        decays = id(weight) not in plain and not any(word in name.rsplit(".", 1)[-1].lower() for word in _NORMS)
        key = (decays, id(weight) in embeddings)
        group = groups.setdefault(key, {"params": [], "weight_decay": weight_decay if decays else 0.0})
        if key[1]:
            group["state_bits"] = 32
        group["params"].append(weight)
    return list(groups.values())


class AdamW(torch.optim.AdamW):  # type: ignore[misc]  # torch is not typed for a strict check
    """AdamW (Loshchilov and Hutter, arXiv:1711.05101), fused, that finishes an interrupted step when called again.

    Memory can run out only while the state of a weight is made, at its first step; the fused kernel updates in place.
    So what is left to do after a failure is known by counting updates per group: asking the device would make the host
    wait at every step.
    """

    param_groups: list[dict[str, Any]]

    def __init__(self, params: Any, **options: Any) -> None:
        super().__init__(params, fused=True, **options)
        self._updated: set[int] = set()
        """Groups that the step in progress has updated."""

    @torch.no_grad()  # type: ignore[untyped-decorator]
    def step(self, closure: Any = None) -> Any:
        """One step over the groups that an interrupted call has not updated; ``closure`` is not supported.

        Raises:
            torch.OutOfMemoryError: Call it again once memory is free.
        """
        everything: list[dict[str, Any]] = self.param_groups
        for number, group in enumerate(everything):
            if number in self._updated:
                continue
            self.param_groups = [group]
            try:
                super().step(closure)
            except torch.OutOfMemoryError:
                for weight in group["params"]:
                    if weight in self.state and "exp_avg_sq" not in self.state[weight]:
                        del self.state[weight]  # half made
                raise
            finally:
                self.param_groups = everything
            self._updated.add(number)
        self._updated.clear()
