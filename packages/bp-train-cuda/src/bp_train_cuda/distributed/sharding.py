"""Sharding by FSDP2: each rank holds a shard of every layer and gathers a layer while it computes.

In full fine-tuning, parameters, gradients and optimizer state are sharded, in float32; products are computed in the
base's dtype. An adapter is small and stays unsharded; only its base is sharded. FSDP2 gathers inside forward and
backward, so all ranks must run as many chunks: a micro-batch that does not fit is not split.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor

from bp_train_cuda.model.lora import trainable_weights


def shard_model(root: Any, model: Any, base: Any, kind: str) -> None:
    """Shard the weights of ``base`` among the ranks, layer by layer and in place; FSDP2 moves each to its device first.

    Args:
        model: What is trained: ``base`` itself, or ``base`` with an adapter.
        base: The transformers model, on the CPU where one device has no room for it.
        kind: ``cuda`` or ``cpu``.
    """
    is_full, compute = model is base, base.dtype
    adapter = set() if is_full else set(trainable_weights(model).values())
    low = is_full and compute != torch.float32
    shared: dict[str, Any] = {
        "mesh": init_device_mesh(kind, (dist.get_world_size(),)),
        "mp_policy": MixedPrecisionPolicy(compute, torch.float32) if low else MixedPrecisionPolicy(),
        "ignored_params": adapter,
    }
    # Layers before the root: what an inner call has wrapped is gathered by itself, and the root takes the rest.
    for part in [*_find_layers(base), root]:
        if is_full:
            # For the optimizer. Layer by layer, so that only one layer at a time is unsharded in float32.
            part.float()
        fully_shard(part, **shared)
    # Hooks gather around forward alone, so generate would meet sharded embeddings.
    register_fsdp_forward_method(root, "generate")


def _find_layers(base: Any) -> list[Any]:
    """The decoder's layers: its longest list of modules."""
    lists = [list(module) for module in base.modules() if isinstance(module, torch.nn.ModuleList)]
    return max(lists, key=len)


def scale_gradients_to_sum(weights: Iterable[torch.Tensor]) -> None:
    """Multiply FSDP2's means over the ranks up to sums: each rank's loss is already its part of the step's."""
    for weight in weights:
        if weight.grad is not None:
            local_shard(weight.grad).mul_(dist.get_world_size())


def is_sharded_weight(weight: torch.Tensor) -> bool:
    """Whether this rank holds only a shard of ``weight``."""
    return isinstance(weight, DTensor)


def local_shard(weight: torch.Tensor) -> torch.Tensor:
    """The shard of a weight that this rank holds, or all of an unsharded one; the same memory."""
    local: torch.Tensor = weight.to_local() if isinstance(weight, DTensor) else weight
    return local


def local_weights(model: Any) -> dict[str, torch.Tensor]:
    """As `bp_train_cuda.model.lora.trainable_weights`, this rank's shards."""
    reshard(model)
    return {name: local_shard(weight) for name, weight in trainable_weights(model).items()}


def gather_weights(model: Any, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """The unsharded weights, in ``dtype`` on the CPU; all ranks must call it, and only rank 0 gets them."""
    reshard(model)
    keeps, found = dist.get_rank() == 0, {}
    names = {name for name, _ in model.named_parameters(remove_duplicate=False)}  # tied ones are joined once
    buffers = {name: buffer for name, buffer in model.state_dict().items() if name not in names}
    for name, weight in [*model.named_parameters(), *buffers.items()]:
        # A collective: all ranks gather all weights in the same order, one at a time, though one rank keeps them.
        whole = weight.full_tensor() if isinstance(weight, DTensor) else weight
        if keeps:
            found[name] = whole.detach().to("cpu", dtype if whole.is_floating_point() else whole.dtype)
    return found


def reshard(model: Any) -> None:
    """A forward pass without gradients leaves what is outside the layers gathered, and its shards hidden."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def full_norm(norm: Any) -> Any:
    """The norm of sharded gradients as one number on all ranks; all must call it."""
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


def local_optimizer_state(state: Mapping[str, Any]) -> dict[str, Any]:
    """An optimizer's state with this rank's shards, to be saved."""
    shards = {
        place: {name: local_shard(value) if torch.is_tensor(value) else value for name, value in values.items()}
        for place, values in state["state"].items()
    }
    return {**state, "state": shards}


def shard_optimizer_state(optimizer: torch.optim.Optimizer) -> None:
    """Undo `local_optimizer_state` in an optimizer that has loaded it."""
    for weight, values in optimizer.state.items():
        if not isinstance(weight, DTensor):
            continue
        for name, value in values.items():
            if torch.is_tensor(value) and not isinstance(value, DTensor) and value.shape == weight.to_local().shape:
                # With the shape, since the last shard may be shorter than the others and the total can't be guessed.
                values[name] = DTensor.from_local(
                    value, weight.device_mesh, weight.placements, shape=weight.shape, stride=weight.stride()
                )
