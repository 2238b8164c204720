"""Random option sets of transformers' config classes, and pico models with them, for every layout that is supported."""

import numpy as np
import torch
from pico_configs import build_random_model

COMMON = {
    "vocab_size": 320,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
FAMILIES = {
    "llama": "Llama",
    "mistral": "Mistral",
    "mixtral": "Mixtral",
    "qwen2": "Qwen2",
    "qwen3": "Qwen3",
    "qwen3-moe": "Qwen3Moe",
    "qwen2-moe": "Qwen2Moe",
    "olmoe": "Olmoe",
    "gpt-oss": "GptOss",
    "qwen35": "Qwen3_5",
    "phi3": "Phi3",
    "smollm3": "SmolLM3",
    "granite": "Granite",
    "gemma2": "Gemma2",
    "gemma3": "Gemma3",
    "gemma3-vision": "Gemma3Vision",
    "mistral3-vision": "Mistral3Vision",
    "ministral3": "Ministral3",
    "ministral3-vision": "Ministral3Vision",
    "olmo2": "Olmo2",
    "olmo3": "Olmo3",
    "glm4": "Glm4",
    "lfm2": "Lfm2",
    "exaone4": "Exaone4",
    "cohere": "Cohere",
    "cohere2": "Cohere2",
    "hunyuan": "HunYuanDenseV1",
}
ROPES = {
    "default": {},
    "linear": {"factor": 4.0},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 64},
    "yarn-attention": {
        "factor": 4.0,
        "original_max_position_embeddings": 64,
        "attention_factor": 1.25,
        "beta_fast": 24.0,
        "beta_slow": 2.0,
    },
    "yarn-mscale": {"factor": 8.0, "original_max_position_embeddings": 32, "mscale": 0.7, "mscale_all_dim": 1.4},
    "yarn-whole": {"factor": 4.0, "original_max_position_embeddings": 64, "truncate": False},
    "llama3": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
}
_MANY_ROPES = (
    *("llama", "mistral", "qwen2", "qwen3", "smollm3", "granite", "mixtral", "qwen3-moe"),
    *("olmo2", "mistral3-vision", "lfm2", "exaone4", "qwen2-moe", "olmoe", "gpt-oss"),
)
_OWN_HEADS = (
    *("llama", "mistral", "mixtral", "qwen3", "qwen3-moe", "gemma2", "gemma3", "gemma3-vision", "glm4"),
    *("mistral3-vision", "ministral3", "ministral3-vision", "hunyuan", "gpt-oss"),
)


def draw_options(family: str, seed: int) -> dict:
    """Options that change what the model computes, for its config class."""
    draw = np.random.default_rng([seed, *family.encode()])
    pick = lambda *values: values[draw.integers(len(values))]  # noqa: E731
    heads = int(pick(2, 4))
    options = {
        **COMMON,
        "hidden_size": heads * 16,
        "num_attention_heads": heads,
        "num_key_value_heads": int(pick(1, 2)),
        "rms_norm_eps": pick(1e-6, 1e-5),
        "tie_word_embeddings": pick(True, False),
    }
    if family in _MANY_ROPES:
        kind = pick(*ROPES)
        options["rope_parameters"] = {
            "rope_type": kind.partition("-")[0],
            "rope_theta": pick(10_000.0, 500_000.0),
            **ROPES[kind],
        }
    return {**options, **_OWN.get(family, lambda pick: {})(pick), **_head_width(family, pick)}


def _head_width(family: str, pick) -> dict:
    return {"head_dim": pick(16, 32)} if family in _OWN_HEADS else {}


def _window(pick) -> dict:
    layers = [pick("sliding_attention", "full_attention") for _ in range(4)]
    return pick(
        {},
        {"use_sliding_window": True, "sliding_window": 12, "max_window_layers": 2},
        {"use_sliding_window": True, "sliding_window": 12, "layer_types": layers},
    )


