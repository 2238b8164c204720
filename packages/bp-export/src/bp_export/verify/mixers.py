"""What a layer may have instead of plain attention or feed-forward: a gated delta net, or a mixture of experts."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

from bp_export.verify.decoder import Delta, Experts
from bp_export.verify.ops import Floats, activate, normalize, softmax

_L2_EPSILON = np.float32(1e-6)


def mix_experts(x: Floats, scores: Floats, experts: Experts, run_expert: Callable[[Floats, int], Floats]) -> Floats:
    """The chosen experts' outputs, weighted by the router: (tokens, width).

    Args:
        x: (tokens, width).
        scores: The router's logits: (tokens, experts).
        experts: How many are chosen, and how they are weighted.
        run_expert: One expert's output for some tokens.
    """
    shares = softmax(scores)
    chosen = np.argsort(-shares, axis=1, kind="stable")[:, : experts.active]
    weights = np.take_along_axis(shares, chosen, axis=1)
    if experts.is_normalized:
        weights = weights / weights.sum(axis=1, keepdims=True)
    out = np.zeros_like(x)
    for index in np.unique(chosen):
        tokens, slots = np.nonzero(chosen == index)
        out[tokens] += run_expert(x[tokens], int(index)) * weights[tokens, slots][:, None]
    return out


def mix_delta(parts: Mapping[str, Floats], small: Mapping[str, Floats], sizes: Delta, epsilon: float) -> Floats:
    """A gated delta net, token by token (arXiv:2412.06464; ``torch_recurrent_gated_delta_rule`` in transformers).

    The state S of each value head, (key width, value width), decays and is corrected towards what is to be stored:
    S <- exp(g) S;  S <- S + k (beta (v - k S));  out = q S / sqrt(key width).

    Args:
        parts: Projections of the input, (tokens, …): ``qkv``, ``z`` (gate), ``a`` (decay), ``b`` (beta).
        small: ``A_log``, ``dt_bias``, ``norm.weight`` and ``conv1d.weight``.
        sizes: Of the heads.
        epsilon: Of the norm.

    Returns:
        (tokens, value heads * value width), before the output projection.
    """
    tokens, repeats = len(parts["qkv"]), sizes.value_heads // sizes.key_heads
    q, k, v = _split_heads(_convolve(parts["qkv"], small["conv1d.weight"]), sizes)
    # Each key head serves neighboring value heads.
    q, k = (np.repeat(_normalize_length(part), repeats, axis=1) for part in (q, k))
    q = q / np.float32(np.sqrt(sizes.key_width))
    beta = activate(parts["b"], "sigmoid")
    step = parts["a"] + small["dt_bias"].reshape(-1)
    decay = np.exp(-np.exp(small["A_log"].reshape(-1)) * np.logaddexp(0, step)).astype(np.float32)  # softplus
    state = np.zeros((sizes.value_heads, sizes.key_width, sizes.value_width), np.float32)
    out = np.empty_like(v)
    for t in range(tokens):
        state *= decay[t][:, None, None]
        stored = np.einsum("hkv,hk->hv", state, k[t])
        state += k[t][:, :, None] * ((v[t] - stored) * beta[t][:, None])[:, None]
        out[t] = np.einsum("hkv,hk->hv", state, q[t])
    gate = activate(parts["z"], "silu").reshape(out.shape)
    return (normalize(out, small["norm.weight"].reshape(-1), epsilon) * gate).reshape(tokens, -1)


def _convolve(x: Floats, weight: Floats) -> Floats:
    """A causal convolution of each channel by itself, then SiLU: (tokens, channels)."""
    return activate(convolve(x, weight), "silu")


def convolve(x: Floats, weight: Floats) -> Floats:
    """A causal convolution of each channel by itself: (tokens, channels)."""
    taps = weight.reshape(x.shape[1], -1)  # (channels, kernel)
    size = taps.shape[1]
    padded = np.concatenate([np.zeros((size - 1, x.shape[1]), np.float32), x])
    summed: Floats = np.add.reduce([padded[i : i + len(x)] * taps[:, i] for i in range(size)])
    return summed


def _split_heads(x: Floats, sizes: Delta) -> tuple[Floats, Floats, Floats]:
    keys = sizes.key_heads * sizes.key_width
    q, k, v = np.split(x, [keys, 2 * keys], axis=1)
    widths = ((q, sizes.key_width), (k, sizes.key_width), (v, sizes.value_width))
    q, k, v = (part.reshape(len(x), -1, width) for part, width in widths)
    return q, k, v


def _normalize_length(x: Floats) -> Floats:
    scaled: Floats = x / np.sqrt(np.square(x).sum(axis=-1, keepdims=True) + _L2_EPSILON)
    return scaled
