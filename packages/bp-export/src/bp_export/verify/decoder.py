"""What a decoder computes, read from its ``config.json``: the plan that `bp_export.verify.forward` follows.

Written from transformers' config and model classes, and on purpose not from `bp_export.architectures`: the exporter and
this reading must not share a mistake. Weights decide what a config only claims: biases, norms on q and k, experts and
an output head of its own are used if their tensors exist.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any, Literal, TypeAlias

Activation: TypeAlias = Literal["silu", "gelu_pytorch_tanh", "gelu", "relu"]
_ACTIVATIONS: dict[str, Activation] = {
    "silu": "silu",
    "swish": "silu",
    "gelu_pytorch_tanh": "gelu_pytorch_tanh",
    "gelu": "gelu",
    "relu": "relu",
}


class NotCoveredError(ValueError):
    """The forward pass does not know this model; the gate reports it as the reason for "not tested"."""


@dataclass(frozen=True, slots=True)
class Experts:
    """Mixture of experts: how a layer's router chooses."""

    active: int
    """Experts a token."""
    is_normalized: bool
    """Whether the chosen experts' probabilities are scaled to a sum of 1."""
    clamped: tuple[float, float] | None = None
    """gpt-oss: (alpha, limit) of (up + 1) gate sigmoid(alpha gate), gate and up no larger than the limit."""


@dataclass(frozen=True, slots=True)
class Delta:
    """Sizes of a gated delta net (arXiv:2412.06464)."""

    key_heads: int
    value_heads: int
    key_width: int
    value_width: int


@dataclass(frozen=True, slots=True)
class LayerPlan:
    """One decoder layer."""

    window: int | None
    """Tokens that a token sees, itself included; None for all before it."""
    rope: Mapping[str, Any] | None
    """Rotary settings as in transformers' ``rope_parameters``; None for a layer without positions."""
    is_recurrent: bool = False
    """Whether the layer is a gated delta net instead of attention."""
    is_convolution: bool = False
    """Whether the layer is a short convolution instead of attention (LFM2)."""


@dataclass(frozen=True, slots=True)
class DecoderPlan:
    """A decoder, with every default filled in."""

    layers: tuple[LayerPlan, ...]
    width: int
    heads: int
    key_heads: int
    head_width: int
    epsilon: float
    activation: Activation
    attention_scale: float
    """Factor on the products of queries and keys."""
    context: int
    """``max_position_embeddings``."""
    embedding_scale: float = 1.0
    attention_cap: float | None = None
    """Soft cap on attention scores: cap * tanh(score / cap)."""
    logit_cap: float | None = None
    logit_scale: float = 1.0
    """Factor on the output logits."""
    residual_scale: float = 1.0
    """Factor on what each block adds."""
    norm_offset: float = 0.0
    """Added to norm weights: 1 where the checkpoint stores them less one."""
    takes_mean_off: bool = False
    """Whether norms are LayerNorms (arXiv:1607.06450) instead of RMSNorms."""
    is_parallel: bool = False
    """Whether attention and feed-forward read the same norm and are added together (Cohere)."""
    is_interleaved: bool = False
    """Whether neighboring values of a head are rotated as a pair, and not its halves (GLM-4, Cohere)."""
    temperature: tuple[float, int] | None = None
    """Queries grow with their position: 1 + first * ln(1 + floor(position / second)), as in Llama 4 and Ministral 3."""
    has_output_gate: bool = False
    """Whether q_proj also holds a sigmoid gate on the attention's output (Qwen3.5)."""
    experts: Experts | None = None
    delta: Delta | None = None

    @property
    def longest_window(self) -> int | None:
        """The largest window of any layer; None without windows."""
        return max((layer.window for layer in self.layers if layer.window is not None), default=None)


@dataclass(frozen=True, slots=True)
class _Family:
    """Defaults of transformers' config class, and what the model class does by itself."""

    defaults: Mapping[str, Any] = field(default_factory=dict)
    theta: float = 10_000.0
    norm_offset: float = 0.0


