"""Where the activations of a forward pass wait for backward: kept, computed again, or copied to system RAM.

`bp_train_cuda.memory.planner` decides; here is what it decides between. A checkpointed block keeps its input alone.
`InputOffload` moves those inputs to pinned RAM while later blocks run, and brings each back while the block after it is
differentiated. `tile_feed_forward` lets the feed-forward part of a checkpointed block run over some tokens at a time,
since its inner width makes it the largest part of a block's memory.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.modeling_layers import GradientCheckpointingLayer

TILES = (8192, 4096, 2048)
"""Tokens of a feed-forward tile: products run at full speed, but each tile unpacks 4-bit weights once more."""


@dataclass
class Tiling:
    """How many tokens the feed-forward parts of a model run at a time; changed between forward passes."""

    tokens: int | None = None
    """None: all."""


_FEED_FORWARD = {"gate_proj", "up_proj", "gate_up_proj", "down_proj", "act_fn", "activation_fn"}
_LEAST = 2**20  # bytes below which a copy is not worth its launch


def find_blocks(model: Any) -> list[Any]:
    """The blocks that can be checkpointed, in the order in which they run."""
    return [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]


class InputOffload:
    """Keeps the inputs of checkpointed blocks in system RAM from forward to backward.

    Copies run on a stream of their own. The last input stays, since backward needs it at once. Pinned
    buffers are kept from step to step.

    Args:
        width: Of a block's input (B, T, width); nothing else that is saved outside blocks has this shape and size.
        blocks: How many inputs there are in a forward pass.
        room: Bytes of system RAM that the inputs may take; None: any.
    """

    def __init__(self, width: int, blocks: int, room: int | None = None) -> None:
        self._width, self._blocks, self._room = width, blocks, room
        self._buffers: dict[int, Tensor] = {}
        self._stream: Any = None
        self._count = 0
        self._fetched: dict[int, tuple[Tensor, Any]] = {}
        self._shapes: dict[int, tuple[torch.Size, torch.dtype, torch.device]] = {}
        self.moved = 0
        """Inputs that the last forward pass moved."""

    def has_room(self, size: int) -> bool:
        """Whether inputs of ``size`` bytes fit in system RAM: pinned memory that is not there ends a run."""
        return self._room is None or size <= self._room

    @contextlib.contextmanager
    def forward_pass(self) -> Iterator[None]:
        """Inside, inputs of blocks are moved as they are saved. Passes do not overlap: each is differentiated first."""
        self._count, self.moved = 0, 0
        self._fetched.clear()
        with torch.autograd.graph.saved_tensors_hooks(self._pack, self._unpack):
            yield

    def _pack(self, tensor: Tensor) -> Tensor | int:
        # Checkpointed blocks save their inputs; by shape alone they differ from masks, positions and small tensors.
        if tensor.dim() != 3 or tensor.shape[-1] != self._width or tensor.nbytes < _LEAST:
            return tensor
        place = self._count
        self._count += 1
        # Backward begins with the last block: its input would be moved out and at once back.
        if place >= self._blocks - 1:
            return tensor
        self._shapes[place] = (tensor.shape, tensor.dtype, tensor.device)
        self.moved += 1
        buffer = self._buffer(place, tensor)
        if tensor.is_cuda:
            self._stream = self._stream or torch.cuda.Stream()
            self._stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self._stream):
                buffer.copy_(tensor.detach().reshape(-1), non_blocking=True)
            tensor.record_stream(self._stream)  # its memory is not used again before the copy is done
        else:
            buffer.copy_(tensor.detach().reshape(-1))
        return place

    def _unpack(self, kept: Tensor | int) -> Tensor:
        if isinstance(kept, Tensor):
            return kept
        self._fetch(kept)
        tensor, ready = self._fetched.pop(kept)
        if ready is not None:
            torch.cuda.current_stream().wait_event(ready)
        if kept:
            self._fetch(kept - 1)  # while this block runs
        return tensor

    def _fetch(self, place: int) -> None:
        if place in self._fetched:
            return
        shape, dtype, device = self._shapes[place]
        # Allocated on the stream that uses it, so that its memory goes back to where it came from.
        tensor = torch.empty(shape, dtype=dtype, device=device)
        source = self._buffers[place][: tensor.numel()]
        if device.type != "cuda":
            tensor.view(-1).copy_(source)
            self._fetched[place] = (tensor, None)
            return
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            tensor.view(-1).copy_(source, non_blocking=True)
            ready = torch.cuda.Event()
            ready.record()
        self._fetched[place] = (tensor, ready)

    def _buffer(self, place: int, tensor: Tensor) -> Tensor:
        found = self._buffers.get(place)
        if found is None or found.numel() < tensor.numel() or found.dtype != tensor.dtype:
            found = torch.empty(tensor.numel(), dtype=tensor.dtype, pin_memory=tensor.is_cuda)
            self._buffers[place] = found
        return found[: tensor.numel()]


def tile_feed_forward(model: Any, tiling: Tiling) -> int:
    """Let the feed-forward parts of checkpointed blocks run over some tokens at a time; returns how many can.

    Only parts that are plain functions of a token: a module ``mlp`` with ``down_proj`` whose own weights are frozen. A
    part is left whole below two tiles, without gradients, and where its block keeps its activations.
    """
    changed = 0
    for block in find_blocks(model):
        part: Any = getattr(block, "mlp", None)
        names = {name for name, _ in part.named_children()} if part is not None else set()
        if "down_proj" not in names or not names <= _FEED_FORWARD:
            continue
        if any(weight.requires_grad and ".lora_" not in name for name, weight in part.named_parameters()):
            continue
        part.forward = _tiled(block, part, part.forward, tiling)
        changed += 1
    return changed


def untile_feed_forward(model: Any) -> None:
    """Undo `tile_feed_forward`."""
    for block in find_blocks(model):
        part: Any = getattr(block, "mlp", None)
        before = getattr(getattr(part, "forward", None), "before", None)
        if before is not None:
            part.forward = before  # Liger's, or the class's own


def _tiled(block: Any, part: Any, plain: Callable[[Tensor], Tensor], tiling: Tiling) -> Callable[[Tensor], Tensor]:
    def forward(x: Tensor) -> Tensor:
        tokens, tile = x.numel() // x.shape[-1], tiling.tokens
        if (
            tile is None
            or tokens < 2 * tile
            or not (torch.is_grad_enabled() and block.gradient_checkpointing and block.training)
        ):
            return plain(x)
        params = [weight for weight in part.parameters() if weight.requires_grad]
        holder = _Hold.apply(x, *params)
        found: Tensor = _Tiles.apply(x, holder, plain, tile, *params)
        return found

    forward.before = plain  # type: ignore[attr-defined]
    return forward


class _Hold(torch.autograd.Function):  # type: ignore[misc]  # torch is not typed for a strict check
    """Saves the input before the tiles run, so that a checkpoint stops short of them; as `lora_linear._Inner`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, *params: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        ctx.count = len(params)
        ctx.set_materialize_grads(False)
        return x.new_empty(0)

    @staticmethod
    def backward(ctx: Any, *above: Tensor | None) -> tuple[None, ...]:  # noqa: ARG004
        nothing: tuple[None, ...] = (None,) * (1 + ctx.count)
        return nothing


