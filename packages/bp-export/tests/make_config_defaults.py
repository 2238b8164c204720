"""Write `bp_export/architectures/defaults.json`: what transformers' config classes assume where config.json is silent.

    python packages/bp-export/tests/make_config_defaults.py

Only numbers, words and switches that a layout reads; what a class computes from others (head_dim of Llama) is left out.
"""

import dataclasses
import json
import sys
from pathlib import Path

FILE = Path(__file__).parents[1] / "src" / "bp_export" / "architectures" / "defaults.json"
KINDS = (
    *("llama", "mistral", "smollm3", "qwen2", "qwen3", "qwen3_5_text", "phi3", "gemma2", "gemma3_text"),
    *("mixtral", "qwen2_moe", "olmoe", "gpt_oss"),
    *("qwen3_moe", "olmo2", "olmo3", "granite", "glm4", "ministral3"),
    *("lfm2", "exaone4", "cohere", "cohere2", "hunyuan_v1_dense"),
)
"""``model_type`` of each config class."""
UNREAD = (
    *("initializer_range", "use_cache", "pretraining_tp", "output_hidden_states", "return_dict", "is_encoder_decoder"),
    *("chunk_size_feed_forward", "attention_dropout", "resid_pdrop", "embd_pdrop"),
    *("bos_token_id", "eos_token_id", "pad_token_id"),  # the tokenizer's
)


def build_defaults():
    """By ``model_type``."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    return {kind: read_fields(CONFIG_MAPPING[kind]) for kind in KINDS if kind in CONFIG_MAPPING}


def read_fields(cls):
    """The class's own defaults, without those of None."""
    found = {field.name: field.default for field in dataclasses.fields(cls)}
    return {
        name: value
        for name, value in sorted(found.items())
        if isinstance(value, bool | int | float | str) and name not in UNREAD
    }


if __name__ == "__main__":
    FILE.write_text(json.dumps(build_defaults(), indent=1) + "\n", encoding="utf-8")
    sys.stdout.write(f"{FILE}\n")
