"""What rounding merged weights to 16 bits does to a model's answers, whatever was trained.

Merging adds a change to each weight and rounds the sum once to the base's dtype, so the result is up to half a unit in
the last place away from what was trained. Nobody who stores 16 bits can avoid that. How much it moves the answers
depends on the model: 0.04 nats for SmolLM2-135M in bfloat16, less for larger ones. So it is measured on the model at
hand: its weights are moved at random by as much, and its answers are compared with its own.
"""

from __future__ import annotations

import statistics
import zlib
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np

from bp_export.verify.evidence import compute_divergence, compute_rows
from bp_export.verify.forward import Forward
from bp_export.verify.ops import Floats
from bp_merge import FoldedModel
from bp_runs.witness import WitnessPrompt

_STORED_BITS: Mapping[str, tuple[int, int]] = {"BF16": (7, -133), "F16": (10, -24)}
"""Bits of the fraction, and the exponent of the smallest step."""


class ShakenModel:
    """A model whose rounded weights are each moved by up to half a unit in the last place, uniformly at random.

    Args:
        model: The merged weights.
        rounded: Names of the tensors that merging or training rounded.
    """

    def __init__(self, model: FoldedModel, rounded: Collection[str]) -> None:
        self._model = model
        self._rounded = frozenset(rounded)

    @property
    def tensors(self) -> Mapping[str, Any]:
        """The model's."""
        return self._model.tensors

    def read_rows(self, name: str, start: int, stop: int) -> Floats:
        """Rows of a tensor, moved: (stop - start, columns). The same rows are always moved alike."""
        rows = self._model.read_rows(name, start, stop)
        bits = _STORED_BITS.get(self._model.tensors[name].dtype)
        if name not in self._rounded or bits is None:
            return rows
        draw = np.random.default_rng([zlib.crc32(name.encode()), start])
        shares = draw.random(rows.shape, np.float32) - np.float32(0.5)
        moved: Floats = rows + shares * compute_step(rows, *bits)
        return moved


def compute_step(values: Floats, fraction: int, smallest: int) -> Floats:
    """The distance of neighboring values of a 16-bit type around each value; 0 around 0, which stays as it is.

    Args:
        values: Of any shape.
        fraction: The type's stored bits of the fraction.
        smallest: The exponent of its smallest step.
    """
    exponents = np.frexp(values)[1] - 1  # of the leading bit
    steps = np.ldexp(np.float32(1), np.maximum(exponents - fraction, smallest))
    return np.where(values == 0, np.float32(0), steps)


def measure_rounding(
    forward: Forward,
    model: FoldedModel,
    rounded: Collection[str],
    prompts: Sequence[WitnessPrompt],
    rows: Sequence[Mapping[int, float]],
) -> float:
    """Mean divergence in nats that moving every rounded weight within its last place makes.

    Args:
        forward: The merged model.
        model: Its weights.
        rounded: As `ShakenModel`.
        prompts: Where to look.
        rows: What the merged model says at all places of the prompts.
    """
    shaken = compute_rows(forward.with_weights(ShakenModel(model, rounded)), prompts)
    tokens = [row for prompt in prompts for row in prompt.tokens]
    return statistics.fmean(
        compute_divergence(listed, [row[token] for token in listed], other)
        for listed, row, other in zip(tokens, rows, shaken, strict=True)
    )
