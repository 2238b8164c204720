"""Both forms of the AdamW update on the same numbers. Few imports: a process of its own runs this."""

import torch
from bitsandbytes.functional import create_dynamic_map

from bp_train_cuda.optim import adamw_update

COUNT = 10_007
"""Weights: no multiple of a block."""


def random_state(is_8bit: bool) -> adamw_update.Moments:
    if not is_8bit:
        return adamw_update.Moments(torch.zeros(COUNT), torch.zeros(COUNT))
    codes = [torch.full((COUNT,), zero, dtype=torch.uint8) for zero in (127, 0)]
    scales = (torch.zeros(-(-COUNT // 256)), torch.zeros(-(-COUNT // 256)))
    return adamw_update.Moments(*codes, scales, tuple(create_dynamic_map(signed=s) for s in (True, False)))


def gradients(step: int) -> torch.Tensor:
    """Over seven decades, with some that are not finite."""
    draw = torch.Generator().manual_seed(step)
    found = torch.randn(COUNT, generator=draw) * torch.logspace(-6, 1, COUNT)
    found[7::1000], found[8::1000] = torch.nan, -torch.inf
    return found.bfloat16()


def numbers(step: int, rate: float = 1e-3) -> adamw_update.Numbers:
    return adamw_update.read_numbers(
        betas=(0.9, 0.999), eps=1e-8, lr=rate, weight_decay=0.01, step=step, key=(-5 * step, 77)
    )


def compare_forms(*, is_8bit: bool) -> None:
    """In a process of its own, since Triton's interpreter for CPUs is chosen at import."""
    from bp_train_cuda.optim import adamw_triton

    one = torch.randn(COUNT, generator=torch.Generator().manual_seed(0)).bfloat16()
    other, first, second = one.clone(), random_state(is_8bit), random_state(is_8bit)
    for step in (1, 2, 3):
        adamw_update.update(one, gradients(step), first, numbers(step), 0)
        adamw_triton.update(other, gradients(step), second, numbers(step), 0)
        pairs = [(one, other), (first.first, second.first), (first.second, second.second)]
        for left, right in pairs + list(zip(first.scales or (), second.scales or (), strict=True)):
            assert torch.equal(left, right)
