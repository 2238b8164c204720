"""Every architecture: a pico model of transformers with a LoRA, exported, says in llama.cpp what it says in transformers."""

import json
import math

import numpy as np
import pytest
from export_pico import export_adapter, read_place, skip_without_llama_cpp, write_json, write_lora, write_tokenizer
from pico_configs import build_random_model

from bp_export.architectures import ARCHITECTURES
from bp_export.chat.server import LlamaServer
from bp_export.errors import ArchitectureUnsupportedError
from bp_export.gguf import read_settings
from bp_export.verify.decoder import COVERED
from bp_merge import read_model_index

skip_without_llama_cpp()
torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

COMMON = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
DELTA = {
    "head_dim": 32,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 6,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.25},
}
FACTORS = {"long_factor": [1.0 + i / 3 for i in range(6)], "short_factor": [1.0 + i / 9 for i in range(6)]}
LONG = {"rope_type": "longrope", "rope_theta": 10000.0, "partial_rotary_factor": 0.75, **FACTORS}
STRETCHED = {"rope_type": "dynamic", "rope_theta": 1e4, "alpha": 50.0, "factor": 1.0}
YARN = {"rope_type": "yarn", "factor": 16.0, "original_max_position_embeddings": 16}
MINISTRAL = {**YARN, "rope_theta": 1e6, "mscale": 1.0, "mscale_all_dim": 1.0, "llama_4_scaling_beta": 0.5}
OLMO = {
    "full_attention": {**YARN, "rope_theta": 5e5},
    "sliding_attention": {"rope_type": "default", "rope_theta": 5e5},
}
CASES = {
    "smollm3": ("SmolLM3", {"tie_word_embeddings": True}, "smollm3"),
    "qwen3": ("Qwen3", {"head_dim": 32, "tie_word_embeddings": True}, "qwen3"),
    "qwen35": ("Qwen3_5", DELTA, "qwen35"),
    "qwen35-even": ("Qwen3_5", {**DELTA, "linear_num_value_heads": 2, "tie_word_embeddings": True}, "qwen35"),
    "phi3": ("Phi3", {}, "phi3"),
    "phi4-mini": (
        "Phi3",
        {
            "rope_parameters": {**LONG, "original_max_position_embeddings": 256},
            "original_max_position_embeddings": 256,
            "max_position_embeddings": 1024,
            "tie_word_embeddings": True,
        },
        "phi3",
    ),
    "gemma2": ("Gemma2", {"head_dim": 32, "query_pre_attn_scalar": 32, "sliding_window": 16}, "gemma2"),
    "gemma3": (
        "Gemma3",
        {"head_dim": 32, "query_pre_attn_scalar": 32, "sliding_window": 16, "num_hidden_layers": 7},
        "gemma3",
    ),
    "granite": (
        "Granite",
        {
            "attention_multiplier": 0.2,
            "embedding_multiplier": 2.0,
            "residual_multiplier": 0.7,
            "logits_scaling": 1.5,
            "tie_word_embeddings": True,
        },
        "granite",
    ),
    "olmo2": ("Olmo2", {"tie_word_embeddings": False}, "olmo2"),
    "gemma3-vision": (
        "Gemma3Vision",
        {"head_dim": 32, "query_pre_attn_scalar": 32, "sliding_window": 16, "num_hidden_layers": 6},
        "gemma3",
    ),
    "mistral3-vision": ("Mistral3Vision", {"head_dim": 32, "sliding_window": None}, "mistral3"),
    "ministral3": ("Ministral3Vision", {"head_dim": 32, "rope_parameters": MINISTRAL}, "mistral3"),
    "olmo3": ("Olmo3", {"sliding_window": 16, "rope_parameters": OLMO, "tie_word_embeddings": False}, "olmo2"),
    "glm4": ("Glm4", {"head_dim": 32}, "glm4"),
    "lfm2": ("Lfm2", {"layer_types": ["conv", "full_attention", "conv", "conv"], "tie_word_embeddings": True}, "lfm2"),
    "exaone4": ("Exaone4", {"sliding_window": None, "layer_types": ["full_attention"] * 4}, "exaone4"),
    "cohere": ("Cohere", {"tie_word_embeddings": True, "logit_scale": 1.0}, "command-r"),
    "cohere2": ("Cohere2", {"tie_word_embeddings": True, "sliding_window": 16, "logit_scale": 1.0}, "cohere2"),
    "hunyuan": ("HunYuanDenseV1", {"head_dim": 16, "rope_parameters": STRETCHED}, "hunyuan-dense"),
    "mistral": ("Mistral", {"head_dim": 32, "sliding_window": None}, "llama"),
    "qwen2": ("Qwen2", {}, "qwen2"),
}
PROMPT = [1, 40, 77, 120, 33, 260, 90, 14, 201, 5, 66, 150, 151, 152, 30, 31, 32, 44, 45, 46, 47, 48, 10, 11]