def _phi3(pick) -> dict:
    pairs = 8 if (share := pick(1.0, 0.5)) == 1.0 else 4
    factors = {name: [1.0 + i / by for i in range(pairs)] for name, by in (("long_factor", 3), ("short_factor", 9))}
    rope = {"rope_theta": 10_000.0, "partial_rotary_factor": share}
    long = {"rope_type": "longrope", **factors, **pick({}, {"attention_factor": 1.2}), **pick({}, {"factor": 4.0})}
    is_long = pick(True, False)
    return {
        "rope_parameters": {**rope, **(long if is_long else {"rope_type": "default"})},
        "original_max_position_embeddings": pick(16, 64),
        "sliding_window": pick(None, 12),
        "hidden_act": pick("silu", "gelu"),
    }


def _delta(pick) -> dict:
    return {
        "head_dim": 32,
        "linear_key_head_dim": pick(8, 16),
        "linear_value_head_dim": pick(8, 16),
        "linear_num_key_heads": 2,
        "linear_num_value_heads": pick(2, 4, 6),
        "linear_conv_kernel_dim": pick(3, 4),
        "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0, "partial_rotary_factor": pick(0.25, 0.5)},
        "layer_types": pick(None, ["full_attention", "linear_attention", "linear_attention", "full_attention"]),
    }


def _gemma2(pick) -> dict:
    return {
        "query_pre_attn_scalar": pick(16, 40),
        "sliding_window": 12,
        "final_logit_softcapping": pick(None, 5.0),
        "attn_logit_softcapping": pick(None, 3.0),
        "hidden_activation": pick("gelu_pytorch_tanh", "gelu"),
        "rope_parameters": {"rope_type": "default", "rope_theta": pick(10_000.0, 50_000.0)},
    }


def _gemma3(pick) -> dict:
    full = pick({"rope_type": "default"}, {"rope_type": "linear", "factor": 8.0})
    return {
        "query_pre_attn_scalar": pick(16, 40),
        "sliding_window": 12,
        "final_logit_softcapping": pick(None, 5.0),
        "num_hidden_layers": 7,
        "rope_parameters": pick(
            None,
            {
                "full_attention": {**full, "rope_theta": 1e6},
                "sliding_attention": {"rope_type": "default", "rope_theta": pick(10_000.0, 2_000.0)},
            },
        ),
    }


def _ministral3(pick) -> dict:
    yarn = {"rope_type": "yarn", "rope_theta": 1e6, "factor": 16.0, "original_max_position_embeddings": pick(10, 16)}
    scales = pick({"mscale": 1.0, "mscale_all_dim": 1.0}, {"mscale": 0.7, "mscale_all_dim": 1.4})
    return {
        "rope_parameters": {**yarn, **scales, "llama_4_scaling_beta": pick(0.1, 0.5)},
        "sliding_window": pick(None, 12),
    }


def _olmo3(pick) -> dict:
    full = pick({"rope_type": "default"}, {**ROPES["yarn"], "rope_type": "yarn"})
    layers = ["full_attention", "sliding_attention", "full_attention", "sliding_attention"]
    return {
        "sliding_window": 12,
        "layer_types": pick(None, layers),
        "rope_parameters": {
            "full_attention": {**full, "rope_theta": 5e5},
            "sliding_attention": {"rope_type": "default", "rope_theta": pick(5e5, 1e4)},
        },
    }


