"""bitsandbytes' AdamW with 8-bit state: no wait per weight, stochastic rounding, and steps that can be finished.

bfloat16 has 8 significant bits, so a change of less than 1/512 of a weight is rounded away, and AdamW's changes are
about the learning rate: at 2e-5 every weight above 0.01 would stay where it is. A change that is rounded up as often as
its size demands is right on average (stochastic rounding: Gupta et al., arXiv:1502.02551; for bfloat16 weights: Zamirai
et al., arXiv:2010.06192).
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Mapping
from typing import Any

import bitsandbytes as bnb
import torch

CHUNK = 2**24
"""Weights rounded at once: 192 MiB of scratch, at a time when there are no activations. A multiple of `_BLOCK`."""
_MOMENTS = ("state1", "state2")
_BLOCK = 256
"""Weights that share a scale in 8-bit state."""
_LOW_BITS = 16
"""What float32 has more than bfloat16, whose bits are its upper half."""
_UPPER = int(sys.byteorder == "little")
_LAST_NAN = 0x7FFF_0000
"""The largest bits to which a draw can be added; a GPU's NaN is 0x7FFFFFFF, and would come out as -0."""


class _Stochastic:
    """Goes before one of bitsandbytes' AdamW classes.

    Draws depend on the seed, the weight's place, its count of steps and the kind of GPU: resumed runs and several
    processes draw the same on GPUs of one kind. A weight that no update moves keeps its bits.
    """

    rounds_stochastically = True
    state: dict[torch.nn.Parameter, dict[str, Any]]
    param_groups: list[dict[str, Any]]

    def __init__(self, params: Any, *, seed: int, **options: Any) -> None:
        super().__init__(params, **options)  # type: ignore[call-arg]  # bitsandbytes' class comes next
        self._seed = seed
        self._updated: set[torch.nn.Parameter] = set()
        """Weights that the step in progress has updated."""

    @torch.no_grad()  # type: ignore[untyped-decorator]
    def step(self, closure: Any = None) -> Any:  # noqa: ARG002  # torch's schedulers pass none
        """One step over the weights that an interrupted call has not updated.

        bitsandbytes waits for the GPU after every weight; only paged state needs that, and once is enough.

        Raises:
            torch.OutOfMemoryError: Call it again once memory is free.
        """
        optimizer: Any = self
        is_on_gpu = False
        for gindex, group in enumerate(self.param_groups):
            for pindex, weight in enumerate(group["params"]):
                if weight.grad is None or weight in self._updated:
                    continue
                if not self.state[weight]:
                    self._init_whole(group, weight, gindex, pindex)
                optimizer.prefetch_state(weight)
                optimizer.update_step(group, weight, gindex, pindex)
                self._updated.add(weight)
                is_on_gpu |= weight.is_cuda
        if optimizer.is_paged and is_on_gpu:
            torch.cuda.synchronize()
        self._updated.clear()

    def _init_whole(self, group: dict[str, Any], weight: torch.nn.Parameter, gindex: int, pindex: int) -> None:
        """Make a weight's state, or none of it."""
        optimizer: Any = self
        try:
            optimizer.init_state(group, weight, gindex, pindex)
        except torch.OutOfMemoryError:
            self.state.pop(weight, None)
            raise

    def get_config(self, gindex: int, pindex: int, group: dict[str, Any]) -> dict[str, Any]:
        """Bitsandbytes' numbers for a weight; a group's own ``state_bits`` come before the optimizer's."""
        config: dict[str, Any] = super().get_config(gindex, pindex, group)  # type: ignore[misc]
        config["optim_bits"] = group.get("state_bits", config["optim_bits"])
        return config

    @torch.no_grad()  # type: ignore[untyped-decorator]
    def update_step(self, group: dict[str, Any], p: torch.nn.Parameter, gindex: int, pindex: int) -> None:
        """Update one weight: in float32, chunk by chunk, and rounded stochastically where it is bfloat16."""
        plain = super().update_step  # type: ignore[misc]
        state, size = self.state[p], min(p.numel(), CHUNK)
        has_own_norm = self.get_config(gindex, pindex, group)["max_unorm"] > 0
        if p.dtype != torch.bfloat16 or state["state1"].numel() != p.numel() or has_own_norm:
            plain(group, p, gindex, pindex)
            return
        p.data, p.grad = p.data.contiguous(), p.grad.contiguous()
        state |= {name: state[name].contiguous() for name in _MOMENTS if name in state}
        wide, slope = torch.empty(2, size, device=p.device)
        chance = torch.empty(size, dtype=torch.int32, device=p.device)
        draw = torch.Generator(p.device)
        before = state["step"]
        draw.manual_seed(_mix(self._seed, gindex, pindex, before))
        weights, slopes = p.data.view(-1), p.grad.view(-1)
        for start in range(0, p.numel(), size):
            here = slice(start, min(start + size, p.numel()))
            length = here.stop - here.start
            part = torch.nn.Parameter(wide[:length], requires_grad=False)
            part.data.copy_(weights[here])
            part.grad = slope[:length].copy_(slopes[here])
            self.state[part] = {**_share(state, here), "step": before}
            try:
                plain(group, part, gindex, pindex)
            finally:
                del self.state[part]
            bits = part.data.view(torch.int32).clamp_(max=_LAST_NAN)
            bits += chance[:length].random_(0, 2**_LOW_BITS, generator=draw)
            weights[here].view(torch.int16).copy_(bits.view(torch.int16)[_UPPER::2])
        state["step"] = before + 1


class AdamW8bitStochastic(_Stochastic, bnb.optim.AdamW8bit):  # type: ignore[misc]  # bitsandbytes is not typed
    """AdamW with 8-bit state."""


class PagedAdamW8bitStochastic(_Stochastic, bnb.optim.PagedAdamW8bit):  # type: ignore[misc]
    """AdamW with 8-bit state in memory that may move to system RAM."""

    def load_state_dict(self, state_dict: Any, move_to_device: bool = False) -> None:
        """Load saved state into paged memory; bitsandbytes would move it to the GPU: 6 GiB for a 3B model."""
        super().load_state_dict(state_dict, move_to_device=move_to_device)
        made: list[tuple[torch.Tensor, torch.Tensor]] = []
        for parameter, state in self.state.items():
            for name, value in state.items():
                if name in _MOMENTS:
                    state[name] = self.get_state_buffer(parameter, dtype=value.dtype)
                    made.append((state[name], value))
                elif torch.is_tensor(value):
                    state[name] = value.to(parameter.device)
        if torch.cuda.is_available():
            torch.cuda.synchronize()  # the buffers are being filled with zeros there
        for buffer, value in made:
            buffer.copy_(value)


def _mix(*numbers: int) -> int:
    """One seed from several numbers."""
    return int.from_bytes(hashlib.blake2b(repr(numbers).encode(), digest_size=7).digest(), "big")


def _share(state: Mapping[str, Any], here: slice) -> dict[str, Any]:
    """The state of some weights, and the scales of their blocks."""
    blocks = slice(here.start // _BLOCK, -(-here.stop // _BLOCK))
    found = dict(state)
    for name, value in state.items():
        if name.startswith("absmax"):
            found[name] = value[blocks]
        elif name in _MOMENTS:
            found[name] = value.view(-1)[here]
            for mark in ("is_paged", "page_deviceid"):  # without them bitsandbytes takes paged memory for the CPU's
                if hasattr(value, mark):
                    setattr(found[name], mark, getattr(value, mark))
    return found