_QWEN_3 = {"head_dim": 128, "max_window_layers": 28, "sliding_window": 4096}
_GEMMA = {
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "hidden_size": 2304,
    "num_hidden_layers": 26,
    "hidden_activation": "gelu_pytorch_tanh",
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
}
_DELTA = {
    "head_dim": 256,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
    "linear_num_key_heads": 16,
    "linear_num_value_heads": 32,
    "partial_rotary_factor": 0.25,
}
_COHERE = {"rms_norm_eps": 1e-5, "logit_scale": 0.0625, "max_position_embeddings": 8192}
_MINISTRAL = {"num_key_value_heads": 8, "head_dim": 128, "rms_norm_eps": 1e-5, "sliding_window": None}
_FAMILIES: Mapping[str, _Family] = MappingProxyType(
    {
        "LlamaForCausalLM": _Family({"max_position_embeddings": 2048}),
        "MistralForCausalLM": _Family(
            {"num_key_value_heads": 8, "sliding_window": 4096, "max_position_embeddings": 131072}
        ),
        "MixtralForCausalLM": _Family(
            {
                "num_key_value_heads": 8,
                "rms_norm_eps": 1e-5,
                "num_experts_per_tok": 2,
                "max_position_embeddings": 131072,
            },
            theta=1e6,
        ),
        "Qwen2ForCausalLM": _Family({"max_window_layers": 28, "sliding_window": 4096}),
        "Qwen3ForCausalLM": _Family(_QWEN_3),
        "Qwen2MoeForCausalLM": _Family(
            {"num_experts_per_tok": 4, "sliding_window": 4096, "max_window_layers": 28, "num_key_value_heads": 16}
        ),
        "OlmoeForCausalLM": _Family({"num_experts_per_tok": 8, "rms_norm_eps": 1e-5, "max_position_embeddings": 4096}),
        "GptOssForCausalLM": _Family(
            {
                "num_attention_heads": 64,
                "num_key_value_heads": 8,
                "head_dim": 64,
                "rms_norm_eps": 1e-5,
                "num_experts_per_tok": 4,
                "sliding_window": 128,
                "max_position_embeddings": 131072,
                "rope_parameters": {
                    "rope_type": "yarn",
                    "factor": 32.0,
                    "truncate": False,
                    "original_max_position_embeddings": 4096,
                },
            },
            theta=150_000.0,
        ),
        "Qwen3MoeForCausalLM": _Family(
            {**_QWEN_3, "head_dim": None, "num_experts_per_tok": 8, "num_key_value_heads": 4}
        ),
        "Qwen3_5ForCausalLM": _Family(_DELTA, norm_offset=1.0),
        "Qwen3_5ForConditionalGeneration": _Family(_DELTA, norm_offset=1.0),
        "Phi3ForCausalLM": _Family({"rms_norm_eps": 1e-5, "max_position_embeddings": 4096}),
        "SmolLM3ForCausalLM": _Family({"num_key_value_heads": 4}, theta=2_000_000.0),
        "Olmo2ForCausalLM": _Family({"max_position_embeddings": 2048, "rms_norm_eps": 1e-5}),
        "Olmo3ForCausalLM": _Family(
            {"max_position_embeddings": 2048, "rms_norm_eps": 1e-5, "sliding_window": 4096}, theta=500_000.0
        ),
        "Glm4ForCausalLM": _Family(
            {"head_dim": 128, "num_key_value_heads": 2, "rms_norm_eps": 1.5625e-07, "partial_rotary_factor": 0.5}
        ),
        "Lfm2ForCausalLM": _Family({"num_key_value_heads": 8, "rms_norm_eps": 1e-5}, theta=1e6),
        "Exaone4ForCausalLM": _Family(
            {"rms_norm_eps": 1e-5, "sliding_window": 4096, "num_key_value_heads": 32, "max_position_embeddings": 2048}
        ),
        "CohereForCausalLM": _Family(_COHERE, theta=500_000.0),
        "Cohere2ForCausalLM": _Family({**_COHERE, "sliding_window": 4096}),
        "HunYuanDenseV1ForCausalLM": _Family({"rms_norm_eps": 1e-5, "max_position_embeddings": 2048}),
        "Ministral3ForCausalLM": _Family(_MINISTRAL, theta=1e6),
        "Mistral3ForConditionalGeneration": _Family(_MINISTRAL, theta=1e6),
        "GraniteForCausalLM": _Family({"max_position_embeddings": 2048}),
        "Gemma2ForCausalLM": _Family(
            {**_GEMMA, "final_logit_softcapping": 30.0, "attn_logit_softcapping": 50.0}, norm_offset=1.0
        ),
        "Gemma3ForCausalLM": _Family(_GEMMA, norm_offset=1.0),
        "Gemma3ForConditionalGeneration": _Family(_GEMMA, norm_offset=1.0),
    }
)
COVERED = frozenset(_FAMILIES)
"""Class names of the models that the forward pass knows."""
_WINDOWED = ("Mistral", "Ministral3", "Phi3")
"""Families whose every layer has the window."""
_WITH_WINDOWS = (*_WINDOWED, "Gemma", "GptOss", "Olmo3", "Exaone4", "Cohere2")
"""Families that use a window without being told to."""


