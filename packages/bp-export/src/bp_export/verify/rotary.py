"""Rotary position embeddings and their scalings, from the papers and transformers' ``modeling_rope_utils``.

default     arXiv:2104.09864
linear      positions divided by a factor
yarn        arXiv:2309.00071, with transformers' ``attention_factor``, ``mscale``, ``mscale_all_dim`` and ``truncate``
llama3      Llama 3.1's blend of stretched and original wavelengths
dynamic     one base for all texts, stretched by Hunyuan's ``alpha``
longrope    arXiv:2402.13753, long and short factors by the length of the text
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from bp_export.verify.decoder import DecoderPlan, NotCoveredError

Floats: TypeAlias = NDArray[np.float32]
_Wide: TypeAlias = NDArray[np.float64]


def rotate(x: Floats, rope: Mapping[str, Any], plan: DecoderPlan) -> Floats:
    """Turn each head's halves, or its neighboring pairs, by its position's angles.

    Args:
        x: Queries or keys: (tokens, heads, head width).
        rope: One layer's rotary settings.
        plan: The model's.

    Raises:
        NotCoveredError: The scaling is not known here.
    """
    frequencies, scale = compute_frequencies(rope, plan, len(x))
    angles = np.arange(len(x))[:, None] * frequencies  # (tokens, rotated / 2)
    cos, sin = (f(angles).astype(np.float32)[:, None] * np.float32(scale) for f in (np.cos, np.sin))
    half = len(frequencies)
    part, rest = x[..., : 2 * half], x[..., 2 * half :]
    first, second = (part[..., ::2], part[..., 1::2]) if plan.is_interleaved else (part[..., :half], part[..., half:])
    pair = (first * cos - second * sin, second * cos + first * sin)
    joined = np.stack(pair, axis=-1).reshape(part.shape) if plan.is_interleaved else np.concatenate(pair, axis=-1)
    turned: Floats = np.concatenate([joined, rest], axis=-1)
    return turned


def scale_by_position(q: Floats, plan: DecoderPlan) -> Floats:
    """Queries as they grow with the position where the plan says so: (tokens, heads, head width)."""
    if plan.temperature is None:
        return q
    beta, original = plan.temperature
    factors = 1 + beta * np.log1p(np.arange(len(q)) // original)
    scaled: Floats = q * factors.astype(np.float32)[:, None, None]
    return scaled


def compute_frequencies(rope: Mapping[str, Any], plan: DecoderPlan, tokens: int) -> tuple[_Wide, float]:
    """Radians a token for each rotated pair, and the factor on cosines and sines.

    Args:
        rope: One layer's rotary settings.
        plan: The model's.
        tokens: Length of the text, which LongRoPE's choice depends on.

    Raises:
        NotCoveredError: The scaling is not known here, or lacks a number.
    """
    kind = str(rope["rope_type"])
    if kind not in _KINDS:
        raise NotCoveredError(f"the independent forward pass does not know rotary scaling {kind}")
    rotated = int(plan.head_width * float(rope.get("partial_rotary_factor", 1.0)))
    theta = float(rope["rope_theta"])
    plain: _Wide = theta ** (-np.arange(0, rotated, 2, dtype=np.float64) / rotated)
    try:
        return _KINDS[kind](plain, rope, plan, tokens)
    except (KeyError, TypeError) as error:
        raise NotCoveredError(f"config.json scales rotary positions by {kind} without {error}") from error


def _keep(plain: _Wide, rope: Mapping[str, Any], plan: DecoderPlan, tokens: int) -> tuple[_Wide, float]:
    del rope, plan, tokens
    return plain, 1.0


def _stretch(plain: _Wide, rope: Mapping[str, Any], plan: DecoderPlan, tokens: int) -> tuple[_Wide, float]:
    """Hunyuan's "dynamic": the base is multiplied by alpha ^ (dim / (dim - 2)), for texts of any length."""
    del plan, tokens
    if not rope.get("alpha"):
        raise NotCoveredError("the independent forward pass does not know rotary scaling dynamic without alpha")
    dim = 2 * len(plain)
    base = float(rope["rope_theta"]) * float(rope["alpha"]) ** (dim / (dim - 2))
    stretched: _Wide = base ** (-np.arange(0, dim, 2, dtype=np.float64) / dim)
    return stretched, 1.0


def _divide(plain: _Wide, rope: Mapping[str, Any], plan: DecoderPlan, tokens: int) -> tuple[_Wide, float]:
    del plan, tokens
    return plain / float(rope["factor"]), 1.0


def _blend_yarn(plain: _Wide, rope: Mapping[str, Any], plan: DecoderPlan, tokens: int) -> tuple[_Wide, float]:
    """Fast pairs keep their frequency, slow ones are divided by the factor, with a linear ramp between."""
    del tokens
    original = float(rope.get("original_max_position_embeddings") or plan.context)
    factor = float(rope["factor"] if rope["factor"] is not None else plan.context / original)
    dim, theta = 2 * len(plain), float(rope["rope_theta"])

    def find_pair(turns: float) -> float:
        """The pair that turns so often within the original context."""
        return dim * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low, high = find_pair(float(rope.get("beta_fast") or 32)), find_pair(float(rope.get("beta_slow") or 1))
    if rope.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    ramp = np.clip((np.arange(len(plain)) - low) / (high - low if high != low else 0.001), 0, 1)
    return plain / factor * ramp + plain * (1 - ramp), _scale_yarn(rope, factor)


def _scale_yarn(rope: Mapping[str, Any], factor: float) -> float:
    """The factor on cosines and sines, so its square is on the scores: 0.1 ln(factor) + 1 if nothing else is set."""
    if rope.get("attention_factor") is not None:
        return float(rope["attention_factor"])

    def temper(weight: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0

    above, below = rope.get("mscale"), rope.get("mscale_all_dim")
    return temper(float(above)) / temper(float(below)) if above and below else temper(1.0)


def _blend_llama3(plain: _Wide, rope: Mapping[str, Any], plan: DecoderPlan, tokens: int) -> tuple[_Wide, float]:
    del tokens
    factor, low, high = (float(rope[key]) for key in ("factor", "low_freq_factor", "high_freq_factor"))
    original = float(rope.get("original_max_position_embeddings") or plan.context)
    turns = original * plain / (2 * math.pi)  # within the original context
    share = np.clip((turns - low) / (high - low), 0, 1)
    return plain / factor * (1 - share) + plain * share, 1.0


def _choose_longrope(plain: _Wide, rope: Mapping[str, Any], plan: DecoderPlan, tokens: int) -> tuple[_Wide, float]:
    original = float(rope.get("original_max_position_embeddings") or plan.context)
    factor = float(rope.get("factor") or plan.context / original)
    chosen = np.array(rope["long_factor" if tokens > original else "short_factor"], np.float64)
    if chosen.shape != plain.shape:
        raise NotCoveredError(f"config.json has {chosen.size} rotary factors for {plain.size} pairs")
    scale = 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original))
    return plain / chosen, float(rope.get("attention_factor") or scale)


_KINDS: Mapping[str, Callable[[_Wide, Mapping[str, Any], DecoderPlan, int], tuple[_Wide, float]]] = {
    "default": _keep,
    "dynamic": _stretch,
    "linear": _divide,
    "yarn": _blend_yarn,
    "llama3": _blend_llama3,
    "longrope": _choose_longrope,
}
