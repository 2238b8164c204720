"""AdamW over named weights, whose step can be called again after it ran out of memory."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten, tree_unflatten

from bp_runs.errors import CheckpointInvalidError, InvalidSettingError
from bp_runs.spec import TrainingSpec

BETAS, EPS = (0.9, 0.999), 1e-8
_GROUP = 2**26
"""Elements that are updated at a time: their new values exist next to the old ones."""
_PLAIN = ("norm", "bias", "lora_magnitude_vector")


def require_optimizer(training: TrainingSpec) -> None:
    """Reject 8-bit optimizers, which are bitsandbytes'.

    Raises:
        InvalidSettingError: ``training.optim`` names one.
    """
    if training.optim not in ("auto", "adamw_torch"):
        raise InvalidSettingError(
            f"training.optim = {training.optim} is not supported on MLX, which keeps optimizer state in 32 bits",
            fix="Let the rail choose: {set:training.optim=auto}",
            setting="training.optim",
        )


class AdamW:
    """AdamW (Loshchilov and Hutter, arXiv:1711.05101), the same numbers as torch's; state in float32.

    Norms and biases have no weight decay, as in transformers. Weights in bfloat16 are rounded stochastically, since
    most updates are smaller than half a step between two of its values.

    Args:
        model: Its trainable parameters are updated in place.
        weight_decay: Decoupled, a share of the weight and the learning rate.
        seed: Of stochastic rounding.
    """

    def __init__(self, model: Any, weight_decay: float, seed: int) -> None:
        self._model = model
        self._weight_decay = weight_decay
        self._seed = seed
        own = dict(tree_flatten(model.trainable_parameters()))
        self.step = 0
        self.first = {name: mx.zeros(weight.shape, mx.float32) for name, weight in own.items()}
        self.second = {name: mx.zeros(weight.shape, mx.float32) for name, weight in own.items()}
        self._updated: set[str] = set()
        """Weights that the step in progress has updated."""

    def update(self, gradients: Mapping[str, Any], rate: float) -> None:
        """One step over the weights that an interrupted call has not updated.

        Args:
            gradients: By the names of weights.
            rate: The learning rate.

        Raises:
            RuntimeError: mlx ran out of memory; call it again once memory is free.
        """
        step = self.step + 1
        weights = dict(tree_flatten(self._model.trainable_parameters()))
        for names in _groups(weights):
            left = [name for name in names if name not in self._updated]
            new = {name: self._move(name, weights[name], gradients[name], rate, step) for name in left}
            mx.eval(new)
            for name, (weight, first, second) in new.items():
                self.first[name], self.second[name] = first, second
                weights[name] = weight
            self._model.update(tree_unflatten([(name, weights[name]) for name in left]))
            self._updated.update(left)
        self._updated.clear()
        self.step = step

    def _move(self, name: str, weight: Any, gradient: Any, rate: float, step: int) -> tuple[Any, Any, Any]:
        """The new weight and both moving averages."""
        gradient = gradient.astype(mx.float32)
        first = BETAS[0] * self.first[name] + (1 - BETAS[0]) * gradient
        second = BETAS[1] * self.second[name] + (1 - BETAS[1]) * gradient * gradient
        corrections = 1 - BETAS[0] ** step, math.sqrt(1 - BETAS[1] ** step)
        decays = not any(word in part for part in name.lower().rsplit(".", 2)[-2:] for word in _PLAIN)
        new = weight.astype(mx.float32) * (1 - rate * self._weight_decay if decays else 1.0)
        new = new - rate / corrections[0] * first / (mx.sqrt(second) / corrections[1] + EPS)
        if weight.dtype == mx.bfloat16:
            digest = hashlib.blake2b(f"{self._seed} {step} {name}".encode(), digest_size=7).digest()
            key = mx.random.key(int.from_bytes(digest, "little"))
            return round_stochastically(new, key), first, second
        return new.astype(weight.dtype), first, second

    def reset(self) -> None:
        """Back to before the first step."""
        self.step = 0
        for state in (self.first, self.second):
            for name, value in state.items():
                state[name] = mx.zeros_like(value)

    @property
    def state_bytes(self) -> int:
        """Bytes of both averages."""
        return sum(value.nbytes for state in (self.first, self.second) for value in state.values())


def round_stochastically(values: Any, key: Any) -> Any:
    """bfloat16 values whose mean over many draws is ``values`` (float32).

    bfloat16 is the upper half of float32: a random number is added to the lower half, which is then cut off.
    """
    bits = values.view(mx.uint32)
    noise = mx.random.randint(0, 1 << 16, values.shape, mx.uint32, key=key)
    up = ((bits + noise) & 0xFFFF0000).astype(mx.uint32)
    return mx.where(mx.isfinite(values), up.view(mx.float32), values).astype(mx.bfloat16)


def _groups(weights: Mapping[str, Any]) -> Iterator[list[str]]:
    names: list[str] = []
    size = 0
    for name, weight in weights.items():
        names.append(name)
        size += weight.size
        if size >= _GROUP:
            yield names
            names, size = [], 0
    if names:
        yield names


def require_state(found: Mapping[str, Any], own: Mapping[str, Any]) -> None:
    """Reject optimizer state of other weights.

    Raises:
        CheckpointInvalidError: Names or shapes differ.
    """
    if {n: tuple(v.shape) for n, v in found.items()} != {n: tuple(v.shape) for n, v in own.items()}:
        raise CheckpointInvalidError("the checkpoint's optimizer state is not that of this model and adapter")
