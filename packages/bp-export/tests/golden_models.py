"""One pico model of every architecture for the golden table, from stored settings and shapes: neither torch nor transformers.

`golden_models.json` holds each model's config.json and the shapes of its tensors, as transformers saved them; the
weights, and those of an adapter on all linears, come from a bit generator's raw stream, which NumPy promises to keep.
"""

import json
import shutil
from pathlib import Path

import numpy as np
from export_pico import write_json, write_tokenizer

from bp_merge import write_tensors

FILE = Path(__file__).with_name("golden_models.json")
ROWS = 320  # of the embedding
QUANTIZATIONS = ("bf16", "q4_k_m")
MORE = ("f16", "q3_k_m", "mxfp4")
"""For mixtures of experts also these: their rules differ there."""

# transformers' class, and what its config is told beside COMMON.
COMMON = {
    "hidden_size": 256,
    "intermediate_size": 256,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "vocab_size": ROWS,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_FACTORS = {"long_factor": [1.0 + i / 3 for i in range(24)], "short_factor": [1.0 + i / 9 for i in range(24)]}
_LONG = {"rope_type": "longrope", "rope_theta": 10000.0, "partial_rotary_factor": 0.75, **_FACTORS}
_LLAMA_3 = {"rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "rope_theta": 5e5}
_DELTA = {
    "head_dim": 64,
    "linear_key_head_dim": 64,
    "linear_value_head_dim": 64,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "num_hidden_layers": 4,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.25},
}
_GEMMA = {"head_dim": 64, "query_pre_attn_scalar": 64, "sliding_window": 16}
_MINISTRAL = {
    "rope_type": "yarn",
    "rope_theta": 1e6,
    "factor": 16.0,
    "original_max_position_embeddings": 32,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
    "llama_4_scaling_beta": 0.1,
}
_OLMO_YARN = {
    "rope_type": "yarn",
    "rope_theta": 5e5,
    "factor": 8.0,
    "original_max_position_embeddings": 64,
    "attention_factor": 1.2079441541679836,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
}
MODELS = {
    "llama": ("Llama", {"tie_word_embeddings": False}),
    "llama3": ("Llama", {"rope_parameters": {**_LLAMA_3, "original_max_position_embeddings": 128}}),
    "mistral": ("Mistral", {"head_dim": 64, "sliding_window": None}),
    "smollm3": ("SmolLM3", {"tie_word_embeddings": True}),
    "qwen2": ("Qwen2", {"tie_word_embeddings": True}),
    "qwen3": ("Qwen3", {"head_dim": 64, "tie_word_embeddings": True}),
    "qwen3moe": (
        "Qwen3Moe",
        {
            "head_dim": 64,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 256,
            "norm_topk_prob": True,
            "tie_word_embeddings": False,
        },
    ),
    "qwen2moe": (
        "Qwen2Moe",
        {
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 256,
            "shared_expert_intermediate_size": 256,
            "tie_word_embeddings": False,
        },
    ),
    "mixtral": ("Mixtral", {"num_local_experts": 8, "sliding_window": None, "tie_word_embeddings": False}),
    "olmoe": (
        "Olmoe",
        {"num_key_value_heads": 4, "num_experts": 4, "num_experts_per_tok": 2, "tie_word_embeddings": False},
    ),
    "gpt-oss": (
        "GptOss",
        {"head_dim": 64, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 16},
    ),
    "qwen35": ("Qwen3_5", _DELTA),
    "phi3": ("Phi3", {}),
    "phi4-mini": (
        "Phi3",
        {
            "rope_parameters": {**_LONG, "original_max_position_embeddings": 256},
            "original_max_position_embeddings": 256,
            "max_position_embeddings": 1024,
            "tie_word_embeddings": True,
        },
    ),
    "granite": (
        "Granite",
        {
            "attention_multiplier": 0.02,
            "embedding_multiplier": 12.0,
            "residual_multiplier": 0.22,
            "logits_scaling": 8.0,
            "tie_word_embeddings": True,
        },
    ),
    "olmo2": ("Olmo2", {"tie_word_embeddings": False}),
    "gemma2": ("Gemma2", _GEMMA),
    "gemma3": ("Gemma3", {**_GEMMA, "num_hidden_layers": 7}),
    "gemma3-vision": ("Gemma3Vision", {**_GEMMA, "num_hidden_layers": 6}),
    "mistral-small3": ("Mistral3Vision", {"head_dim": 32, "sliding_window": None, "tie_word_embeddings": False}),
    "ministral3": ("Ministral3Vision", {"head_dim": 32, "rope_parameters": _MINISTRAL, "tie_word_embeddings": False}),
    "ministral3-text": ("Ministral3", {"head_dim": 32, "rope_parameters": _MINISTRAL, "tie_word_embeddings": True}),
    "phi4": (
        "Phi3",
        {
            "partial_rotary_factor": 1.0,
            "sliding_window": None,
            "rope_parameters": {"rope_theta": 250000.0, "rope_type": "default"},
        },
    ),
    "olmo3": (
        "Olmo3",
        {
            "sliding_window": 16,
            "num_hidden_layers": 4,
            "rope_parameters": {
                "full_attention": _OLMO_YARN,
                "sliding_attention": {"rope_type": "default", "rope_theta": 5e5},
            },
        },
    ),
    "glm4": (
        "Glm4",
        {
            "head_dim": 64,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5},
        },
    ),
    "lfm2": ("Lfm2", {"layer_types": ["conv", "full_attention", "conv"], "tie_word_embeddings": True}),
    "exaone4": (
        "Exaone4",
        {
            "sliding_window": None,
            "layer_types": ["full_attention"] * 3,
            "rope_parameters": {**_LLAMA_3, "original_max_position_embeddings": 128},
        },
    ),
    "cohere": ("Cohere", {"tie_word_embeddings": True, "model_max_length": 1024}),
    "cohere2": (
        "Cohere2",
        {"tie_word_embeddings": True, "sliding_window": 16, "rotary_pct": 1.0, "num_hidden_layers": 4},
    ),
    "hunyuan": (
        "HunYuanDenseV1",
        {"head_dim": 64, "tie_word_embeddings": True, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}},
    ),
    "hunyuan-stretched": (
        "HunYuanDenseV1",
        {
            "head_dim": 64,
            "max_position_embeddings": 32768,
            "rope_parameters": {"rope_type": "dynamic", "alpha": 1000.0, "factor": 1.0, "rope_theta": 10000.0},
            "tie_word_embeddings": False,
        },
    ),
}