class _Tiles(torch.autograd.Function):  # type: ignore[misc]
    """f(x) in tiles of tokens; backward runs each tile again with gradients, and differentiates it."""

    @staticmethod
    def forward(  # autograd passes arguments by position
        ctx: Any, x: Tensor, holder: Tensor, run: Callable[[Tensor], Tensor], tile: int, *params: Tensor
    ) -> Tensor:
        found = torch.empty_like(x)
        rows, out = x.view(-1, x.shape[-1]), found.view(-1, x.shape[-1])
        for start in range(0, len(rows), tile):
            out[start : start + tile] = run(rows[None, start : start + tile])[0]
        kind = x.device.type
        ctx.holder, ctx.run, ctx.tile, ctx.params = holder.grad_fn, run, tile, params
        ctx.autocast = (torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind))
        return found

    @staticmethod
    def backward(ctx: Any, *above: Tensor) -> tuple[Any, ...]:
        (x,) = ctx.holder.saved_tensors
        rows, gradient = x.detach().view(-1, x.shape[-1]), above[0].reshape(-1, x.shape[-1])
        slope = torch.empty_like(rows)
        sums: list[Tensor] = []
        enabled, dtype = ctx.autocast
        for start in range(0, len(rows), ctx.tile):
            here = slice(start, start + ctx.tile)
            with torch.enable_grad(), torch.autocast(x.device.type, dtype=dtype, enabled=enabled):
                part = rows[None, here].detach().requires_grad_()
                found = ctx.run(part)
            own, *rest = torch.autograd.grad(found, (part, *ctx.params), gradient[None, here])
            slope[here] = own[0]
            sums = rest if not sums else [total.add_(more) for total, more in zip(sums, rest, strict=True)]
        return (slope.view_as(x), None, None, None, *sums)
