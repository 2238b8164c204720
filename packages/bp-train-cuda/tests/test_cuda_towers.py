"""A language model out of a larger one: the tower is loaded where it must be, and gets no adapter."""

import pytest
import torch
import transformers

from bp_runs.spec import LoraSpec
from bp_train_cuda.model.load import choose_auto_class
from bp_train_cuda.model.lora import add_lora

TEXT = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "vocab_size": 64,
}
TOWER = {**{key: TEXT[key] for key in list(TEXT)[:4]}, "image_size": 28, "patch_size": 14}
MODELS = {
    "Gemma3": ({"text_config": TEXT, "vision_config": TOWER, "mm_tokens_per_image": 4}, "AutoModelForCausalLM"),
    "Mistral3": (
        {"text_config": {**TEXT, "model_type": "mistral"}, "vision_config": {**TOWER, "model_type": "pixtral"}},
        "AutoModelForImageTextToText",
    ),
}


@pytest.mark.parametrize("targets", ["all-linear", "q_proj,v_proj"])
@pytest.mark.parametrize("name", MODELS)
def test_only_the_language_model_is_adapted(name, targets):
    options, loader = MODELS[name]
    config = getattr(transformers, f"{name}Config")(**options, image_token_index=63)
    assert choose_auto_class(config).__name__ == loader
    with torch.device("meta"):
        model = choose_auto_class(config).from_config(config)
        adapted = add_lora(model, LoraSpec(r=2, target_modules=targets))
    found = [key for key, _ in adapted.named_parameters() if "lora_A" in key]
    assert len(found) == (7 if targets == "all-linear" else 2)
    assert all(".language_model.layers." in key for key in found)