def list_quantizations(name: str) -> tuple[str, ...]:
    """What a model's files are compared in."""
    is_mixture = any("experts" in key for key in MODELS[name][1])
    return (*QUANTIZATIONS, *MORE) if is_mixture else QUANTIZATIONS


def save_model(folder: Path, name: str) -> None:
    """A random model as transformers saves it in bf16, norms and biases included, with a tokenizer."""
    import torch
    from pico_configs import build_random_model

    kind, options = MODELS[name]
    model = build_random_model(kind, {**COMMON, **options})
    with torch.no_grad():
        for weight in model.parameters():
            weight.copy_(torch.randn_like(weight) * 0.05 + (weight.ndim == 1))
    write_tokenizer(folder)
    kept = (folder / "tokenizer_config.json").read_text()
    model.to(torch.bfloat16).save_pretrained(folder)
    (folder / "tokenizer_config.json").write_text(kept)


def copy_for_converter(base: Path, folder: Path) -> None:
    """The model again, with a vocabulary of all rows: Gemma 3's beyond the tokens would be cut off."""
    shutil.copytree(base, folder)
    write_json(folder / "tokenizer.json", {"model": {"vocab": {}}, "added_tokens": [None] * ROWS})


def write_model(folder: Path, name: str) -> Path:
    """The model and its adapter, in folders of their own; returns the adapter's."""
    stored = json.loads(FILE.read_text())[name]
    base, lora = folder / "base", folder / "lora"
    write_tokenizer(base)
    write_json(base / "config.json", stored["config"])
    raw = np.random.PCG64(7)
    write_tensors(
        base / "model.safetensors", {n: draw(raw, shape) for n, shape in stored["tensors"].items()}, dtype="BF16"
    )
    lora.mkdir()
    pairs = {}
    for tensor, shape in stored["tensors"].items():
        # PEFT converts adapters of single experts for most models, and drops those of Qwen2-MoE.
        is_dropped = name == "qwen2moe" and ".experts." in tensor
        is_other = is_dropped or any(word in tensor for word in ("vision", "projector"))
        if "proj" in tensor and tensor.endswith(".weight") and len(shape) == 2 and not is_other:
            stem = f"base_model.model.{tensor.removesuffix('.weight')}"
            pairs[f"{stem}.lora_A.weight"], pairs[f"{stem}.lora_B.weight"] = (
                draw(raw, (8, shape[1])),
                draw(raw, (shape[0], 8)),
            )
    write_tensors(lora / "adapter_model.safetensors", pairs)
    targets = sorted({name.split(".")[-3] for name in pairs})
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 8, "lora_alpha": 16, "bias": "none"}
    write_json(
        lora / "adapter_config.json", {**config, "base_model_name_or_path": str(base), "target_modules": targets}
    )
    return lora


def draw(raw: np.random.PCG64, shape: tuple[int, ...]) -> np.ndarray:
    """Weights between -1/16 and 1/16."""
    bits = raw.random_raw(int(np.prod(shape))) >> np.uint64(40)
    return ((bits.astype(np.float32) / np.float32(2**24) - np.float32(0.5)) / 8).reshape(shape)