def write_pico(folder, name, options):
    """A random transformers model, large enough in its weights that its distributions differ from place to place."""
    vocab = write_tokenizer(folder)
    model = build_random_model(name, {**COMMON, "vocab_size": vocab, **options})
    with torch.no_grad():
        for key, weight in model.named_parameters():
            if weight.ndim == 2:
                weight.mul_(6 if "embed" in key else 8)
            elif "norm" in key:
                weight.add_(torch.randn_like(weight) * 0.1)
    kept = (folder / "tokenizer_config.json").read_text()
    model.save_pretrained(folder)
    (folder / "tokenizer_config.json").write_text(kept)
    return folder


@pytest.fixture(scope="module", params=CASES)
def case(request, tmp_path_factory):
    name, options, arch = CASES[request.param]
    folder = tmp_path_factory.mktemp(request.param)
    base = write_pico(folder / "base", name, options)
    index = read_model_index(base)
    linear = {n.removesuffix(".weight"): i.shape for n, i in index.items() if "proj" in n and len(i.shape) == 2}
    modules = {
        n: shape for n, shape in linear.items() if not any(word in n for word in ("conv1d", "vision", "projector"))
    }
    write_lora(folder / "lora", base, modules=modules, alpha=8)
    return folder, arch


def has_windows(config):
    return "sliding_attention" in (config.get("text_config", config).get("layer_types") or ())


def read_logprobs(server, ids, vocab):
    place = read_place(server, ids)
    return np.array([place[i] for i in range(vocab)])


def test_the_gate_knows_every_layout():
    assert set(ARCHITECTURES) <= COVERED


def test_llama_cpp_says_what_transformers_says(case):
    folder, arch = case
    merged = export_adapter(folder / "lora", format="merged", output=folder / "merged").path
    done = export_adapter(folder / "lora", quantization="f32", output=folder / "x.gguf", verify=True)
    path, states = done.path, {check.name: check.result for check in done.parity.checks}
    assert states["divergence"] == states["effect"] == "passed"
    assert states.get("window", "passed") == "passed"
    config = json.loads((merged / "config.json").read_text())
    assert ("window" in states) == has_windows(config)
    assert read_settings(path)["general.architecture"] == arch
    model = getattr(transformers, config["architectures"][0]).from_pretrained(merged, dtype=torch.float32).eval()
    ids = list(PROMPT)
    # Not more than the original context: llama.cpp takes the long factors for all texts of a larger one.
    with LlamaServer(path, 256) as server, torch.no_grad():
        for count in (1, 3, 24):
            expected = torch.log_softmax(model(torch.tensor([ids[:count]])).logits[0, -1].double(), -1).numpy()
            found = read_logprobs(server, ids[:count], expected.size)
            likely = expected > -12
            assert np.abs(found - expected)[likely].max() < 0.02, count
            assert found.argmax() == expected.argmax()
        out = model.generate(torch.tensor([ids]), max_new_tokens=8, do_sample=False, eos_token_id=None)
        reply = server.post(
            "/completion", {"prompt": ids, "n_predict": 8, "temperature": 0, "ignore_eos": True, "return_tokens": True}
        )
        same = [a == b for a, b in zip(reply["tokens"], out[0, len(ids) :].tolist(), strict=True)]
        assert all(same[:4]), same


@pytest.mark.parametrize("quantization", ["q8_0", "q4_k_m", "q2_k"])
def test_its_quantized_tensors_are_llama_quantizes(case, quantization, llama_quantize):
    folder, _ = case
    plain, ours, theirs = (folder / f"{name}-{quantization}.gguf" for name in ("plain", "ours", "theirs"))
    export_adapter(folder / "lora", quantization="f32", output=plain)
    export_adapter(folder / "lora", quantization=quantization, output=ours)
    llama_quantize(plain, theirs, quantization)
    assert ours.read_bytes() == theirs.read_bytes()


@pytest.mark.parametrize(
    ("name", "changes", "word"),
    [
        ("SmolLM3", {"no_rope_layers": [0, 1, 1, 1]}, "no_rope_layers"),
        ("Gemma2", {"layer_types": ["full_attention"] * 4}, "layer_types"),
        ("Gemma2", {"query_pre_attn_scalar": 100}, "query_pre_attn_scalar"),
        ("Gemma3", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping"),
        ("Phi3", {"rope_parameters": {"rope_type": "yarn"}}, "yarn"),
        ("Olmo2", {"tie_word_embeddings": True}, "tie_word_embeddings"),
    ],
)
def test_what_llama_cpp_would_compute_otherwise_is_refused(tmp_path, name, changes, word):
    options = {"head_dim": 32, "query_pre_attn_scalar": 32} if "Gemma" in name else {}
    tied = {key: changes[key] for key in changes if key == "tie_word_embeddings"}  # else the model has its own head
    base = write_pico(tmp_path / "base", name, {**options, **tied})
    config = json.loads((base / "config.json").read_text())
    write_json(base / "config.json", {**config, **changes})
    with pytest.raises(ArchitectureUnsupportedError, match=word):
        export_adapter(base)


def test_phi4_minis_attention_factor_is_longropes(tmp_path):
    _, options, _ = CASES["phi4-mini"]
    settings = read_settings(export_adapter(write_pico(tmp_path / "base", "Phi3", options), quantization="f32").path)
    expected = math.sqrt(1 + math.log(1024 / 256) / math.log(256))
    assert settings["phi3.rope.scaling.attn_factor"] == pytest.approx(expected)
