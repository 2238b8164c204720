"""Which tensor of a model gets which type: llama.cpp's mixtures, for dense decoders and mixtures of experts.

The rules are those of ``llama_tensor_get_type_impl`` and ``tensor_type_fallback`` in llama.cpp's llama-quant.cpp
(read in b11434), for the file types offered here. Tested against ``llama_model_quantize``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

from bp_export.quant.kernels import TensorType, read_block
from bp_export.quant.types import Quantization

_BIG_LLAMA_LAYERS = 80
_MANY_HEADS_A_VALUE = 4
# Parts of names, from ``tensor_allows_quantization``: what is small, and what must be exact.
_NEVER_QUANTIZED = (
    *(
        "_norm.weight",
        "ffn_gate_inp.weight",
        "ffn_gate_inp_shexp.weight",
        "ffn_gate_tid2eid.weight",
        "altup",
        "laurel",
        "per_layer_model_proj",
    ),
    *("position_embd.weight", "token_types.weight", "ssm_conv1d", "shortconv.conv.weight"),
    *("indexer.k_proj.weight", "indexer.q_proj.weight", "attn_rel_b.weight"),
    *(
        f"time_mix_{part}.weight"
        for part in ("first", "w0", "w1", "w2", "v0", "v1", "v2", "a0", "a1", "a2", "g1", "g2")
    ),
    *("time_mix_decay_w1.weight", "time_mix_decay_w2.weight", "time_mix_lerp_fused.weight"),
)
_MATRIX = 2  # axes; experts have one more
_FAVORED_EXPERTS = 8
"""Experts of the one kind of model (Mixtral 8x7B) whose attention gets more bits."""
_VALUES = ("attn_v.weight", "attn_qkv.weight", "attn_kv_b.weight")


@dataclass(frozen=True, slots=True)
class MixtureFacts:
    """What the mixtures ask about a model."""

    layers: int
    heads_a_value: int = 1
    """Query heads that share one value head."""
    is_big_llama: bool = False
    """Whether it is the 80-layer Llama, whose few value heads get more bits."""
    has_importance: bool = False
    """Whether an importance matrix is given."""
    experts: int = 0
    """Experts of a mixture; 0 for a dense model."""


_FALLBACKS = MappingProxyType(
    {
        TensorType.Q2_K: TensorType.Q4_0,
        TensorType.Q3_K: TensorType.Q4_0,
        TensorType.Q4_K: TensorType.Q5_0,
        TensorType.Q5_K: TensorType.Q5_1,
        TensorType.Q6_K: TensorType.Q8_0,
        TensorType.IQ4_XS: TensorType.IQ4_NL,
    }
)


def sort_like_quantizer(names: Sequence[str]) -> list[str]:
    """GGUF tensor names as llama-quantize writes them: first those of no layer, then layer by layer, each by name."""
    return sorted(names, key=lambda name: (_read_layer(name), name))


def choose_types(
    shapes: Mapping[str, tuple[int, ...]], quantization: Quantization, facts: MixtureFacts
) -> dict[str, TensorType]:
    """The type of each tensor.

    Args:
        shapes: By GGUF name; the last axis is the row.
        quantization: What was requested.
        facts: About the model.

    Returns:
        By GGUF name, in the order that llama-quantize counts in.
    """
    names = sort_like_quantizer(list(shapes))
    values = [name for name in names if name.endswith(_VALUES)]
    tied = "output.weight" not in shapes
    chosen = {}
    downs = 0
    for name in names:
        kind = quantization.default if _is_quantized(name, shapes[name]) else TensorType.F32
        if kind != TensorType.F32 and not quantization.is_float:
            columns = shapes[name][-1]
            if quantization.default == TensorType.MXFP4:
                kind = TensorType.MXFP4 if len(shapes[name]) > _MATRIX else TensorType.Q8_0
            elif name == "output.weight" or (tied and name == "token_embd.weight"):
                kind = _choose_output(kind, columns)
            elif name.endswith(_VALUES):
                kind = _choose_value(kind, quantization.name, values.index(name), len(values), facts)
            elif "ffn_down" in name:
                kind = _choose_down(kind, quantization.name, _read_layer(name) if facts.experts > 1 else downs, facts)
                downs += 1
            elif "attn_k.weight" in name and facts.experts == _FAVORED_EXPERTS:
                kind = TensorType.Q8_0
            elif "attn_output.weight" in name:
                is_favored = facts.experts == _FAVORED_EXPERTS
                kind = (_FAVORED_OUTPUTS if is_favored else _OUTPUTS).get(quantization.name, kind)
            kind = _fall_back(kind, columns)
        chosen[name] = kind
    return chosen


def _read_layer(name: str) -> int:
    match = re.match(r"blk\.(\d+)\.", name)
    return int(match[1]) if match else -1


def _is_quantized(name: str, shape: tuple[int, ...]) -> bool:
    axes = len(shape) - next((i for i, size in enumerate(shape) if size > 1), len(shape))  # as ggml_n_dims counts
    return axes > 1 and name.endswith("weight") and not any(part in name for part in _NEVER_QUANTIZED)


def _uses_more_bits(index: int, count: int) -> bool:
    """The first and last eighth of the layers, and every third between them."""
    return index < count // 8 or index >= 7 * count // 8 or (index - count // 8) % 3 == 2


def _choose_output(kind: TensorType, columns: int) -> TensorType:
    if kind == TensorType.Q8_0 or columns % read_block(kind):
        return TensorType.Q8_0
    return TensorType.Q6_K


# What the attention's output projection gets instead of the default.
_OUTPUTS: Mapping[str, TensorType] = MappingProxyType({"q2_k": TensorType.Q3_K, "q3_k_m": TensorType.Q4_K})
_FAVORED_OUTPUTS: Mapping[str, TensorType] = MappingProxyType(
    dict.fromkeys(("q2_k", "q3_k_m", "q4_k_s", "q4_k_m", "iq4_xs"), TensorType.Q5_K)
)


def _choose_value(kind: TensorType, asked: str, index: int, count: int, facts: MixtureFacts) -> TensorType:
    is_shared = facts.heads_a_value >= _MANY_HEADS_A_VALUE
    if asked == "q2_k":
        kind = TensorType.Q4_K if is_shared else TensorType.Q3_K
    elif asked == "q3_k_m":
        kind = TensorType.Q5_K if index < 2 else TensorType.Q4_K
    elif (asked == "iq4_xs" and is_shared) or (asked == "q4_k_s" and index < 4):
        kind = TensorType.Q5_K
    elif asked in ("q4_k_m", "q5_k_m") and _uses_more_bits(index, count):
        kind = TensorType.Q6_K
    if facts.experts == _FAVORED_EXPERTS:
        return TensorType.Q8_0
    return TensorType.Q5_K if facts.is_big_llama and kind in (TensorType.Q3_K, TensorType.Q4_K) else kind


def _choose_down(kind: TensorType, asked: str, index: int, facts: MixtureFacts) -> TensorType:
    layers, is_first = facts.layers, index < facts.layers // 8
    if asked == "q2_k":
        return TensorType.Q3_K
    if asked == "q3_k_m":
        return TensorType.Q5_K if index < layers // 16 else TensorType.Q4_K
    if asked in ("q4_k_m", "q5_k_m"):
        return TensorType.Q6_K if _uses_more_bits(index, layers) else kind
    if is_first and (asked == "q4_k_s" or (asked == "iq4_xs" and not facts.has_importance)):
        return TensorType.Q5_K
    if is_first and asked in _WITH_OFFSET and facts.has_importance:
        return _WITH_OFFSET[asked]
    return kind


# An importance matrix can lead the plain 4 and 5 bits astray in the first layers.
_WITH_OFFSET: Mapping[str, TensorType] = MappingProxyType({"q4_0": TensorType.Q4_1, "q5_0": TensorType.Q5_1})


def _fall_back(kind: TensorType, columns: int) -> TensorType:
    """The next type whose blocks fit a row; F16 where none does."""
    if columns % read_block(kind) == 0:
        return kind
    kind = _FALLBACKS.get(kind, TensorType.F16)
    return kind if columns % read_block(kind) == 0 else TensorType.F16


def is_big_llama(layers: int, heads: int, key_heads: int) -> bool:
    """Whether llama.cpp takes a llama for the 70B, by its layers and grouped heads."""
    return layers == _BIG_LLAMA_LAYERS and heads != key_heads
