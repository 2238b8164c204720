"""What an adapter reaches in a mixture of experts: attention and shared layers, and by name experts and routers.

transformers 5 keeps a layer's experts in two 3-dimensional parameters, which are no linear layers. The names `EXPERTS`
and `ROUTER` among the targets put LoRA on those parameters (PEFT's ``target_parameters``). PEFT also reads
``all-linear``, ``gate_proj`` and the like so for some models, because their adapters of transformers 4 had them; that
is never left to it.
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
from bp_train_cuda.memory.estimate import EXPERTS

ALL_LINEAR: Literal["all-linear"] = "all-linear"
ROUTER = "router"
PRESETS = (EXPERTS, ROUTER)
"""Targets that are no names of layers."""
MERGEABLE = ("qwen3_moe", "qwen2_moe", "mixtral", "olmoe", "gpt_oss")
"""Kinds of models whose fused experts can be adapted."""
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
    """Linear layers that choose experts."""
    router_weights: tuple[str, ...] = ()
    """Parameters (experts, width) of routers that are no linear layers."""

    def __bool__(self) -> bool:
        return bool(self.fused or self.linear)


@dataclass(frozen=True, slots=True)
class Targets:
    """The layers that get an adapter."""

    modules: tuple[str, ...] | Literal["all-linear"]
    """As PEFT's ``target_modules``."""
    parameters: tuple[str, ...] = ()
    """As PEFT's ``target_parameters``: last parts of names."""
    warnings: tuple[str, ...] = ()
    """What the user should know before training."""


def find_experts(model: Any) -> Experts:
    """The experts and routers of a transformers model; all empty if it has none. A meta model will do."""
    config = model.config.get_text_config(decoder=True)
    counts = {getattr(config, name, None) for name in _COUNT_NAMES} - {None, 0, 1}
    fused: list[str] = []
    linear: list[str] = []
    routers: list[str] = []
    weights: list[str] = []
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            if _ONE_EXPERT.search(name):
                linear.append(name)
            elif module.out_features in counts and _is_router(name, module):
                routers.append(name)
        elif not isinstance(module, torch.nn.Conv1d):
            own = dict(module.named_parameters(recurse=False))
            fused += [f"{name}.{key}" for key, value in own.items() if value.dim() == 3 and value.shape[0] in counts]
            found = own.get("weight")
            if found is not None and found.dim() == 2 and found.shape[0] in counts and _is_router(name, module):
                weights.append(f"{name}.weight")
    if not (fused or linear):
        return Experts()
    return Experts(tuple(fused), tuple(linear), tuple(routers), tuple(weights))


def _is_router(name: str, module: Any) -> bool:
    """By the words that models use; ``gate_proj`` of a feed-forward layer is none."""
    words = {*name.lower().split(".")[-2:], type(module).__name__.lower()}
    return any("router" in word or word == "gate" for word in words)


def choose_targets(model: Any, target_modules: str) -> Targets:
    """The layers that ``target_modules`` means on ``model``.

    Args:
        model: A transformers model without an adapter; a meta model will do.
        target_modules: ``all-linear``, or names joined by commas; `PRESETS` may stand among them.

    Raises:
        TargetModulesError: PEFT would adapt fused experts under one of the names; or there are no experts, or of a form
            that cannot be merged.
    """
    every = [name.strip() for name in target_modules.split(",") if name.strip()]
    wanted = [name for name in every if name not in PRESETS]
    presets = [name for name in PRESETS if name in every]
    experts = find_experts(model)
    if not experts:
        if presets:
            raise TargetModulesError(f"{presets[0]!r} means a mixture of experts, and this model is none")
        return Targets(ALL_LINEAR if wanted == [ALL_LINEAR] else tuple(wanted))
    modules, parameters = _choose_presets(model, experts, presets)
    if wanted != [ALL_LINEAR]:
        _require_plain(model, wanted)
        return Targets((*wanted, *modules), parameters)
    linear = _choose_linear(model, experts)
    warnings = () if presets else linear.warnings
    return Targets((*linear.modules, *(name for name in modules if name not in linear.modules)), parameters, warnings)


def _choose_presets(model: Any, experts: Experts, presets: Sequence[str]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Modules and parameters that the presets mean."""
    modules: list[str] = []
    parameters: list[str] = []
    if EXPERTS in presets:
        _require_mergeable(model, experts)
        modules += experts.linear
        parameters += experts.fused
    if ROUTER in presets:
        modules += experts.routers
        parameters += experts.router_weights
    # PEFT finds a parameter by the end of its name.
    return tuple(modules), tuple(sorted({".".join(name.split(".")[-3:]) for name in parameters}))


def _require_mergeable(model: Any, experts: Experts) -> None:
    """Only models whose checkpoints' experts bp-merge knows."""
    kind = model.config.get_text_config(decoder=True).model_type
    if experts.fused and kind not in MERGEABLE:
        raise TargetModulesError(
            f"the experts of a {kind} model can't be adapted",
            cause=f"no merge or export knows the form of their weights; those of {', '.join(MERGEABLE)} are known",
            fix="Adapt the other layers: {set:lora.target_modules=all-linear}",
        )


def _choose_linear(model: Any, experts: Experts) -> Targets:
    """What ``all-linear`` means on a mixture of experts."""
    head = model.get_output_embeddings()
    linear = [
        name
        for name, module in model.named_modules()
        if isinstance(module, (torch.nn.Linear, Conv1D)) and module is not head and name not in experts.routers
    ]
    leaves = {name.rsplit(".", 1)[-1] for name in linear}
    redirected = {leaf for leaf in leaves if _is_redirected(model.config, leaf)}
    kept = tuple(name for name in linear if name.rsplit(".", 1)[-1] not in redirected)
    return Targets(kept, (), _warn(experts, sorted(leaves - redirected), sorted(redirected)))


def _warn(experts: Experts, adapted: Sequence[str], redirected: Sequence[str]) -> tuple[str, ...]:
    """The notices for ``all-linear``."""
    if experts.linear:
        count = f"each of the {len(experts.linear)} linear layers of its experts gets an adapter"
        fix = "To adapt the attention alone, set target_modules to q_proj,k_proj,v_proj,o_proj."
        return (f"The model is a mixture of experts: {count}, which not every export takes. {fix}",)
    more = "To adapt those too, set target_modules to all-linear,experts,router."
    also = f" PEFT can't adapt {', '.join(redirected)} on this kind of model." if redirected else ""
    words = f"its experts and routers are not adapted, {', '.join(adapted)} are"
    return (f"The model is a mixture of experts: {words}.{also} {more}",)


def _require_plain(model: Any, names: Sequence[str]) -> None:
    for name in names:
        if _is_redirected(model.config, name):
            raise TargetModulesError(
                f"{name!r} can't be a target on a {model.config.model_type} model",
                cause="PEFT would apply it to the fused experts",
                fix="Adapt the attention: {set:lora.target_modules=q_proj,k_proj,v_proj,o_proj}; experts have a name "
                "of their own: {set:lora.target_modules=q_proj,k_proj,v_proj,o_proj,experts}",
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