def read_decoder(config: Mapping[str, Any]) -> DecoderPlan:
    """The plan of a model.

    Args:
        config: ``config.json``; the text part of a larger model counts.

    Raises:
        NotCoveredError: The model, or one of its options, is not known here, or a size is missing.
    """
    name = str((config.get("architectures") or ["(none named)"])[0])
    if name not in _FAMILIES:
        raise NotCoveredError(f"the independent forward pass does not know {name}")
    family = _FAMILIES[name]
    words = {**config, **(config.get("text_config") or {})}
    words = {**family.defaults, **{key: value for key, value in words.items() if value is not None}, **_nulls(words)}
    plan = _read_common(words, family)
    plan = replace(plan, layers=_plan_layers(name, words, family))
    if name.startswith(("Gemma2", "Gemma3")):
        return _add_gemma(words, plan)
    if name.startswith("Qwen3_5"):
        return replace(plan, has_output_gate=True, delta=_read_delta(words))
    if name.startswith(("Mixtral", "Qwen2Moe", "Qwen3Moe", "Olmoe", "GptOss")):
        return replace(plan, experts=_read_experts(name, words))
    if name.startswith("Granite"):
        return _add_granite(words, plan)
    if words.get("model_type") == "ministral3":
        return _add_ministral(plan)
    if name.startswith("Cohere"):
        return _add_cohere(words, plan)
    return replace(plan, is_interleaved=name.startswith("Glm4"))


def _read_experts(name: str, words: Mapping[str, Any]) -> Experts:
    """gpt-oss's softmax over the chosen experts is the scaling of all experts' softmax to a sum of 1."""
    if words.get("clip_qkv") is not None:
        raise NotCoveredError("the independent forward pass does not know clip_qkv")
    is_normalized = name.startswith(("Mixtral", "GptOss")) or bool(words.get("norm_topk_prob"))
    numbers = (float(words.get("swiglu_alpha", 1.702)), float(words.get("swiglu_limit", 7.0)))
    return Experts(
        _read_count(words, "num_experts_per_tok"), is_normalized, numbers if name.startswith("GptOss") else None
    )


def _nulls(words: Mapping[str, Any]) -> dict[str, Any]:
    """Options for which null is a choice of its own: no window, no cap."""
    keys = ("sliding_window", "final_logit_softcapping", "attn_logit_softcapping")
    return {key: None for key in keys if key in words and words[key] is None}


