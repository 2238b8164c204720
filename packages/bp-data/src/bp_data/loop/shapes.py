"""A model's matrices and sizes, read from its config.json alone: no weights, no framework."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from bp_runs.errors import ShapesUnknownError

_SEPARATE = frozenset(
    {"llama", "mistral", "qwen2", "qwen3", "smollm3", "granite", "gemma", "gemma2", "gemma3_text", "olmo2"}
)
_JOINED = frozenset({"phi3"})
_HYBRID = frozenset({"qwen3_5_text"})
_MIXTURES = frozenset({"qwen3_moe", "qwen2_moe", "mixtral", "olmoe", "gpt_oss"})
_NESTED = frozenset({"qwen3_5", "gemma3"})
"""Their text model's config stands under ``text_config``, and only that model is trained."""
FAMILIES = _SEPARATE | _JOINED | _HYBRID | _NESTED | _MIXTURES
"""Values of ``model_type`` whose layers are known here; others are measured by building the model without weights."""


@dataclass(frozen=True, slots=True)
class Linear:
    """Matrices (out, inp) of one name, in ``count`` layers."""

    name: str
    inp: int
    out: int
    count: int

    @property
    def parameters(self) -> int:
        """Of all layers together, without biases."""
        return self.inp * self.out * self.count


@dataclass(frozen=True, slots=True, kw_only=True)
class Shapes:
    """What memory and time depend on; sizes are numbers of elements."""

    model_type: str
    hidden: int
    layers: int
    vocabulary: int
    feed_forward: int
    """Width inside a layer's feed-forward part: in a mixture that of all experts that a token passes."""
    queries: int
    """Width of all query heads together."""
    keys: int
    """Width of all key heads together."""
    linears: tuple[Linear, ...]
    """All but the head: those that all-linear adapts and a 4-bit base quantizes."""
    others: int
    """Parameters of norms, biases and convolutions."""
    tied: bool
    """Whether embedding and head are one matrix."""
    experts: tuple[Linear, ...] = ()
    """Matrices of single experts, counted over layers and experts. transformers holds them as parameters of a layer, so
    neither all-linear nor a 4-bit base reaches them."""
    active_experts: int = 0
    """Experts that a token passes in a layer."""
    score_heads: int = 0
    """Heads whose attention scores are held whole, as gpt-oss's sinks need."""

    @property
    def embedding(self) -> int:
        """Parameters of embedding and head."""
        return self.vocabulary * self.hidden * (1 if self.tied else 2)

    @property
    def in_linears(self) -> int:
        """Parameters of the linear layers."""
        return sum(linear.parameters for linear in self.linears)

    @property
    def parameters(self) -> int:
        """Of the whole model."""
        return self.in_linears + self.in_experts + self.embedding + self.others

    @property
    def in_experts(self) -> int:
        """Parameters of experts."""
        return sum(linear.parameters for linear in self.experts)


def read_shapes(config: Mapping[str, Any]) -> Shapes:
    """The shapes that ``config``, the content of a config.json, describes.

    Raises:
        ShapesUnknownError: Its ``model_type`` is not of `FAMILIES`, or a size is missing.
    """
    kind = str(config.get("model_type", "none"))
    if kind not in FAMILIES:
        raise ShapesUnknownError(f"the layers of a {kind} model are not known here")
    text = {**config, **config["text_config"]} if kind in _NESTED and "text_config" in config else config
    kind = {"qwen3_5": "qwen3_5_text", "gemma3": "gemma3_text"}.get(kind, kind)
    try:
        return _read(kind, text)
    except (KeyError, TypeError) as error:
        raise ShapesUnknownError(f"the config of a {kind} model lacks a size", cause=str(error)) from error


@dataclass(frozen=True, slots=True)
class _Sizes:
    """Of a layer, while the model is put together."""

    kind: str
    text: Mapping[str, Any]
    hidden: int
    inner: int
    layers: int
    attention: int
    """Layers with softmax attention."""
    head: int
    queries: int
    keys: int


def _read(kind: str, text: Mapping[str, Any]) -> Shapes:
    hidden, layers, heads = text["hidden_size"], text["num_hidden_layers"], text["num_attention_heads"]
    head = text.get("head_dim") or _DEFAULT_HEAD.get(kind) or hidden // heads
    queries, keys = heads * head, (text.get("num_key_value_heads") or heads) * head
    attention = layers - (_count_linear_attention(text, layers) if kind in _HYBRID else 0)
    sizes = _Sizes(kind, text, hidden, text["intermediate_size"], layers, attention, head, queries, keys)
    linears = _attention(sizes) + (_shared_expert(sizes) if kind in _MIXTURES else _feed_forward(sizes))
    others = _count_norms(sizes) + _count_biases(sizes)
    experts = _read_experts(sizes) if kind in _MIXTURES else ()
    active = int(text.get("num_experts_per_tok", _ACTIVE[kind])) if experts else 0
    if kind in _HYBRID:
        more, extra = _linear_attention(sizes)
        linears, others = linears + more, others + extra
    return Shapes(
        model_type=kind,
        hidden=hidden,
        layers=layers,
        vocabulary=text["vocab_size"],
        feed_forward=active * experts[1].inp + _shared_width(sizes) if experts else sizes.inner,
        queries=queries,
        keys=keys,
        linears=tuple(linear for linear in linears if linear.count),
        others=others,
        tied=text.get("tie_word_embeddings", kind in _TIED),
        experts=experts,
        active_experts=active,
        score_heads=int(heads) if kind == "gpt_oss" else 0,
    )


