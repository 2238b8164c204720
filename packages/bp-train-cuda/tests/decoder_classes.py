"""Small random models of every decoder class that transformers knows, for proofs by matrix."""

from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from bp_train_cuda.model.pico import build_pico

EVERY = tuple(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)

# Values that a class needs and its default config leaves open.
OVERRIDES = {
    "deepseek_v2": {"num_experts_per_tok": 2, "topk_group": 1, "n_group": 1},
    "hunyuan_v1_dense": {"head_dim": 128},
    "hunyuan_v1_moe": {"head_dim": 128},
    "lfm2": {"full_attn_idxs": [2, 5, 8]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 16},
    "ministral": {"head_dim": 128},
    "mistral": {"sliding_window": 4096},
    "qwen2": {"use_sliding_window": True, "sliding_window": 4096, "max_window_layers": 16},
}

DEFAULT = (
    "llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3", "gpt_oss", "cohere", "granitemoe", "minicpm3",
    "qwen3_5_text", "qwen3_next", "lfm2", "granitemoehybrid", "falcon_h1",
)  # fmt: skip
"""What the default run tries; `just models` tries every class."""


def pico(name):
    """A small model of a class, or None if its default config cannot be built small."""
    try:
        config = AutoConfig.for_model(name, **OVERRIDES.get(name, {}))
    except (ValueError, TypeError, StrictDataclassError):
        return None
    return build_pico(config)
