"""LoRA's linear layers in fewer passes over memory, on PEFT's own modules and parameters.

y = x W' + b + s (x A') B' takes PEFT five passes over y: the product, a copy (4-bit bases), the adapter's product, its
scaling, and the addition. Here the adapter's product is added in place by the matrix product itself, with the scale
folded into B. Layers that read the same input (q, k, v; gate, up) share one product with their A stacked, and one sum
of their input's gradients. The adapter's parameters are cast once for each use, not cached for the whole pass.

`use_fast_lora` sets ``forward`` on the layers that qualify; the module tree and the adapter's files stay PEFT's. Others
(dropout, DoRA, several adapters, biases in the adapter, Conv1D, float8) and every call that is not plain training or
reading keep PEFT's forward.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor

from bp_train_cuda.model.nf4 import dequantize

SHARED_INPUTS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""Names of layers side by side that models call with the same tensor. That it is the same is checked each time."""
_FEW_TOKENS = 64
"""Below this many tokens without gradients, bitsandbytes' own product reads a 4-bit weight faster than it unpacks."""


@dataclass(frozen=True, slots=True)
class _Weight:
    """The frozen part of a layer, and the adapter's scale."""

    weight: Tensor
    """(N, K), or bitsandbytes' packed nf4."""
    bias: Tensor | None
    """(N,)."""
    scale: float
    """Of B A."""

    def dense(self, dtype: torch.dtype) -> Tensor:
        """(N, K) in ``dtype``; unpacked again at each use, since all of them at once would not fit."""
        state = getattr(self.weight, "quant_state", None)
        return (self.weight if state is None else dequantize(self.weight, state)).to(dtype)


def use_fast_lora(model: Any) -> int:
    """Let the LoRA layers of a PEFT model that qualify compute as this module does; returns how many.

    Args:
        model: A PEFT model whose weights are not sharded. `restore_lora` undoes it.
    """
    changed = 0
    for parent in list(model.modules()):
        fast = {name: child for name, child in parent.named_children() if _qualifies(child)}
        groups = [[fast.pop(name) for name in names if name in fast] for names in SHARED_INPUTS]
        for layers in [*groups, *([layer] for layer in fast.values())]:
            if layers:
                group = _Group(layers)
                for layer in layers:
                    layer.forward = group.bind(layer)
                changed += len(layers)
    return changed


def restore_lora(model: Any) -> None:
    """Give the layers PEFT's forward back."""
    for module in model.modules():
        if isinstance(module, LoraLayer) and "forward" in vars(module):
            del module.forward


def _qualifies(layer: Any) -> bool:
    """Whether a module is a LoRA layer without anything that PEFT computes between or after its products."""
    if not isinstance(layer, LoraLayer) or "forward" in vars(layer) or len(layer.lora_A) != 1:
        return False
    name = next(iter(layer.lora_A))
    kinds = (torch.nn.Linear, *_four_bit_kinds())
    return (
        type(layer.base_layer) in kinds
        and not layer.lora_variant
        and isinstance(layer.lora_dropout[name], torch.nn.Identity)
        and not layer.lora_bias[name]
        and not getattr(layer, "fan_in_fan_out", False)
    )


def _four_bit_kinds() -> tuple[type, ...]:
    if find_spec("bitsandbytes") is None:
        return ()
    from bitsandbytes.nn import Linear4bit

    return (Linear4bit,)