_OWN = {
    "llama": lambda pick: {
        "attention_bias": pick(True, False),
        "mlp_bias": pick(True, False),
        "hidden_act": pick("silu", "gelu_pytorch_tanh", "relu"),
    },
    "mistral": lambda pick: {"sliding_window": pick(None, 12)},
    "mixtral": lambda pick: {"num_local_experts": 4, "num_experts_per_tok": pick(1, 2), "sliding_window": None},
    "qwen2": _window,
    "qwen3": lambda pick: {**_window(pick), "attention_bias": pick(True, False)},
    "qwen3-moe": lambda pick: {
        "num_experts": 4,
        "num_experts_per_tok": pick(1, 2),
        "moe_intermediate_size": 32,
        "norm_topk_prob": pick(True, False),
        "decoder_sparse_step": pick(1, 2),
        "mlp_only_layers": pick([], [0]),
    },
    "qwen2-moe": lambda pick: {
        "num_experts": 4,
        "num_experts_per_tok": pick(1, 2),
        "moe_intermediate_size": 32,
        "shared_expert_intermediate_size": pick(32, 64),
        "norm_topk_prob": pick(True, False),
        "decoder_sparse_step": pick(1, 2),
        "qkv_bias": pick(True, False),
    },
    "olmoe": lambda pick: {"num_experts": 4, "num_experts_per_tok": pick(1, 2), "norm_topk_prob": pick(True, False)},
    "gpt-oss": lambda pick: {
        "num_local_experts": 4,
        "num_experts_per_tok": pick(1, 2),
        "sliding_window": 12,
        "swiglu_limit": pick(7.0, 2.0),
        "swiglu_alpha": pick(1.702, 1.0),
        "attention_bias": pick(True, False),
        "layer_types": pick(None, ["full_attention", "sliding_attention"] * 2),
    },
    "qwen35": _delta,
    "phi3": _phi3,
    "smollm3": lambda pick: {
        "no_rope_layers": pick(None, [0, 1, 1, 0]),
        "attention_bias": pick(True, False),
        "use_sliding_window": (has := pick(True, False)),
        "sliding_window": 12 if has else None,
    },
    "granite": lambda pick: {
        "embedding_multiplier": pick(1.0, 3.0),
        "attention_multiplier": pick(0.25, 0.1),
        "residual_multiplier": pick(1.0, 0.3),
        "logits_scaling": pick(1.0, 4.0),
    },
    "gemma2": _gemma2,
    "gemma3": _gemma3,
    "gemma3-vision": _gemma3,
    "mistral3-vision": lambda pick: {"sliding_window": pick(None, 12)},
    "ministral3": _ministral3,
    "ministral3-vision": _ministral3,
    "olmo3": _olmo3,
    "lfm2": lambda pick: {
        "layer_types": ["conv", "full_attention", "conv", "conv"],
        "norm_eps": pick(1e-5, 1e-3),
        "conv_L_cache": pick(3, 4),
        "conv_bias": pick(True, False),
        "block_multiple_of": 16,
        "block_auto_adjust_ff_dim": pick(True, False),
    },
    "exaone4": lambda pick: pick(
        {"sliding_window": None, "layer_types": ["full_attention"] * 4},
        {"sliding_window": 12},
        {"sliding_window": 12, "layer_types": ["sliding_attention", "full_attention"] * 2},
    ),
    "cohere": lambda pick: {"logit_scale": pick(0.0625, 1.5), "layer_norm_eps": pick(1e-5, 1e-3)},
    "cohere2": lambda pick: {
        "logit_scale": pick(0.0625, 1.5),
        "sliding_window": 12,
        "layer_types": pick(None, ["sliding_attention", "full_attention"] * 2),
    },
    "hunyuan": lambda pick: {
        "rope_parameters": pick(
            {"rope_type": "default", "rope_theta": 1e4},
            {"rope_type": "dynamic", "rope_theta": 1e4, "alpha": pick(50.0, 1000.0), "factor": 1.0},
        )
    },
    "glm4": lambda pick: {
        "attention_bias": pick(True, False),
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": pick(0.5, 1.0, 0.25)},
    },
}


def build_model(family: str, options: dict, seed: int = 0):
    """A random model in float32 whose distributions differ from place to place, and whose biases and norms count."""
    model = build_random_model(FAMILIES[family], options, seed)
    with torch.no_grad():
        for key, weight in model.named_parameters():
            if weight.ndim > 1:
                weight.mul_(6 if "embed" in key else 8)
            else:
                weight.add_(torch.randn_like(weight) * 0.1)
    return model
