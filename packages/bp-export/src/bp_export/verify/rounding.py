"""Merged weights before they are rounded to the base's dtype.

Merging adds a change to each weight and rounds the sum once. A change below half a unit in the last place is lost, and
in bfloat16 that is much of what a short run learns: 0.025 nats of 0.83 for SmolLM2-135M after 6 steps, where the sum
before rounding says what was trained to 3e-7. So the two are separated: the sum must be the trained model, and what
rounding loses of the adapter is counted.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from bp_export.verify.ops import Floats
from bp_merge import FoldedModel, fold_rows


class UnroundedModel:
    """A base with its adapter's pairs added in float32.

    Args:
        model: The same weights as they are merged.
    """

    def __init__(self, model: FoldedModel) -> None:
        self._model = model
        self._base = model.without_adapter()

    @property
    def tensors(self) -> Mapping[str, Any]:
        """The model's."""
        return self._model.tensors

    def read_rows(self, name: str, start: int, stop: int) -> Floats:
        """Rows of a tensor with the change in, not rounded: (stop - start, columns), float32."""
        pair = self._model.pairs.get(name)
        if pair is None or name not in self._base.tensors:
            return self._model.read_rows(name, start, stop)
        return fold_rows(self._base.read_rows(name, start, stop), pair, start, "F32")
