"""Elementwise operations and reductions of the forward pass, in float32."""

from __future__ import annotations

from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

Floats: TypeAlias = NDArray[np.float32]
_LARGEST = np.float32(88.0)  # exp of more than this overflows float32


def normalize(x: Floats, weight: Floats, epsilon: float) -> Floats:
    """RMSNorm over the last axis (arXiv:1910.07467)."""
    mean = np.square(x).mean(axis=-1, keepdims=True)
    scaled: Floats = x / np.sqrt(mean + np.float32(epsilon)) * weight
    return scaled


def take_mean_off(x: Floats) -> Floats:
    """What a LayerNorm does before it scales, over the last axis."""
    centered: Floats = x - x.mean(axis=-1, keepdims=True)
    return centered


def activate(x: Floats, kind: str) -> Floats:
    """SiLU, sigmoid, ReLU, GELU or its tanh approximation (arXiv:1606.08415)."""
    match kind:
        case "sigmoid":
            out: NDArray[np.floating] = 1 / (1 + np.exp(np.clip(-x, -_LARGEST, _LARGEST)))
        case "silu":
            out = x / (1 + np.exp(np.clip(-x, -_LARGEST, _LARGEST)))
        case "relu":
            out = np.maximum(x, 0)
        case "gelu_pytorch_tanh":
            out = 0.5 * x * (1 + np.tanh(np.float32(np.sqrt(2 / np.pi)) * (x + np.float32(0.044715) * x**3)))
        case "gelu":
            out = 0.5 * x * (1 + _erf(x * np.float32(np.sqrt(0.5))))
        case _:
            raise ValueError(kind)
    return out.astype(np.float32)


def _erf(x: Floats) -> Floats:
    """The error function to 1.5e-7 (Abramowitz and Stegun, 7.1.26)."""
    wide = np.abs(x.astype(np.float64))
    t = 1 / (1 + 0.3275911 * wide)
    series = t * (0.254829592 + t * (-0.284496736 + t * (1.421413741 + t * (-1.453152027 + t * 1.061405429))))
    signed: Floats = (np.sign(x) * (1 - series * np.exp(-(wide**2)))).astype(np.float32)
    return signed


def cap_softly(x: Floats, cap: float) -> Floats:
    """``cap * tanh(x / cap)``, as Gemma 2 caps its scores and logits."""
    capped: Floats = np.tanh(x / np.float32(cap)) * np.float32(cap)
    return capped


def multiply_clamped(gate: Floats, up: Floats, alpha: float, limit: float) -> Floats:
    """gpt-oss's SwiGLU: (up + 1) gate sigmoid(alpha gate), gate at most and up within the limit."""
    gate, up = np.minimum(gate, np.float32(limit)), np.clip(up, np.float32(-limit), np.float32(limit))
    return (up + 1) * gate * activate(gate * np.float32(alpha), "sigmoid")


def softmax(x: Floats, sink: np.float32 | None = None) -> Floats:
    """Over the last axis; a sink takes its share of each row and adds nothing (gpt-oss)."""
    top = x.max(axis=-1, keepdims=True)
    if sink is not None:
        top = np.maximum(top, sink)
    powers = np.exp(x - top)
    total = powers.sum(axis=-1, keepdims=True)
    if sink is not None:
        total = total + np.exp(sink - top)
    shares: Floats = powers / total
    return shares


def log_softmax(x: Floats) -> Floats:
    """Over the last axis, summed in float64."""
    wide = x.astype(np.float64)
    wide -= wide.max(axis=-1, keepdims=True)
    shares: Floats = (wide - np.log(np.exp(wide).sum(axis=-1, keepdims=True))).astype(np.float32)
    return shares
