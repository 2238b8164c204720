"""bitsandbytes' AdamW with 8-bit state: no wait per weight, stochastic rounding, and steps that can be finished.

bitsandbytes makes and holds the state; `bp_train_cuda.optim.adamw_update` updates bfloat16 weights with it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import bitsandbytes as bnb
import torch

from bp_train_cuda.optim import adamw_update
from bp_train_cuda.optim.adamw_update import Moments, Numbers, read_numbers

_MOMENTS = ("state1", "state2")

_Update = Callable[[torch.Tensor, torch.Tensor, Moments, Numbers, int], None]
"""Of weights (n,) bfloat16 and gradients (n,) in place, with their state; the place of the first draw."""


def _choose_update(weight: torch.Tensor) -> tuple[_Update, int]:
    """The update for a weight's device, and how many weights it takes at a time."""
    if weight.is_cuda and find_spec("triton") is not None:
        from bp_train_cuda.optim import adamw_triton

        return adamw_triton.update, weight.numel()  # no scratch, so nothing to divide
    return adamw_update.update, adamw_update.CHUNK


class _Stochastic:
    """Goes before one of bitsandbytes' AdamW classes.

    Draws depend on the seed, the weight's place and its count of steps alone: resumed runs and several processes draw
    the same on every device. A weight that no update moves keeps its bits.
    """

    rounds_stochastically = True
    state: dict[torch.nn.Parameter, dict[str, Any]]
    param_groups: list[dict[str, Any]]

    def __init__(self, params: Any, *, seed: int, **options: Any) -> None:
        super().__init__(params, **options)  # type: ignore[call-arg]  # bitsandbytes' class comes next
        self._seed = seed
        self._updated: set[torch.nn.Parameter] = set()
        """Weights that the step in progress has updated."""
        self._next = 0
        """In the weight after them, how many of its elements are updated."""

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
        """Update one weight; bfloat16 ones in float32 and rounded stochastically, others as bitsandbytes does."""
        if p.dtype != torch.bfloat16:
            super().update_step(group, p, gindex, pindex)  # type: ignore[misc]
            return
        p.data, p.grad = p.data.contiguous(), p.grad.contiguous()
        state, config = self.state[p], self.get_config(gindex, pindex, group)
        state |= {name: state[name].contiguous() for name in _MOMENTS}  # made like the weight, maybe by columns
        numbers = read_numbers(
            betas=config["betas"], eps=config["eps"], lr=config["lr"], weight_decay=config["weight_decay"],
            step=state["step"] + 1, key=_mix(self._seed, gindex, pindex, state["step"]),
        )  # fmt: skip
        update, size = _choose_update(p)
        weights, slopes, moments = p.data.view(-1), p.grad.view(-1), _read_moments(state)
        while self._next < p.numel():  # not from 0 where an interrupted call has done some
            here = slice(self._next, min(self._next + size, p.numel()))
            update(weights[here], slopes[here], moments.slice(here), numbers, here.start)
            self._next = here.stop
        self._next = 0
        state["step"] += 1


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


def _mix(*numbers: int) -> tuple[int, int]:
    """Two signed 32-bit keys from several numbers."""
    digest = hashlib.blake2b(repr(numbers).encode(), digest_size=8).digest()
    return int.from_bytes(digest[:4], "big", signed=True), int.from_bytes(digest[4:], "big", signed=True)


def _read_moments(state: dict[str, Any]) -> Moments:
    """The parts of bitsandbytes' state of a weight."""
    first, second = (state[name].view(-1) for name in _MOMENTS)
    if first.dtype == torch.float32:
        return Moments(first, second)
    return Moments(first, second, (state["absmax1"], state["absmax2"]), (state["qmap1"], state["qmap2"]))
