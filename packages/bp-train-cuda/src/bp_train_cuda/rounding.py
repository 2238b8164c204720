"""Weights in bfloat16 that lose no small update: it is computed in float32 and rounded up or down by chance.

bfloat16 keeps 8 significant bits, so a change of less than 1/512 of a weight is rounded away, and AdamW's changes are
about the learning rate: at 2e-5 every weight above 0.01 would stay where it is. A change that is rounded up as often as
its size asks for is right in the mean (stochastic rounding: Gupta et al., arXiv:1502.02551; for weights in bfloat16:
Zamirai et al., arXiv:2010.06192).
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Mapping
from types import MethodType
from typing import Any

import torch

_PIECE = 2**24
"""Weights at once: 192 MiB of scratch, at a time when no activations are there. A multiple of `_BLOCK`."""
_MOMENTS = ("state1", "state2")
_BLOCK = 256
"""Weights that share a scale in 8-bit moments."""
_LOW_BITS = 16
"""What float32 has more than bfloat16, whose bits are its upper half."""
_UPPER = int(sys.byteorder == "little")
_LAST_NAN = 0x7FFF_0000
"""The largest bits to which a draw can be added; a GPU's NaN is 0x7FFFFFFF, and would come out as -0."""


def round_by_chance(optimizer: torch.optim.Optimizer, seed: int) -> bool:
    """Make an AdamW of bitsandbytes round the updates of bfloat16 weights by chance; others are left as they are.

    Draws depend on the seed, the weight's place, its count of steps and the kind of GPU: runs that go on, and several
    processes, draw the same on GPUs of one kind. A weight that no update moves keeps its bits.

    Args:
        optimizer: Changed in place.
        seed: Of the run.

    Returns:
        Whether small updates are kept: the optimizer does so now, or no weight is in bfloat16.
    """
    plain = getattr(type(optimizer), "update_step", None)
    if plain is None or not type(optimizer).__module__.startswith("bitsandbytes."):
        return all(p.dtype != torch.bfloat16 for group in optimizer.param_groups for p in group["params"])

    @torch.no_grad()  # type: ignore[untyped-decorator]
    def update(self: Any, group: dict[str, Any], p: torch.nn.Parameter, gindex: int, pindex: int) -> None:
        state, size = self.state[p], min(p.numel(), _PIECE)
        if (
            p.dtype != torch.bfloat16
            or state["state1"].numel() != p.numel()
            or self.get_config(gindex, pindex, group)["max_unorm"] > 0
        ):
            plain(self, group, p, gindex, pindex)
            return
        p.data, p.grad = p.data.contiguous(), p.grad.contiguous()
        state |= {name: state[name].contiguous() for name in _MOMENTS if name in state}
        wide, slope = torch.empty(2, size, device=p.device)
        chance = torch.empty(size, dtype=torch.int32, device=p.device)
        draw = torch.Generator(p.device)
        before = state["step"]
        draw.manual_seed(_mix(seed, gindex, pindex, before))
        state["step"] = before + 1  # counted once nothing more is allocated: see guards.optimizer
        weights, slopes = p.data.view(-1), p.grad.view(-1)
        for start in range(0, p.numel(), size):
            here = slice(start, min(start + size, p.numel()))
            length = here.stop - here.start
            part = torch.nn.Parameter(wide[:length], requires_grad=False)
            part.data.copy_(weights[here])
            part.grad = slope[:length].copy_(slopes[here])
            self.state[part] = {**_share(state, here), "step": before}
            try:
                plain(self, group, part, gindex, pindex)
            finally:
                del self.state[part]
            bits = part.data.view(torch.int32).clamp_(max=_LAST_NAN)
            bits += chance[:length].random_(0, 2**_LOW_BITS, generator=draw)
            weights[here].view(torch.int16).copy_(bits.view(torch.int16)[_UPPER::2])

    optimizer.update_step = MethodType(update, optimizer)
    return True


def _mix(*numbers: int) -> int:
    """A seed of several numbers."""
    return int.from_bytes(hashlib.blake2b(repr(numbers).encode(), digest_size=7).digest(), "big")


def _share(state: Mapping[str, Any], here: slice) -> dict[str, Any]:
    """The moments of some weights, and the scales of their blocks."""
    blocks = slice(here.start // _BLOCK, -(-here.stop // _BLOCK))
    found = dict(state)
    for name, value in state.items():
        if name.startswith("absmax"):
            found[name] = value[blocks]
        elif name in _MOMENTS:
            found[name] = value.view(-1)[here]
            for mark in ("is_paged", "page_deviceid"):  # of bitsandbytes, which takes paged memory for the CPU's else
                if hasattr(value, mark):
                    setattr(found[name], mark, getattr(value, mark))
    return found