def _read_common(words: Mapping[str, Any], family: _Family) -> DecoderPlan:
    heads = _read_count(words, "num_attention_heads")
    width = _read_count(words, "hidden_size")
    head_width = int(words.get("head_dim") or width // heads)
    activation = str(words.get("hidden_activation") or words.get("hidden_act") or "silu")
    if activation not in _ACTIVATIONS:
        raise NotCoveredError(f"the independent forward pass does not know the activation {activation}")
    return DecoderPlan(
        layers=(),
        width=width,
        heads=heads,
        key_heads=int(words.get("num_key_value_heads") or heads),
        head_width=head_width,
        epsilon=float(words.get("norm_eps") or words.get("rms_norm_eps", 1e-6)),
        activation=_ACTIVATIONS[activation],
        attention_scale=head_width**-0.5,
        context=int(words.get("max_position_embeddings", 32768)),
        norm_offset=family.norm_offset,
    )


def _add_gemma(words: Mapping[str, Any], plan: DecoderPlan) -> DecoderPlan:
    if words.get("use_bidirectional_attention"):
        raise NotCoveredError("the independent forward pass does not know use_bidirectional_attention")
    name = str(words["architectures"][0])
    is_third = "Gemma3" in name  # whose attention class ignores its cap
    has_cap = not name.endswith("ForConditionalGeneration")  # which ignores it on its logits
    return replace(
        plan,
        embedding_scale=plan.width**0.5,
        attention_scale=float(words["query_pre_attn_scalar"]) ** -0.5,
        attention_cap=None if is_third else words.get("attn_logit_softcapping"),
        logit_cap=words.get("final_logit_softcapping") if has_cap else None,
    )


def _add_cohere(words: Mapping[str, Any], plan: DecoderPlan) -> DecoderPlan:
    if words.get("use_qk_norm"):
        raise NotCoveredError("the independent forward pass does not know use_qk_norm")
    return replace(
        plan,
        takes_mean_off=True,
        is_parallel=True,
        is_interleaved=True,
        epsilon=float(words.get("layer_norm_eps", plan.epsilon)),
        logit_scale=float(words["logit_scale"]),
    )


def _add_ministral(plan: DecoderPlan) -> DecoderPlan:
    rope = plan.layers[0].rope or {}
    try:
        return replace(
            plan, temperature=(float(rope["llama_4_scaling_beta"]), int(rope["original_max_position_embeddings"]))
        )
    except (KeyError, TypeError) as error:
        raise NotCoveredError(f"config.json scales queries by position without {error}") from error


def _add_granite(words: Mapping[str, Any], plan: DecoderPlan) -> DecoderPlan:
    return replace(
        plan,
        embedding_scale=float(words.get("embedding_multiplier", 1.0)),
        attention_scale=float(words.get("attention_multiplier", 1.0)),
        residual_scale=float(words.get("residual_multiplier", 1.0)),
        logit_scale=1 / float(words.get("logits_scaling", 1.0)),
    )


def _read_delta(words: Mapping[str, Any]) -> Delta:
    return Delta(
        key_heads=_read_count(words, "linear_num_key_heads"),
        value_heads=_read_count(words, "linear_num_value_heads"),
        key_width=_read_count(words, "linear_key_head_dim"),
        value_width=_read_count(words, "linear_value_head_dim"),
    )


def _plan_layers(name: str, words: Mapping[str, Any], family: _Family) -> tuple[LayerPlan, ...]:
    count = _read_count(words, "num_hidden_layers")
    kinds = _read_kinds(name, words, count)
    has_window = name.startswith(_WITH_WINDOWS) or bool(words.get("use_sliding_window"))
    window = int(words["sliding_window"]) if has_window and words.get("sliding_window") else None
    rotated = _read_rotated(words, count) if name.startswith("SmolLM3") else [True] * count
    if window and name.startswith(("Exaone4", "Cohere2")):
        rotated = [kind == "sliding_attention" for kind in kinds]
    ropes = {kind: _read_rope(name, words, kind, family) for kind in set(kinds)}
    return tuple(
        LayerPlan(
            window=window if kind == "sliding_attention" else None,
            rope=ropes[kind] if has_rope else None,
            is_recurrent=kind == "linear_attention",
            is_convolution=kind == "conv",
        )
        for kind, has_rope in zip(kinds, rotated, strict=True)
    )


def _read_kinds(name: str, words: Mapping[str, Any], count: int) -> list[str]:
    """By layer, as in ``layer_types`` of transformers."""
    if name.startswith(_WINDOWED):
        return ["sliding_attention"] * count
    if found := words.get("layer_types"):
        if len(found) < count:
            raise NotCoveredError(f"config.json has {len(found)} layer_types for {count} layers")
        return [str(kind) for kind in found[:count]]
    if (every := _find_interval(name, words)) is not None:
        return _repeat("linear_attention" if name.startswith("Qwen3_5") else "sliding_attention", every, count)
    if name.startswith("Lfm2"):
        attending = words.get("full_attn_idxs")
        return ["full_attention" if attending is None or i in attending else "conv" for i in range(count)]
    if words.get("use_sliding_window") and name.startswith("SmolLM3"):
        return ["full_attention" if has_rope else "sliding_attention" for has_rope in _read_rotated(words, count)]
    if words.get("use_sliding_window"):
        first = int(words.get("max_window_layers", 28)) if not name.startswith("Qwen3Moe") else 0
        return ["sliding_attention" if i >= first else "full_attention" for i in range(count)]
    return ["full_attention"] * count


def _find_interval(name: str, words: Mapping[str, Any]) -> int | None:
    """One layer in so many sees the whole text, in families where that is the rule; None in others."""
    fixed = {"Gemma2": 2, "GptOss": 2, "Olmo3": 4}
    if (found := next((every for stem, every in fixed.items() if name.startswith(stem)), None)) is not None:
        return found
    if name.startswith("Qwen3_5"):
        return int(words.get("full_attention_interval", 4))
    if name.startswith("Gemma"):
        return int(words.get("sliding_window_pattern", 6))
    if not name.startswith(("Exaone4", "Cohere2")):
        return None
    pattern = words.get("sliding_window_pattern") or 4
    every = len(pattern) if isinstance(pattern, str) else int(pattern)  # "LLLG" means 4
    return every if words.get("sliding_window") else 1


def _repeat(kind: str, every: int, count: int) -> list[str]:
    """Layers of a kind, but for one with full attention in every so many."""
    return [kind if (i + 1) % every else "full_attention" for i in range(count)]


def _read_rotated(words: Mapping[str, Any], count: int) -> list[bool]:
    """SmolLM3: which layers have rotary positions (arXiv:2501.18795, "NoPE")."""
    every = int(words.get("no_rope_layer_interval", 4))
    return [bool(has) for has in words.get("no_rope_layers") or [(i + 1) % every for i in range(count)]]


def _read_rope(name: str, words: Mapping[str, Any], kind: str, family: _Family) -> Mapping[str, Any]:
    """One kind of layer's rotary settings, old and new spelling, with defaults filled in."""
    rope = dict(words.get("rope_scaling") or words.get("rope_parameters") or {})
    if name.startswith("Olmo3") and kind == "sliding_attention" and words.get("rope_scaling"):
        rope = {}  # older files scale the layers that see the whole text
    is_nested = any(isinstance(rope.get(key), dict) for key in ("full_attention", "sliding_attention"))
    if name.startswith("Gemma3"):
        rope = _read_gemma_rope(words, rope, kind, is_nested=is_nested)
    elif is_nested:
        rope = dict(rope.get(kind) or {})
    rope.setdefault("rope_type", rope.get("type", "default"))
    rope.setdefault("rope_theta", words.get("rope_theta", family.theta))
    if "partial_rotary_factor" in words:
        rope.setdefault("partial_rotary_factor", words["partial_rotary_factor"])
    if "original_max_position_embeddings" in words:
        rope["original_max_position_embeddings"] = words["original_max_position_embeddings"]
    if name.startswith("Phi3") and rope["rope_type"] in ("su", "yarn"):
        rope["rope_type"] = "longrope"
    return rope


def _read_gemma_rope(words: Mapping[str, Any], rope: dict[str, Any], kind: str, *, is_nested: bool) -> dict[str, Any]:
    """Gemma 3 has two embeddings: ``rope_scaling`` and ``rope_theta`` are those of layers that see the whole text."""
    is_full = kind == "full_attention"
    if is_nested:
        rope = dict(rope.get(kind) or {})
    elif not is_full:
        rope = {}
    key, theta = ("rope_theta", 1_000_000.0) if is_full else ("rope_local_base_freq", 10_000.0)
    rope.setdefault("rope_theta", words.get(key, theta))
    return rope


def _read_count(words: Mapping[str, Any], key: str) -> int:
    value = words.get(key)
    if not isinstance(value, int) or value < 1:
        raise NotCoveredError(f"config.json has no usable {key}")
    return value
