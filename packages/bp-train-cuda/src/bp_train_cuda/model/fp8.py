"""Matrix products in 8-bit floats, by torchao: the weights stay in 16 bits, each product casts both sides."""

from __future__ import annotations

from typing import Any

from torch import nn

_MULTIPLE = 16  # the tensor cores take sides that it divides


def use_fp8(model: Any, *, emulate: bool = False) -> int:
    """Let the linear layers of ``model``, in place, multiply in float8; the output layer does not.

    Args:
        emulate: Compute in high precision what 8 bits would give, where no card does.

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
