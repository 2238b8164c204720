"""Kernels of others: Liger's fused norms, rotary positions and feed-forward part; torchao's products in 8-bit floats.

The loss needs none of them: `bp_train_cuda.model.log_probs` computes it in tiles, on any device and for every method,
so the full logits tensor is never allocated.
"""

from __future__ import annotations

import logging
from importlib.util import find_spec
from inspect import signature
from typing import Any, Literal

from torch import nn

from bp_train_cuda.backend import Device
from bp_train_cuda.errors import KernelsError

_MULTIPLE = 16  # float8 tensor cores take sides that it divides
Kernels = Literal["auto", "none", "liger"]


def apply_kernels(model: Any, wanted: Kernels, device: Device) -> str:
    """Put Liger's kernels into ``model``, before it gets an adapter; returns what was done, or why nothing."""
    why_not = "as set" if wanted == "none" else _find_obstacle(str(model.config.model_type), device)
    if why_not:
        return f"no fused kernels: {why_not}"
    from liger_kernel.transformers import monkey_patch

    apply = monkey_patch.MODEL_TYPE_TO_APPLY_LIGER_FN[model.config.model_type]
    known = signature(apply).parameters  # some models have only one of the two, or none
    apply(model=model, **{name: False for name in ("fused_linear_cross_entropy", "cross_entropy") if name in known})
    return "Liger's kernels for norms, positions and feed-forward"


def require_kernels(model_type: str, wanted: Kernels, device: Device) -> None:
    """Reject kernels that were requested and cannot be had, before anything is loaded.

    Raises:
        KernelsError: Why not.
    """
    why_not = _find_obstacle(model_type, device) if wanted == "liger" else ""
    if why_not:
        raise KernelsError(f"Liger's kernels cannot be used: {why_not}")


def _find_obstacle(model_type: str, device: Device) -> str:
    """Why they cannot be used; empty where they can."""
    if device.kind != "cuda":
        return "they need a GPU"
    for module, package in (("triton", "triton"), ("liger_kernel", "liger-kernel")):
        if find_spec(module) is None:
            return f"{package} is not installed"
    logging.getLogger("liger_kernel").setLevel(logging.ERROR)  # it warns of every back-end that it does not find
    from liger_kernel.transformers import monkey_patch

    known = model_type in monkey_patch.MODEL_TYPE_TO_APPLY_LIGER_FN
    return "" if known else f"Liger does not know {model_type} models"


def use_fp8(model: Any, *, emulate: bool = False) -> int:
    """Let the linear layers of ``model``, in place, multiply in float8; the output layer does not.

    Args:
        emulate: Compute in high precision what 8 bits would give, where no GPU does.

    Returns:
        How many layers were changed.
    """
    from torchao.float8 import Float8LinearConfig, convert_to_float8_training

    head = model.get_output_embeddings()
    changed = 0

    def takes(module: nn.Module, _: str) -> bool:
        nonlocal changed
        fits = isinstance(module, nn.Linear) and module is not head
        fits = fits and module.in_features % _MULTIPLE == 0 and module.out_features % _MULTIPLE == 0
        changed += fits
        return fits

    # A weight's gradient sums over the tokens of a batch, whose number 16 need not divide.
    config = Float8LinearConfig(emulate=emulate, pad_inner_dim=True)
    convert_to_float8_training(model, module_filter_fn=takes, config=config)
    return changed
