"""What an adapter reaches in a mixture of experts: attention and shared layers, never routers or fused experts.

transformers 5 keeps a layer's experts in one 3-dimensional parameter, which is no linear layer. PEFT still finds a way
for some models: it reads ``all-linear``, ``gate_proj`` and the like as LoRA on those parameters (and on the router),
because their adapters of transformers 4 had them. No merge and no export takes such an adapter, so it is never made.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from peft import LoraConfig, get_peft_model
from transformers.pytorch_utils import Conv1D

from bp_runs.errors import TargetModulesError

ALL_LINEAR: Literal["all-linear"] = "all-linear"
_COUNT_NAMES = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts", "num_routed_experts")
_ONE_EXPERT = re.compile(r"\.experts\.\d+\.")


@dataclass(frozen=True, slots=True)
class Experts:
    """The parts of a mixture of experts, by full module or parameter names."""

    fused: tuple[str, ...] = ()
    """Parameters (experts, …, …) that hold all experts of a layer."""
    linear: tuple[str, ...] = ()
    """Linear layers of single experts."""
    routers: tuple[str, ...] = ()
    """Linear layers that choose experts; other routers carry no adapter anyway."""

    def __bool__(self) -> bool:
        return bool(self.fused or self.linear)


@dataclass(frozen=True, slots=True)
class Targets:
    """The layers that get an adapter."""

    modules: tuple[str, ...] | Literal["all-linear"]
    """As PEFT's ``target_modules``."""
    warnings: tuple[str, ...] = ()
    """What the user should know before training."""


def find_experts(model: Any) -> Experts:
    """The experts and routers of a transformers model; all empty if it has none. A meta model will do."""
    config = model.config.get_text_config(decoder=True)
    counts = {getattr(config, name, None) for name in _COUNT_NAMES} - {None, 0, 1}
    fused: list[str] = []
    linear: list[str] = []
    routers: list[str] = []
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            if _ONE_EXPERT.search(name):
                linear.append(name)
            elif module.out_features in counts and _is_router(name, module):
                routers.append(name)
        elif not isinstance(module, torch.nn.Conv1d):
            own = module.named_parameters(recurse=False)
            fused += [f"{name}.{key}" for key, value in own if value.dim() == 3 and value.shape[0] in counts]
    return Experts(tuple(fused), tuple(linear), tuple(routers)) if fused or linear else Experts()


def _is_router(name: str, module: Any) -> bool:
    """By the words that models use; ``gate_proj`` of a feed-forward layer is none."""
    words = {*name.lower().split(".")[-2:], type(module).__name__.lower()}
    return any("router" in word or word == "gate" for word in words)


def choose_targets(model: Any, target_modules: str) -> Targets:
    """The layers that ``target_modules`` means on ``model``.

    Args:
        model: A transformers model without an adapter; a meta model will do.
        target_modules: ``all-linear``, or names joined by commas.

    Raises:
        TargetModulesError: PEFT would adapt fused experts under one of the names.
    """
    wanted = [name.strip() for name in target_modules.split(",") if name.strip()]
    experts = find_experts(model)
    if not experts:
        return Targets(ALL_LINEAR if wanted == [ALL_LINEAR] else tuple(wanted))
    if wanted != [ALL_LINEAR]:
        _require_plain(model, wanted)
        return Targets(tuple(wanted))
    head = model.get_output_embeddings()
    linear = [
        name
        for name, module in model.named_modules()
        if isinstance(module, (torch.nn.Linear, Conv1D)) and module is not head and name not in experts.routers
    ]
    leaves = {name.rsplit(".", 1)[-1] for name in linear}
    redirected = {leaf for leaf in leaves if _is_redirected(model.config, leaf)}
    kept = tuple(name for name in linear if name.rsplit(".", 1)[-1] not in redirected)
    return Targets(kept, _warn(experts, sorted(leaves - redirected), sorted(redirected)))


def _warn(experts: Experts, adapted: Sequence[str], redirected: Sequence[str]) -> tuple[str, ...]:
    """The notices for ``all-linear``."""
    if experts.linear:
        count = f"each of the {len(experts.linear)} linear layers of its experts gets an adapter"
        fix = "To adapt the attention alone, set target_modules to q_proj,k_proj,v_proj,o_proj."
        return (f"The model is a mixture of experts: {count}, which not every export takes. {fix}",)
    also = f" PEFT can't adapt {', '.join(redirected)} on this kind of model." if redirected else ""
    return (
        f"The model is a mixture of experts: its experts and routers are not adapted, {', '.join(adapted)} are.{also}",
    )


def _require_plain(model: Any, names: Sequence[str]) -> None:
    for name in names:
        if _is_redirected(model.config, name):
            raise TargetModulesError(
                f"{name!r} can't be a target on a {model.config.model_type} model",
                cause="PEFT applies it to the fused experts, and no merge or export takes such an adapter",
                fix="Adapt the attention: {set:lora.target_modules=q_proj,k_proj,v_proj,o_proj}",
            )


def _is_redirected(config: Any, name: str) -> bool:
    """Whether PEFT reads the name of a linear layer as parameters of experts, tried on a model of that layer alone."""
    leaf = name.rsplit(".", 1)[-1]
    probe = torch.nn.Module()
    probe.config = config
    probe.add_module(leaf, torch.nn.Linear(1, 1))
    try:
        adapted = get_peft_model(probe, LoraConfig(r=1, target_modules=[leaf]))
    except ValueError:
        return True
    return not any(".lora_A." in name for name, _ in adapted.named_parameters())