class _Group:
    """Layers with the same input: the first that is called computes for all, the others pick up their share."""

    def __init__(self, layers: Sequence[Any]) -> None:
        self._layers = layers
        self._input: Tensor | None = None
        self._ready: dict[int, Tensor] = {}

    def bind(self, layer: Any) -> Callable[..., Tensor]:
        """The layer's new forward."""
        plain = layer.forward

        def forward(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            if args or kwargs or not _is_plain(layer, x):
                found: Tensor = plain(x, *args, **kwargs)
                return found
            return self._run(layer, x)

        return forward

    def _run(self, layer: Any, x: Tensor) -> Tensor:
        place = self._layers.index(layer)
        if x is self._input and place in self._ready:
            found = self._ready.pop(place)
        else:
            # A layer that was never called, or a checkpoint that stopped early, leaves its share behind until here.
            self._ready = dict(enumerate(_multiply(self._layers if _all_plain(self._layers, x) else [layer], x)))
            if len(self._ready) == 1:
                place = 0
            self._input, found = x, self._ready.pop(place)
        if not self._ready:
            self._input = None
        return found


def _all_plain(layers: Sequence[Any], x: Tensor) -> bool:
    return all(_is_plain(layer, x) for layer in layers)


def _is_plain(layer: Any, x: Tensor) -> bool:
    """Whether PEFT would add one adapter to the base's product, and everything is computed in one dtype."""
    if layer.disable_adapters or layer.merged or len(layer.active_adapters) != 1:
        return False
    if not torch.is_grad_enabled() and x.numel() < _FEW_TOKENS * x.shape[-1]:
        return False
    adapter = layer.active_adapters[0]
    if adapter not in layer.lora_A:
        return False
    if torch.is_autocast_enabled(x.device.type):
        return True
    weight = layer.base_layer.weight
    base = weight.quant_state.dtype if hasattr(weight, "quant_state") else weight.dtype
    return bool(x.dtype == base == layer.lora_A[adapter].weight.dtype)


def _multiply(layers: Sequence[Any], x: Tensor) -> tuple[Tensor, ...]:
    """The outputs (…, N) of layers for their common input (…, K)."""
    adapters = [layer.active_adapters[0] for layer in layers]
    weights = [
        _Weight(layer.base_layer.weight, layer.base_layer.bias, float(layer.scaling[name]))
        for layer, name in zip(layers, adapters, strict=True)
    ]
    kind = x.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
    downs = [layer.lora_A[name].weight for layer, name in zip(layers, adapters, strict=True)]
    ups = [layer.lora_B[name].weight for layer, name in zip(layers, adapters, strict=True)]
    if len(layers) > 1:
        outputs: tuple[Tensor, ...] = _Shared.apply(x, weights, dtype, *downs, *ups)
        return outputs
    inner = _Inner.apply(x, downs[0], dtype)
    return (_Last.apply(x, inner, weights[0], dtype, downs[0], ups[0]),)


class _Shared(torch.autograd.Function):  # type: ignore[misc]  # torch is not typed for a strict check
    """Several layers on one input."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weights: Sequence[_Weight], dtype: torch.dtype, *params: Tensor) -> Any:
        downs, ups = params[: len(weights)], params[len(weights) :]
        with _no_autocast(x):
            rows = x.reshape(-1, x.shape[-1]).to(dtype)  # (T, K)
            down = _stack(downs, dtype)  # (R, K)
            inner = rows @ down.T  # (T, R)
            outputs = tuple(
                _add_adapter(rows, part, weight, up, x.shape)
                for part, weight, up in zip(_split(inner, downs), weights, ups, strict=True)
            )
        ctx.save_for_backward(rows, inner, *params)
        ctx.weights, ctx.dtype, ctx.shape, ctx.in_dtype = weights, dtype, x.shape, x.dtype
        # An unused output comes back as None. Zeros in its place would cost a pass over (T, N) and a product.
        ctx.set_materialize_grads(False)
        return outputs

    @staticmethod
    def backward(ctx: Any, *above: Tensor | None) -> tuple[Any, ...]:
        rows, inner, *params = ctx.saved_tensors
        count = len(ctx.weights)
        downs, ups = params[:count], params[count:]
        with _no_autocast(rows):
            down_slopes: list[Tensor] = []
            up_slopes: list[Tensor | None] = []
            slope = None
            for gradient, part, weight, up in zip(above, _split(inner, downs), ctx.weights, ups, strict=True):
                if gradient is None:  # a model that never used this layer's output
                    down_slopes.append(torch.zeros_like(part))
                    up_slopes.append(None)
                    continue
                d = gradient.reshape(-1, gradient.shape[-1]).to(ctx.dtype)  # (T, N)
                down_slopes.append(d @ _scale(up, weight.scale, ctx.dtype))
                up_slopes.append(_product32(d.T, part, up, weight.scale))
                if ctx.needs_input_grad[0]:
                    # Unpacked a second time instead of saved: a saved copy would hold the whole base in 16 bits.
                    dense = weight.dense(ctx.dtype)
                    slope = d @ dense if slope is None else slope.addmm_(d, dense)
            inner_slope = torch.cat(down_slopes, dim=1)  # (T, R)
            stacked = _product32(inner_slope.T, rows, downs[0])  # (R, K)
            if slope is not None:
                slope = slope.addmm_(inner_slope, _stack(downs, ctx.dtype)).view(ctx.shape).to(ctx.in_dtype)
        return (slope, None, None, *stacked.split([len(a) for a in downs]), *up_slopes)


class _Inner(torch.autograd.Function):  # type: ignore[misc]
    """x A', and the holder of what `_Last` needs in backward.

    A checkpoint stops computing again once every saved tensor is there. Functions save when they return; so a layer
    that saved its own input would be multiplied once more just for that. This one is the last to save, before the
    product of the block's last layer, which is then left out.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, down: Tensor, dtype: torch.dtype) -> Tensor:
        with _no_autocast(x):
            rows = x.reshape(-1, x.shape[-1]).to(dtype)
            inner = rows @ down.to(dtype).T
        ctx.save_for_backward(rows, inner)
        ctx.set_materialize_grads(False)
        return inner

    @staticmethod
    def backward(ctx: Any, *above: Tensor | None) -> tuple[None, None, None]:  # noqa: ARG004  # `_Last` has done it
        return None, None, None


class _Last(torch.autograd.Function):  # type: ignore[misc]
    """One layer, given x A'; it saves parameters alone and reads the rest from `_Inner`."""

    @staticmethod
    def forward(  # noqa: PLR0917  # autograd passes arguments by position
        ctx: Any, x: Tensor, inner: Tensor, weight: _Weight, dtype: torch.dtype, down: Tensor, up: Tensor
    ) -> Tensor:
        with _no_autocast(x):
            rows = x.reshape(-1, x.shape[-1]).to(dtype)
            found = _add_adapter(rows, inner, weight, up, x.shape)
        # Parameters live anyway; save_for_backward would make this node the last to save.
        ctx.holder, ctx.params = inner.grad_fn, (down, up)
        ctx.weight, ctx.dtype, ctx.shape, ctx.in_dtype = weight, dtype, x.shape, x.dtype
        return found

    @staticmethod
    def backward(ctx: Any, *above: Tensor) -> tuple[Any, ...]:
        (rows, inner), (down, up) = ctx.holder.saved_tensors, ctx.params
        with _no_autocast(rows):
            d = above[0].reshape(-1, above[0].shape[-1]).to(ctx.dtype)
            inner_slope = d @ _scale(up, ctx.weight.scale, ctx.dtype)
            up_slope = _product32(d.T, inner, up, ctx.weight.scale)
            down_slope = _product32(inner_slope.T, rows, down)
            slope = None
            if ctx.needs_input_grad[0]:
                slope = d @ ctx.weight.dense(ctx.dtype)
                slope = slope.addmm_(inner_slope, down.to(ctx.dtype)).view(ctx.shape).to(ctx.in_dtype)
        return slope, None, None, None, down_slope, up_slope


def _add_adapter(rows: Tensor, inner: Tensor, weight: _Weight, up: Tensor, shape: torch.Size) -> Tensor:
    """(…, N): rows (T, K) through the base's weight, plus inner (T, r) through B."""
    small = _scale(up, weight.scale, rows.dtype)
    bias = None if weight.bias is None else weight.bias.to(rows.dtype)
    if rows.is_cuda:
        # The large product reads what it adds to while it computes: 5 % less time than adding the small one to it. A
        # CPU's bfloat16 product would round that sum once for each part of K.
        found = torch.nn.functional.linear(inner, small, bias).addmm_(rows, weight.dense(rows.dtype).T)
    else:
        found = torch.nn.functional.linear(rows, weight.dense(rows.dtype), bias).addmm_(inner, small.T)
    return found.view(*shape[:-1], -1)


def _scale(up: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
    """S B (N, r) in ``dtype``, rounded once."""
    return torch.mul(up.detach(), scale, out=torch.empty_like(up, dtype=dtype, requires_grad=False))


def _stack(downs: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """All A on top of each other (R, K)."""
    return (downs[0] if len(downs) == 1 else torch.cat(list(downs))).to(dtype)


def _split(inner: Tensor, downs: Sequence[Tensor]) -> Iterator[Tensor]:
    return iter(inner.split([len(down) for down in downs], dim=1))


def _product32(left: Tensor, right: Tensor, like: Tensor, scale: float = 1.0) -> Tensor:
    """Scale · left @ right in the dtype of the parameter ``like``; a GPU's float32 sums are not rounded in between."""
    if left.is_cuda and like.dtype == torch.float32 and left.dtype != torch.float32:
        found = torch.mm(left, right, out_dtype=torch.float32)
    else:
        found = (left @ right).to(like.dtype)
    return found if scale == 1.0 else found.mul_(scale)


def _no_autocast(tensor: Tensor) -> Any:
    return torch.autocast(tensor.device.type, enabled=False)
