"""Positions: windows that llama.cpp ignores cap the context, and YaRN's factors are those of transformers."""

import math

import numpy as np
import pytest
from export_pico import export_adapter, read_place, skip_without_llama_cpp, write_base, write_lora
from golden_models import write_model

from bp_export.architectures import find_architecture
from bp_export.chat.server import LlamaServer
from bp_export.errors import ArchitectureUnsupportedError
from bp_export.gguf import read_settings
from bp_export.source import read_config, read_source
from bp_export.verify.forward import Forward

skip_without_llama_cpp()

MISTRAL = {"architectures": ["MistralForCausalLM"], "sliding_window": 16}
QWEN = {"architectures": ["Qwen2ForCausalLM"], "use_sliding_window": True, "sliding_window": 16, "max_window_layers": 1}
COMMON = {
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 300,
    "max_position_embeddings": 512,
}  # fmt: skip


@pytest.mark.parametrize(
    ("options", "context"),
    [
        (MISTRAL, 16),
        ({**MISTRAL, "sliding_window": None}, 512),
        ({**MISTRAL, "sliding_window": 4096}, 512),  # longer than any text
        ({"architectures": ["LlamaForCausalLM"], "sliding_window": 16}, 512),  # which transformers' Llama does not read
        ({"architectures": ["Phi3ForCausalLM"], "sliding_window": 16}, 16),
        (QWEN, 16),
        ({**QWEN, "use_sliding_window": False}, 512),
        ({**QWEN, "max_window_layers": 2}, 512),  # no layer has it
        ({**QWEN, "layer_types": ["full_attention", "sliding_attention"]}, 16),
        ({**QWEN, "layer_types": ["full_attention", "full_attention"]}, 512),
        ({**QWEN, "architectures": ["Qwen3ForCausalLM"], "max_window_layers": 0}, 16),
        ({"architectures": ["SmolLM3ForCausalLM"], "use_sliding_window": True, "sliding_window": 16}, 16),
        ({"architectures": ["MistralForCausalLM"], "model_type": "mistral", "max_position_embeddings": 9000}, 4096),
    ],
)
def test_a_window_that_llama_cpp_ignores_caps_the_context(options, context):
    found = find_architecture({**COMMON, **options})
    assert found.context_length == context
    is_capped = context not in (512,)
    assert any("sliding window" in note for note in found.notes) == is_capped


def test_the_cap_is_in_the_file_and_said(tmp_path):
    base = write_base(tmp_path / "base", kind="mistral", sliding_window=16)
    made = export_adapter(write_lora(tmp_path / "lora", base), quantization="q8_0")
    assert read_settings(made.path)["llama.context_length"] == 16
    assert "context is 16 instead of 512 tokens" in made.notes[0]
    shipped = export_adapter(tmp_path / "lora", format="ollama-adapter", ollama_base="x")
    assert "PARAMETER num_ctx 16" in (shipped.path / "Modelfile").read_text()
    assert "sliding window" in shipped.notes[0]


def test_a_window_that_llama_cpp_keeps_to_caps_nothing(tmp_path):
    made = export_adapter(write_model(tmp_path, "gemma3"), quantization="q8_0")
    assert read_settings(made.path)["gemma3.context_length"] == 512
    assert not made.notes


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128, "rope_theta": 10000.0}


def read_factor(rope):
    """transformers' own, from its formula in words: attention_factor, else the ratio of mscales, else YaRN's."""
    if "attention_factor" in rope:
        return rope["attention_factor"]
    scale = math.log(rope["factor"]) / 10
    if rope.get("mscale") and rope.get("mscale_all_dim"):
        return (1 + rope["mscale"] * scale) / (1 + rope["mscale_all_dim"] * scale)
    return 1 + scale


@pytest.mark.parametrize(
    "extra",
    [
        {},
        {"attention_factor": 1.25},
        {"attention_factor": 1.0},
        {"mscale": 1.0, "mscale_all_dim": 1.0},
        {"mscale": 0.7, "mscale_all_dim": 1.3},
        {"mscale": 2.0},
        {"beta_fast": 24.0, "beta_slow": 2.0, "attention_factor": 1.3},
        {"extrapolation_factor": 0.5},
    ],
)
def test_yarns_attention_in_the_file_is_transformers(tmp_path, extra):
    """llama.cpp multiplies its own 1 + 0.1 ln(factor) by ``attn_factor``, and reads no other key for that."""
    rope = {**YARN, **extra}
    base = write_base(tmp_path / "base", rope_parameters=rope)
    found = read_settings(export_adapter(base, quantization="f32").path)
    own = 1 + math.log(rope["factor"]) / 10
    assert found.get("llama.rope.scaling.attn_factor", 1.0) * own == pytest.approx(read_factor(rope), rel=1e-6)
    assert not {"llama.rope.scaling.yarn_attn_factor", "llama.rope.scaling.yarn_ext_factor"} & set(found)


@pytest.mark.parametrize("extra", [{"attention_factor": 1.6}, {"mscale": 0.7, "mscale_all_dim": 2.3}])
def test_llama_cpp_computes_yarn_as_transformers_does(tmp_path, extra):
    """From the independent forward pass, past the original context."""
    base = write_base(
        tmp_path / "base", rope_parameters={**YARN, **extra, "original_max_position_embeddings": 32}, dtype="F32"
    )
    path = export_adapter(base, quantization="f32").path
    ids = [int(i) for i in np.random.default_rng(0).integers(3, 250, 70)]
    with read_source(base, None, None, dequantize=False).open() as model, LlamaServer(path, 128) as server:
        expected = Forward(read_config(base), model).compute_logprobs(ids, [len(ids) - 1])[0]
        found = read_place(server, ids)
    assert max(abs(found[token] - expected[token]) for token in list(found)[:20]) < 1e-3


def test_yarn_that_cannot_be_said_is_refused(tmp_path):
    base = write_base(tmp_path / "base", rope_parameters={**YARN, "truncate": False})
    with pytest.raises(ArchitectureUnsupportedError, match="truncate"):
        export_adapter(base)


def test_a_bias_that_llama_cpp_does_not_read_is_refused():
    found = find_architecture({**COMMON, "architectures": ["Qwen3ForCausalLM"]})
    with pytest.raises(ArchitectureUnsupportedError, match="a bias"):
        found.map_name("model.layers.0.self_attn.q_proj.bias")
    qwen2 = find_architecture({**COMMON, "architectures": ["Qwen2ForCausalLM"]})
    assert qwen2.map_name("model.layers.0.self_attn.q_proj.bias") == "blk.0.attn_q.bias"
    with pytest.raises(ArchitectureUnsupportedError, match="a bias"):
        qwen2.map_name("model.layers.0.self_attn.o_proj.bias")
