"""How a model's last hidden states become logits, proved against the model's own logits.

The loss computes log-probabilities in tiles from hidden states, so it has to repeat what the model does after its
decoder: multiply with the output embedding, scale, and softcap. What that is comes from the config and is compared with
the model before it is used. A model that does something else gets no `Head`; the loss takes its full logits.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel

_PROOF_TOKENS = 8
_PROOF_LOGIT = 100.0
"""Hidden states are amplified until a logit is this large: only then does a softcap of 30 or 50 show."""
_TOLERANCE = 1e-4
"""Of the largest logit, in float32. Lower precisions get four units of rounding instead."""


@dataclass(frozen=True, slots=True)
class Head:
    """Logits of hidden states h (N, H): softcap(scale · (pre_scale · h @ weight.T + bias))."""

    weight: torch.Tensor
    """The output embedding (V, H), in the base's dtype."""
    bias: torch.Tensor | None = None
    """(V,)."""
    scale: float = 1.0
    """Multiplies the logits, bias included."""
    softcap: float | None = None
    """Largest magnitude of a logit: softcap · tanh(logits / softcap), after the scale."""
    pre_scale: float = 1.0
    """Multiplies the hidden states."""

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits (N, V) in float32 of hidden states (N, H); the product is taken in the weight's dtype."""
        hidden = hidden.to(self.weight.dtype) * self.pre_scale
        logits = torch.nn.functional.linear(hidden, self.weight, self.bias).float() * self.scale
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)


def unwrap_model(model: Any) -> Any:
    """The transformers model in ``model``: itself, or the one that a PEFT adapter is on."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


def find_decoder(model: Any) -> Any:
    """The part that maps token ids (B, T) to ``last_hidden_state`` (B, T, H); an adapter on it stays active."""
    base = unwrap_model(model)
    decoder = base.get_decoder()
    return base.model if decoder is base and hasattr(base, "model") else decoder  # Llama 4 gives itself


def find_head(model: Any) -> Head | None:
    """How ``model`` computes logits from its decoder's hidden states, or None if only its own forward pass can say.

    The result is proved by two forward passes of 8 tokens on the model's device. Modes, random state and gradients of
    the model stay as they are. Call it before the weights are sharded.

    Args:
        model: A transformers causal language model, or a PEFT model of one.
    """
    return next((head for head in _read_heads(model) if prove_head(model, head)), None)


def prove_head(model: Any, head: Head) -> bool:
    """Whether ``head`` on the decoder's hidden states gives the logits of the model's own forward pass.

    Compared on 8 tokens: log-probabilities of the model as it is, and logits of its hidden states amplified to where
    a softcap shows. float32 must agree to 1e-4 of the largest logit, lower precisions to four units of their rounding.
    """
    device, dtype = head.weight.device, head.weight.dtype
    ids = (torch.arange(_PROOF_TOKENS, device=device) * 7 + 3).remainder(len(head.weight))[None]
    with evaluating(model, device):
        try:
            hidden = find_decoder(model)(input_ids=ids, use_cache=False).last_hidden_state[0]
            own, own_input = _run_model(model, ids, factor=1.0)
            mine = head.logits(hidden)
            if own_input is None or own.shape != mine.shape or not _agree(own_input, hidden * head.pre_scale, dtype):
                return False
            peak = float(torch.nn.functional.linear(own_input.to(dtype), head.weight).abs().max())
            factor = _PROOF_LOGIT / max(peak, 1e-6)
            amplified, _ = _run_model(model, ids, factor=factor)
            raised = Head(head.weight, head.bias, head.scale, head.softcap).logits(own_input * factor)
        except torch.OutOfMemoryError:
            raise
        except (TypeError, ValueError, RuntimeError, AttributeError, KeyError, IndexError):
            return False  # a decoder that wants more than token ids, or gives something else than hidden states
    return _agree(own.log_softmax(-1), mine.log_softmax(-1), dtype) and _agree(amplified, raised, dtype)


def _read_heads(model: Any) -> Iterator[Head]:
    """What the config may mean, the likeliest first."""
    base = unwrap_model(model)
    output = base.get_output_embeddings()
    if not isinstance(output, torch.nn.Linear):
        return
    weight = output.weight
    if not torch.is_floating_point(weight) or weight.dim() != 2:
        return  # quantized, or no matrix at all
    config = base.config.get_text_config(decoder=True)
    names = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
    softcap = next((cap for name in names if (cap := _read_number(config, name))), None)
    for scale, pre_scale in _read_scales(config):
        yield Head(weight, output.bias, scale, softcap, pre_scale)


def _read_scales(config: Any) -> Iterator[tuple[float, float]]:
    """Pairs (scale, pre_scale) by the names that models have for them."""
    for name in ("logit_scale", "lm_head_multiplier", "output_multiplier"):
        if (factor := _read_number(config, name)) is not None:
            yield factor, 1.0
    if divisor := _read_number(config, "logits_scaling"):
        yield 1 / divisor, 1.0  # Granite
        yield 1.0, 1 / divisor  # MiniCPM3
        yield divisor, 1.0  # HyperCLOVA X
    if divisor := _read_number(config, "logits_mup_width_multiplier"):
        yield 1.0, 1 / divisor  # Inkling
    yield 1.0, 1.0


def _read_number(config: Any, name: str) -> float | None:
    value = getattr(config, name, None)
    return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else None


def _run_model(model: Any, ids: torch.Tensor, *, factor: float) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Logits (T, V) in float32 of the model's own forward pass, with the input of its output embedding times a factor.

    Returns:
        The logits, and that input (T, H) before the factor; None if the output embedding was never called.
    """
    seen: list[torch.Tensor] = []

    def amplify(_: Any, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        seen.append(args[0])
        return (args[0] * factor, *args[1:])

    handle = unwrap_model(model).get_output_embeddings().register_forward_pre_hook(amplify)
    try:
        logits = unwrap_model(model)(input_ids=ids, use_cache=False).logits
    finally:
        handle.remove()
    return logits[0].float(), seen[0][0] if len(seen) == 1 else None


def _agree(one: torch.Tensor, other: torch.Tensor, dtype: torch.dtype) -> bool:
    """Whether two tensors that were computed in ``dtype`` agree to what its rounding leaves of their largest value."""
    tolerance = max(_TOLERANCE, 4 * torch.finfo(dtype).eps)
    one, other = one.float(), other.float()
    largest = max(float(one.abs().max()), 1e-6)
    return bool(torch.isfinite(one).all()) and float((one - other).abs().max()) <= tolerance * largest


@contextmanager
def evaluating(model: Any, device: torch.device) -> Iterator[None]:
    """Evaluation mode without gradients; afterwards each module's mode and the random state are as before."""
    modes = [(module, module.training) for module in model.modules()]
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices), torch.no_grad():
        model.eval()
        try:
            yield
        finally:
            for module, mode in modes:
                module.training = mode
