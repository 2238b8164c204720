"""A small random model of a given config's class, built on the CPU in well under a second.

Proofs about an architecture (does it keep packed examples apart?) run on it before gigabytes of weights are
downloaded. Widths are cut, kinds of layers are not: it has one layer of each kind in the config, and at least two.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoModelForCausalLM, AutoTokenizer

from bp_runs.adapter import copy_tokenizer_files
from bp_runs.errors import ModelLoadError

_MAX_PARAMETERS = 20_000_000
_SPREAD = 0.1
"""Standard deviation of the weights: every layer must move the logits, and at the usual 0.02 some hardly do (LFM2)."""
_WINDOW = 8
"""Tokens; below the length of a proof's examples, so that windows take part in it."""
_EXPORTED_WINDOW = 512
"""The same for a model that is exported: whole conversations must fit where llama.cpp's context ends at the window."""
_BUILD_ERRORS = (
    TypeError, ValueError, KeyError, AttributeError, RuntimeError, ImportError, IndexError, AssertionError,
    ArithmeticError, StrictDataclassError,
)  # fmt: skip
"""What models raise whose sizes do not fit each other."""

_LAYER_COUNTS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers", "encoder_layers")

_RULES: tuple[tuple[str, Callable[[int], int]], ...] = (
    # The first pattern that matches a whole name gives its small value.
    (r"vocab_size|vocab_size_per_layer_input|padded_vocab_size|unpadded_vocab_size", lambda _: 96),
    (r"hidden_size|d_model|n_embd|dim|embedding_size|word_embed_proj_dim|embedding_dim", lambda _: 64),
    (r"hidden_size_per_layer_input|ple_dim|laurel_rank", lambda _: 8),
    (r"num_attention_heads|n_heads?|num_heads|(en|de)coder_attention_heads", lambda _: 4),
    (r"num_key_value_heads|num_kv_heads|multi_query_group_num|num_global_key_value_heads", lambda n: min(n, 2)),
    (r"qk_rope_head_dim|qk_nope_head_dim|rotary_dim", lambda _: 8),
    (r"((qk|mamba|linear|linear_key|linear_value|v|global|attention)_)?head_dim|d_kv|kv_channels", lambda _: 16),
    (r".*(intermediate|ffn|inner|mlp)_?(size|dim|hidden_size)?|.*intermediate_size|n_inner", lambda _: 64),
    (r"(num|n)_(local_|routed_)?experts|moe_num_experts|num_local_experts", lambda n: min(n, 4)),
    (r"num_experts_per_tok(en)?|top_k|moe_k|moe_top_k|moe_topk|num_selected_experts", lambda n: min(n, 2)),
    (r"n_group|topk_group|num_expert_groups?", lambda _: 1),
    (r"num_kv_shared_layers", lambda _: 0),
    (r"first_k_dense_replace|num_dense_layers", lambda n: min(n, 1)),
    (r".*lora_rank|.*_rank", lambda _: 16),
    (r"mamba_n_heads|mamba_num_heads", lambda _: 8),
    (r"mamba_d_head|mamba_headdim", lambda _: 16),
    (r"mamba_d_state|state_size|ssm_state_size", lambda _: 16),
    (r"mamba_d_ssm", lambda _: 128),
    (r"mamba_n_groups|mamba_ngroups|n_groups", lambda _: 1),
    (r"linear_num_key_heads", lambda _: 2),
    (r"linear_num_(value_)?heads", lambda _: 4),
    (r"sliding_window(_size)?|local_attention|att(entio)?n_(window_size|chunk_size)", lambda n: min(n, _WINDOW)),
)
_WINDOWS = _RULES[-1][0]  # fmt: skip


def build_pico(config: Any, *, seed: int = 0, exported_tokens: int | None = None) -> Any | None:
    """A random float32 model of ``config``'s class in evaluation mode, or None if this config cannot be made small.

    The random state of the process stays as it is.

    Args:
        config: A transformers config of a causal language model.
        seed: Seed of the weights.
        exported_tokens: As `shrink_config`.
    """
    try:
        small = shrink_config(config, exported_tokens=exported_tokens)
        with torch.device("meta"):
            sketch = AutoModelForCausalLM.from_config(small)
        if sum(p.numel() for p in sketch.parameters()) > _MAX_PARAMETERS:
            return None
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return AutoModelForCausalLM.from_config(small, dtype=torch.float32).eval()
    except _BUILD_ERRORS:
        return None