# What transformers' config classes take where the file is silent.
_TIED = frozenset({"gemma", "gemma2", "gemma3_text", "smollm3"})
_ACTIVE = {"qwen3_moe": 8, "qwen2_moe": 4, "mixtral": 2, "olmoe": 8, "gpt_oss": 4}
_DEFAULT_HEAD = {"gpt_oss": 64, "gemma": 256, "gemma2": 256, "gemma3_text": 256, "qwen3": 128, "qwen3_5_text": 256}


def _attention(of: _Sizes) -> tuple[Linear, ...]:
    out = Linear("o_proj", of.queries, of.hidden, of.attention)
    if of.kind in _JOINED:
        return Linear("qkv_proj", of.hidden, of.queries + 2 * of.keys, of.attention), out
    gated = 2 if of.kind in _HYBRID else 1  # queries come with a gate for the output
    return (
        Linear("q_proj", of.hidden, gated * of.queries, of.attention),
        Linear("k_proj", of.hidden, of.keys, of.attention),
        Linear("v_proj", of.hidden, of.keys, of.attention),
        out,
    )


def _feed_forward(of: _Sizes) -> tuple[Linear, ...]:
    down = Linear("down_proj", of.inner, of.hidden, of.layers)
    if of.kind in _JOINED:
        return Linear("gate_up_proj", of.hidden, 2 * of.inner, of.layers), down
    return Linear("gate_proj", of.hidden, of.inner, of.layers), Linear("up_proj", of.hidden, of.inner, of.layers), down


def _count_experts(text: Mapping[str, Any]) -> int:
    return int(text.get("num_local_experts") or text["num_experts"])


def _read_experts(of: _Sizes) -> tuple[Linear, ...]:
    """Gate and up as one matrix, and down, of every expert of every layer."""
    if of.text.get("mlp_only_layers") or of.text.get("decoder_sparse_step", 1) != 1:
        raise ShapesUnknownError(f"layers without experts in a {of.kind} model are not known here")
    count, inner = _count_experts(of.text) * of.layers, of.text.get("moe_intermediate_size") or of.inner
    return Linear("gate_up_proj", of.hidden, 2 * inner, count), Linear("down_proj", inner, of.hidden, count)


def _shared_width(of: _Sizes) -> int:
    """Of the expert that reads every token; 0 without one."""
    return int(of.text["shared_expert_intermediate_size"]) if of.kind == "qwen2_moe" else 0


def _shared_expert(of: _Sizes) -> tuple[Linear, ...]:
    if not (width := _shared_width(of)):
        return ()
    gate = Linear("shared_expert_gate", of.hidden, 1, of.layers)
    return (*_feed_forward(replace(of, inner=width)), gate)


def _count_norms(of: _Sizes) -> int:
    in_layer = 4 if of.kind in {"gemma2", "gemma3_text"} else 2
    count = of.hidden * (in_layer * of.layers + 1)
    if of.kind in _MIXTURES:
        count += _count_experts(of.text) * of.hidden * of.layers  # routers
    if of.kind in {"qwen3", "qwen3_moe", "gemma3_text", "qwen3_5_text"}:
        count += 2 * of.head * of.attention
    if of.kind in {"olmo2", "olmoe"}:
        count += (of.queries + of.keys) * of.layers
    return count


def _count_biases(of: _Sizes) -> int:
    attention = of.queries + 2 * of.keys
    if of.kind in {"qwen2", "qwen2_moe"}:
        return attention * of.layers
    if of.kind == "gpt_oss":
        experts, heads = _count_experts(of.text), of.queries // of.head
        return (attention + of.hidden + heads + experts * (2 * of.inner + of.hidden + 1)) * of.layers
    count = (attention + of.hidden) * of.layers if of.text.get("attention_bias") and of.kind not in _HYBRID else 0
    if of.text.get("mlp_bias"):
        count += (2 * of.inner + of.hidden) * of.layers
    return count


def _count_linear_attention(text: Mapping[str, Any], layers: int) -> int:
    kinds = text.get("layer_types")
    if kinds:
        return sum(kind == "linear_attention" for kind in kinds)
    every = text.get("full_attention_interval", 4)
    return layers - layers // int(every)


def _linear_attention(of: _Sizes) -> tuple[tuple[Linear, ...], int]:
    """Matrices and other parameters of gated delta-net layers (Yang et al., arXiv:2412.06464)."""
    layers = of.layers - of.attention
    heads = of.text.get("linear_num_value_heads", 32)
    value_head = of.text.get("linear_value_head_dim", 128)
    key = of.text.get("linear_num_key_heads", 16) * of.text.get("linear_key_head_dim", 128)
    value = heads * value_head
    mixed = 2 * key + value
    linears = (
        Linear("in_proj_qkv", of.hidden, mixed, layers),
        Linear("in_proj_z", of.hidden, value, layers),
        Linear("in_proj_b", of.hidden, heads, layers),
        Linear("in_proj_a", of.hidden, heads, layers),
        Linear("out_proj", value, of.hidden, layers),
    )
    convolution = mixed * of.text.get("linear_conv_kernel_dim", 4)
    return linears, (convolution + 2 * heads + value_head) * layers
