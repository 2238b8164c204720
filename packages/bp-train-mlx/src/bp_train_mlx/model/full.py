"""Training all weights of a model, under Hugging Face's names; and layers that are computed again in backward."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten, tree_unflatten

from bp_runs.errors import ModeError
from bp_train_mlx.model.load import tensor_names
from bp_train_mlx.model.lora import KeyedDropout, other_names


@dataclass
class AllWeights:
    """All weights of a model, under the names of its base's files."""

    model: Any
    names: Mapping[str, str]
    """The name in the base's files of each mlx parameter."""
    dropouts: list[KeyedDropout] = field(default_factory=list)

    def weights(self) -> dict[str, Any]:
        """Arrays by name."""
        return {self.names[name]: weight for name, weight in tree_flatten(self.model.trainable_parameters())}

    def load(self, weights: Mapping[str, Any]) -> None:
        """Set the weights to those of the same names."""
        own = dict(tree_flatten(self.model.trainable_parameters()))
        new = [(name, weights[self.names[name]].astype(weight.dtype)) for name, weight in own.items()]
        self.model.update(tree_unflatten(new))
        mx.eval(self.model.parameters())

    def rename(self, name: str) -> str:
        """The name in the base's files of an mlx parameter."""
        return self.names[name]

    @staticmethod
    def turn(weight: Any) -> Any:
        """The array: mlx holds these weights as files do."""
        return weight


def open_weights(model: Any, base: Path) -> AllWeights:
    """Let training change every weight.

    Raises:
        ModeError: mlx-lm holds a weight in another layout than the base's files, so that the result could not be
            written as a model folder.
    """
    tensors = tensor_names(base)
    model.unfreeze()
    names = {}
    for name, weight in tree_flatten(model.trainable_parameters()):
        found = next((other for other in other_names(name) if tensors.get(other) == tuple(weight.shape)), None)
        if found is None:
            raise ModeError(
                f"full fine-tuning of this model is not supported on MLX: {name} is stored in another layout",
                fix="Train an adapter: {set:training.mode=lora}",
            )
        names[name] = found
    return AllWeights(model, names)


def checkpoint_layers(model: Any) -> None:
    """Let every layer of ``model`` keep only its input for backward, and compute the rest again.

    Each layer gets a class of its own, so that other models in this process are as before. Floating-point
    arrays go in as arguments, since gradients do not reach what a checkpointed function only refers to.
    """
    for layer in model.layers:
        layer.__class__ = type(type(layer).__name__, (type(layer),), {"__call__": _recomputed(type(layer).__call__)})


def plain_layers(model: Any) -> None:
    """Undo `checkpoint_layers`."""
    for layer in model.layers:
        if getattr(type(layer).__call__, "is_recomputed", False):
            layer.__class__ = type(layer).__mro__[1]


def _is_float(value: Any) -> bool:
    return isinstance(value, mx.array) and bool(mx.issubdtype(value.dtype, mx.floating))


def _recomputed(call: Any) -> Any:
    def run(layer: Any, *args: Any, **kwargs: Any) -> Any:
        places = [place for place, value in enumerate(args) if _is_float(value)]
        keys = [key for key, value in kwargs.items() if _is_float(value)]

        def inner(weights: Any, some: list[Any], named: dict[str, Any]) -> Any:
            layer.update(weights)
            own = list(args)
            for place, value in zip(places, some, strict=True):
                own[place] = value
            return call(layer, *own, **{**kwargs, **named})

        arrays = [args[place] for place in places]
        return mx.checkpoint(inner)(layer.trainable_parameters(), arrays, {key: kwargs[key] for key in keys})

    run.is_recomputed = True  # type: ignore[attr-defined]
    return run