def write_pico(base: Path, folder: Path) -> None:
    """Save a small model of the config in ``base``, as large in its vocabulary as the tokenizer there, with that.

    Raises:
        ModelLoadError: No small model of this config can be built.
        CodedError: As `load.read_config`.
    """
    from bp_train_cuda.model import load  # it imports this module

    config = load.read_config(base, trust_remote_code=False)
    count = len(AutoTokenizer.from_pretrained(base))
    model = build_pico(config, exported_tokens=-(-count // 8) * 8)
    if model is None:
        raise ModelLoadError(f"no small model can be built of {config.model_type}")
    copy_tokenizer_files(base, folder)
    model.save_pretrained(folder)


def shrink_config(config: Any, *, exported_tokens: int | None = None) -> Any:
    """The text part of a config with small widths and one layer of each kind.

    Args:
        config: A transformers config.
        exported_tokens: Tokens of a model that llama.cpp is going to load, which takes only what real models have:
            layers in their usual order, and windows that hold a conversation. None: 96 tokens, a layer of each kind.
    """
    text = config.get_text_config(decoder=True)
    values = {
        key: value
        for key, value in text.to_dict().items()
        if key not in ("dtype", "torch_dtype", "quantization_config")
    }
    is_exported = exported_tokens is not None
    small = {key: _shrink_value(key, value) for key, value in _keep_layers(values, in_order=is_exported).items()}
    if values.get("head_dim") == values.get("qk_rope_head_dim") is not None:
        small["head_dim"] = small["qk_rope_head_dim"]  # DeepSeek: of the rotary embedding
    if values.get("num_key_value_heads") == values.get("num_attention_heads") is not None:
        small["num_key_value_heads"] = small["num_attention_heads"]
    if "expand" in small and "num_heads" in small and "head_dim" in small:
        small["num_heads"] = small["expand"] * small["hidden_size"] // small["head_dim"]  # Mamba 2
    if isinstance(small.get("initializer_range"), float):
        small["initializer_range"] = _SPREAD
    if is_exported:
        windows = [key for key in small if re.fullmatch(_WINDOWS, key) and values[key]]
        small |= {key: min(values[key], _EXPORTED_WINDOW) for key in windows}
        small |= {"vocab_size": exported_tokens} if "vocab_size" in small else {}
        if values.get("query_pre_attn_scalar") == values.get("head_dim") is not None:
            small["query_pre_attn_scalar"] = small["head_dim"]
    size = small.get("vocab_size", 96)
    small |= {key: value % size for key, value in small.items() if key.endswith("token_id") and isinstance(value, int)}
    return type(text)(**small)


def _shrink_value(key: str, value: Any) -> Any:
    if isinstance(value, dict) and key.endswith("_config"):
        return {name: _shrink_value(name, part) for name, part in value.items()}
    if not isinstance(value, int) or isinstance(value, bool) or value <= 0:
        return value
    return next((smaller(value) for pattern, smaller in _RULES if re.fullmatch(pattern, key)), value)


def _keep_layers(values: dict[str, Any], *, in_order: bool = False) -> dict[str, Any]:
    """One layer of each kind, by the lists that have an entry for each layer; or all layers up to the last of those."""
    name = next((name for name in _LAYER_COUNTS if isinstance(values.get(name), int)), None)
    if name is None:
        return values
    count = values[name]
    lists = {key: value for key, value in values.items() if isinstance(value, (list, tuple)) and len(value) == count}
    kinds: dict[str, int] = {}
    for layer in range(count):
        kinds.setdefault(repr([value[layer] for value in lists.values()]), layer)
    kept = sorted(kinds.values())
    kept += [layer for layer in range(count) if layer not in kept][: max(0, 2 - len(kept))]
    kept = list(range(max(kept) + 1)) if in_order else sorted(kept)
    cut: dict[str, Any] = {key: [value[layer] for layer in kept] for key, value in lists.items()}
    cut |= {key: _renumber(value, kept) for key, value in values.items() if key == "per_layer_config"}
    counts = {key: len(kept) for key in _LAYER_COUNTS if isinstance(values.get(key), int)}
    return {**values, **cut, **counts}


def _renumber(by_layer: dict[Any, Any] | None, kept: list[int]) -> dict[int, Any] | None:
    """Settings by a layer's number, for the layers that are kept."""
    if by_layer is None:
        return None
    numbered = {int(layer): value for layer, value in by_layer.items()}
    return {place: numbered[layer] for place, layer in enumerate(kept) if layer in numbered}
