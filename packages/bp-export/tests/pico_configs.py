"""transformers' config and model classes by a short name, and random models of them; needs torch and transformers."""

TEXT_CONFIGS = {"Gemma3": "Gemma3Text", "Gemma4": "Gemma4Text", "Qwen3_5": "Qwen3_5Text"}
"""Short names whose text config has another name than the model."""
_TOWERS = {
    "Gemma3Vision": {
        "vision_config": {
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "image_size": 28,
            "patch_size": 14,
        },
        "mm_tokens_per_image": 4,
    },
    "Mistral3Vision": {
        "vision_config": {
            "model_type": "pixtral",
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "head_dim": 16,
            "image_size": 28,
            "patch_size": 14,
        },
        "spatial_merge_size": 1,
    },
}
_TOWERS["Ministral3Vision"] = _TOWERS["Mistral3Vision"]
_TEXT_TYPES = {"Gemma3Vision": "gemma3_text", "Mistral3Vision": "mistral", "Ministral3Vision": "ministral3"}
_WRAPPERS = {"Gemma3Vision": "Gemma3", "Mistral3Vision": "Mistral3", "Ministral3Vision": "Mistral3"}


def build_config(kind, options):
    """transformers' config of a model, such as Llama or Gemma3Vision; ``options`` are the language model's."""
    import transformers

    if kind not in _TOWERS:
        return getattr(transformers, f"{TEXT_CONFIGS.get(kind, kind)}Config")(**options)
    text = {"model_type": _TEXT_TYPES[kind], **options}
    tied = {"tie_word_embeddings": options["tie_word_embeddings"]} if "tie_word_embeddings" in options else {}
    config = getattr(transformers, f"{_WRAPPERS[kind]}Config")
    return config(text_config=text, image_token_index=options["vocab_size"] - 1, **tied, **_TOWERS[kind])


def build_random_model(kind, options, seed=0):
    """In float32, as the class initializes it."""
    import torch
    import transformers

    torch.manual_seed(seed)
    config = build_config(kind, options)
    name = f"{_WRAPPERS[kind]}ForConditionalGeneration" if kind in _TOWERS else f"{kind}ForCausalLM"
    return getattr(transformers, name)(config).eval()
