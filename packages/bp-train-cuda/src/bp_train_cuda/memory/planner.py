"""How the GPU's free memory is used: rows at once, and which blocks keep, recompute or offload their activations.

Products run at full speed from a few thousand tokens on, so small micro-batches of a step run together. What memory is
left lets blocks keep their activations instead of computing them again, a third of a block's time. Where even the
inputs of blocks do not fit, they wait in system RAM. All of it changes memory and time, never a step's gradient.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import orjson
import psutil
import torch

from bp_data.loop.shapes import read_shapes
from bp_runs.errors import ShapesUnknownError
from bp_runs.events import Notice
from bp_runs.methods import METHODS
from bp_runs.spec import TrainSpec
from bp_train_cuda.memory.estimate import Parts, count_parts, estimate, read_load
from bp_train_cuda.model.activations import TILES, InputOffload, Tiling, find_blocks, tile_feed_forward

ENOUGH = 8000
"""Tokens of a micro-batch from which larger ones are hardly faster."""
LEAST = 4000
"""Tokens below which a micro-batch is not cut: then tiles and offloading cost less."""
SHARE = 0.85
"""Of the free memory that is planned with; the rest is for fragments, and for what estimates miss."""
_SAVED = 1.35
"""Of the bytes that are counted for a kept layer: fragments and copies that attention makes took a fifth more."""
_RAM_SHARE = 0.5
"""Of the free system RAM that layer inputs may take."""
_SHRINK = 0.7
"""Of the planned memory that is left after the GPU ran out of memory in spite of the plan."""


@dataclass(frozen=True, slots=True)
class Choice:
    """What happens to the activations of one micro-batch."""

    kept: int
    """Blocks that keep their activations; the others keep their input and compute the rest again."""
    offload: bool
    """Whether those inputs wait in system RAM."""
    tile: int | None = None
    """Tokens that the feed-forward parts of the others run at a time; None: all."""


class ActivationPlan:
    """Chooses for each micro-batch by its tokens.

    Args:
        spare: Bytes for activations.
        parts: Bytes per token, as `bp_train_cuda.memory.estimate.count_parts` has them.
        blocks: How many there are.
    """

    def __init__(
        self,
        spare: int,
        parts: Parts,
        blocks: Sequence[Any],
        offload: InputOffload | None = None,
        tiling: Tiling | None = None,
    ) -> None:
        self.spare, self.blocks = spare, list(blocks)
        self._parts, self._offload, self._tiling = parts, offload, tiling
        self.has_kept = False
        """Whether any micro-batch kept more than its blocks' inputs: then the peak is no measure of the least."""

    def choose(self, tokens: int) -> Choice:
        """For a micro-batch of ``tokens`` tokens, padding included: the fastest that fits, else what takes least."""
        parts, inputs = self._parts, len(self.blocks) * self._parts.input * tokens
        left = self.spare - self._work(tokens, None) - inputs
        kept_bytes = (_SAVED * parts.saved - parts.input) * tokens + parts.saved_weights
        kept = min(len(self.blocks), max(0, int(left // max(1, kept_bytes))))
        if left >= 0 or kept:
            return Choice(kept, offload=False)
        tiles: tuple[int | None, ...] = (None,) if self._tiling is None else TILES
        can_offload = self._offload is not None and self._offload.has_room(inputs)
        options = [(tile, False) for tile in (tiles[:1] if can_offload else tiles)]
        options += [(tile, True) for tile in tiles if can_offload]
        for tile, offload in options:
            if self._work(tokens, tile) + (2 * parts.input * tokens if offload else inputs) <= self.spare:
                return Choice(0, offload, tile)
        return Choice(0, options[-1][1], options[-1][0])

    def _work(self, tokens: int, tile: int | None) -> int:
        return max(self._parts.block(tokens, tile), self._parts.head(tokens))

    def fits(self, tokens: int) -> bool:
        """Whether a micro-batch fits without moving or tiling anything."""
        return self._work(tokens, None) + len(self.blocks) * self._parts.input * tokens <= self.spare

    def forward_pass(self, tokens: int) -> contextlib.AbstractContextManager[None]:
        """The context of a forward pass with gradients."""
        choice = self.choose(tokens)
        self.has_kept |= choice.kept > 0
        first_kept = len(self.blocks) - choice.kept  # the last ones, which backward frees first
        for place, block in enumerate(self.blocks):
            block.gradient_checkpointing = place < first_kept
        if self._tiling is not None:
            self._tiling.tokens = choice.tile
        if choice.offload and self._offload is not None:
            return self._offload.forward_pass()
        return contextlib.nullcontext()

    def shrink(self) -> None:
        """After the GPU ran out of memory: plan with less from now on."""
        self.spare = int(self.spare * _SHRINK)


def free_memory() -> int | None:
    """Bytes that torch could still take of the GPU, its own cached blocks included; None on a CPU."""
    if not torch.cuda.is_available():
        return None
    return int(torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved() - torch.cuda.memory_allocated())


def plan_activations(spec: TrainSpec, mode: str, model: Any) -> ActivationPlan | None:
    """The plan for a model in memory; None on a CPU, for unknown shapes, or with checkpointing off.

    Args:
        mode: How the base is held.
    """
    blocks, free = find_blocks(model), free_memory()
    if free is None or not blocks or not spec.training.gradient_checkpointing:
        return None
    try:
        shapes = read_shapes(orjson.loads((spec.base / "config.json").read_bytes()))
    except ShapesUnknownError:
        return None
    load = read_load(spec, mode)
    found = estimate(shapes, load)
    to_come = found.parts["optimizer"] + found.trained * load.weight_bytes  # and gradients
    tiling = Tiling()
    is_tiled = mode != "full" and tile_feed_forward(model, tiling) == len(blocks)
    spare = int(SHARE * free) - to_come
    offload = InputOffload(shapes.hidden, len(blocks), int(_RAM_SHARE * psutil.virtual_memory().available))
    return ActivationPlan(spare, count_parts(shapes, load), blocks, offload, tiling if is_tiled else None)


def choose_rows(spec: TrainSpec, plan: ActivationPlan | None, lengths: Sequence[int]) -> int:
    """Micro-batches of a step that run as one: a divisor of the accumulation, 1 without a plan.

    The fewest that hold `ENOUGH` tokens, as long as the longest examples fit together.
    """
    training = spec.training
    if plan is None or training.gradient_accumulation == 1 or not len(lengths):
        return 1
    width = METHODS[training.method].completions
    longest, mean = max(lengths) * width, sum(lengths) / len(lengths) * width
    found = 1
    for count in range(2, training.gradient_accumulation + 1):
        if found * training.batch_size * mean >= ENOUGH:
            break
        if training.gradient_accumulation % count == 0 and plan.fits(count * training.batch_size * longest):
            found = count
    return found


def choose_halvings(plan: ActivationPlan | None, rows: int, length: int, most: int) -> int:
    """How often a micro-batch is halved before the first step, at most ``most``: until it fits as it is.

    Fewer rows at once cost less than tiles or offloading, as long as each chunk has `LEAST` tokens.

    Args:
        length: Tokens of an example of the larger kind. Not the longest: a rare batch of those runs in tiles.
    """
    found = 0
    while plan is not None and found < most and not plan.fits(-(-rows // 2**found) * length):
        if rows // 2 ** (found + 1) * length < LEAST:
            break
        found += 1
    return found


def describe_plan(
    spec: TrainSpec, plan: ActivationPlan, together: int, halvings: int, lengths: Sequence[int]
) -> Notice:
    """The plan in one line, for the longest examples."""
    training = spec.training
    rows = -(-together * training.batch_size // 2**halvings)
    tokens = rows * max(lengths) * METHODS[training.method].completions
    choice = plan.choose(tokens)
    what = "packs" if training.packing else "examples"
    words = f"{rows} {what} at once" + (f" instead of {training.batch_size}" if rows != training.batch_size else "")
    blocks = len(plan.blocks)
    if choice.kept:
        words += f"; {choice.kept} of {blocks} layers keep their activations"
    if choice.tile is not None:
        words += f"; feed-forward in tiles of {choice.tile:,} tokens"
    if choice.offload:
        words += "; layer inputs wait in system RAM"
    details = {"rows": rows, "together": together, "kept": choice.kept, "offload": choice.offload, "tokens": tokens}
    return Notice(message=f"memory plan: {words} (same gradient)", details={"plan": details})
