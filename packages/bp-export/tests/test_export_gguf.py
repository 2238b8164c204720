"""GGUFs made in one pass against llama.cpp's own quantizer, and against the merged model's weights."""

import struct

import gguf
import numpy as np
import pytest
from export_pico import export_adapter, write_base, write_lora

from bp_export import QUANTIZATIONS
from bp_export.errors import ImportanceInvalidError
from bp_export.gguf import read_settings
from bp_export.quant import describe_kernels
from bp_merge import FoldedModel, TensorReader, decode, load_adapter, read_model_index
from bp_runs.files import sha256_file

CASES = {
    "narrow": {"hidden": 64, "inner": 128},
    "k-quants": {"hidden": 256, "inner": 512, "layers": 9},
    "untied": {"hidden": 256, "inner": 320, "tied": False, "heads": 8, "key_heads": 8},
    "qwen2": {"kind": "qwen2", "hidden": 256, "inner": 768, "layers": 3, "pad_vocab": 5},
    "mistral": {"kind": "mistral", "hidden": 256, "inner": 512, "tied": False, "head_dim": 64},
    "shared-values": {"hidden": 256, "inner": 256, "layers": 17, "heads": 8, "key_heads": 2},
    "f16-base": {"hidden": 256, "inner": 256, "dtype": "F16"},
}


@pytest.fixture(scope="module", params=CASES)
def case(request, tmp_path_factory):
    """A base, an adapter, and our bf16 GGUF of the two (f16 for an f16 base)."""
    folder = tmp_path_factory.mktemp(request.param)
    base = write_base(folder / "base", **CASES[request.param])
    write_lora(folder / "lora", base)
    own = "f16" if CASES[request.param].get("dtype") == "F16" else "bf16"
    export_adapter(folder / "lora", quantization=own, output=folder / "plain.gguf")
    return folder


@pytest.mark.parametrize("quantization", [q for q in QUANTIZATIONS if q not in ("f32", "bf16")])
def test_the_file_is_llama_quantizes_byte_for_byte(case, quantization, llama_quantize):
    ours, theirs = case / f"ours-{quantization}.gguf", case / f"theirs-{quantization}.gguf"
    outcome = export_adapter(case / "lora", quantization=quantization, output=ours)
    llama_quantize(case / "plain.gguf", theirs, quantization)
    mine, other = (gguf.GGUFReader(path) for path in (ours, theirs))
    found = {tensor.name: tensor for tensor in other.tensors}
    assert {tensor.name for tensor in mine.tensors} == set(found)
    for tensor in mine.tensors:
        assert tensor.tensor_type == found[tensor.name].tensor_type, tensor.name
        assert np.array_equal(tensor.data, found[tensor.name].data), tensor.name
    # Plain floats are laid out as the converter does, which llama-quantize sorts anew.
    if not QUANTIZATIONS[quantization].is_float:
        assert ours.read_bytes() == theirs.read_bytes()
    assert outcome.bytes == ours.stat().st_size
    assert outcome.tensors == len(mine.tensors)


@pytest.mark.parametrize(
    ("quantization", "kind"),
    [
        *((quantization, "gguf") for quantization in ("q5_0", "q4_0", "q4_k_m", "q5_k_s", "iq4_xs", "q3_k_m", "q2_k")),
        ("q4_k_m", "dat"),  # the file's kind does not reach the quantizers
    ],
)
def test_an_importance_matrix_does_what_it_does_in_llama_quantize(tmp_path, quantization, kind, llama_quantize):
    base = write_base(tmp_path / "base", hidden=256, inner=512, layers=9)
    plain, ours, theirs = (tmp_path / f"{name}.gguf" for name in ("plain", "ours", "theirs"))
    export_adapter(base, quantization="bf16", output=plain)
    matrix = write_imatrix(tmp_path / "matrix", plain, kind)
    export_adapter(base, quantization=quantization, output=ours, importance=tmp_path / "matrix")
    llama_quantize(plain, theirs, quantization, matrix)
    assert ours.read_bytes() == theirs.read_bytes()
    export_adapter(base, quantization=quantization, output=plain, force=True)
    assert ours.read_bytes() != plain.read_bytes()


def write_imatrix(path, model, kind):
    """A random importance matrix as a file, and as the means that it stands for."""
    random = np.random.default_rng(3)
    tensors = [t for t in gguf.GGUFReader(model).tensors if len(t.shape) == 2 and "embd" not in t.name]
    sums = {t.name: random.exponential(size=int(t.shape[0])).astype(np.float32) * 8 for t in tensors}
    if kind == "gguf":
        writer = gguf.GGUFWriter(path, "imatrix")
        for name, values in sums.items():
            writer.add_tensor(f"{name}.in_sum2", values.reshape(1, -1))
            writer.add_tensor(f"{name}.counts", np.full((1, 1), 8, np.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    else:
        entries = (
            struct.pack("<i", len(n)) + n.encode() + struct.pack("<ii", 8, v.size) + v.tobytes()
            for n, v in sums.items()
        )
        path.write_bytes(struct.pack("<i", len(sums)) + b"".join(entries))
    return {name: values / np.float32(8) for name, values in sums.items()}


@pytest.mark.parametrize("content", [b"", b"GGUF", b"\xff" * 40, b"\x01\x00\x00\x00\x01\x00\x00\x00a", b"\x00" * 4])
def test_a_damaged_importance_matrix_is_refused(tmp_path, content):
    (tmp_path / "matrix").write_bytes(content)
    with pytest.raises(ImportanceInvalidError):
        export_adapter(write_base(tmp_path / "base"), importance=tmp_path / "matrix")


def test_an_importance_matrix_of_another_model_is_refused(tmp_path):
    base = write_base(tmp_path / "base")
    export_adapter(write_base(tmp_path / "wide", hidden=128), quantization="bf16", output=tmp_path / "wide.gguf")
    write_imatrix(tmp_path / "matrix", tmp_path / "wide.gguf", "gguf")
    with pytest.raises(ImportanceInvalidError, match="128 columns"):
        export_adapter(base, importance=tmp_path / "matrix", output=tmp_path / "x.gguf")
    assert not (tmp_path / "x.gguf").exists()


def test_k_quants_really_happen(tmp_path):
    base = write_base(tmp_path / "base", **CASES["k-quants"])
    export_adapter(base, quantization="q4_k_m", output=tmp_path / "x.gguf")
    kinds = {tensor.tensor_type.name for tensor in gguf.GGUFReader(tmp_path / "x.gguf").tensors}
    assert kinds == {"F32", "Q4_K", "Q6_K"}


def test_bf16_tensors_are_the_merged_models(tmp_path):
    base = write_base(tmp_path / "base", hidden=64, heads=4, key_heads=2, tied=False)
    lora = write_lora(tmp_path / "lora", base)
    export_adapter(lora, quantization="bf16", output=tmp_path / "x.gguf")
    found = {tensor.name: tensor for tensor in gguf.GGUFReader(tmp_path / "x.gguf").tensors}
    names = {
        "model.embed_tokens.weight": "token_embd.weight",
        "lm_head.weight": "output.weight",
        "model.layers.1.self_attn.v_proj.weight": "blk.1.attn_v.weight",
        "model.layers.0.mlp.down_proj.weight": "blk.0.ffn_down.weight",
        "model.layers.0.self_attn.q_proj.weight": "blk.0.attn_q.weight",
        "model.layers.1.self_attn.k_proj.weight": "blk.1.attn_k.weight",
    }
    with FoldedModel(TensorReader(read_model_index(base)), load_adapter(lora)) as model:
        for source, name in names.items():
            expected = model.read_rows(source, 0, model.tensors[source].rows)
            if "attn_q" in name or "attn_k" in name:
                # Row 2i of a head comes from its first half, row 2i + 1 from its second.
                heads = expected.reshape(-1, 16, 64)
                expected = np.stack([heads[:, :8], heads[:, 8:]], axis=2).reshape(expected.shape)
            raw = bytes(found[name].data.tobytes())
            assert np.array_equal(decode(raw, "BF16").reshape(expected.shape), expected), name
    assert found["blk.0.attn_norm.weight"].tensor_type == gguf.GGMLQuantizationType.F32


def test_llama_3_gets_its_rope_factors(tmp_path):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    scaling = {
        "rope_type": "llama3",
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 128,
        "rope_theta": 500000.0,
    }
    base = write_base(tmp_path / "base", heads=2, key_heads=2, family="llama-bpe", rope_parameters=scaling)
    export_adapter(base, quantization="f32", output=tmp_path / "x.gguf")
    found = {tensor.name: tensor.data for tensor in gguf.GGUFReader(tmp_path / "x.gguf").tensors}
    config = transformers.LlamaConfig(
        hidden_size=64, num_attention_heads=2, max_position_embeddings=512, rope_parameters=scaling
    )
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    stretched, _ = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
    plain = 1.0 / (500000.0 ** (torch.arange(0, 32, 2).float() / 32))
    assert np.allclose(found["rope_freqs.weight"], (plain / stretched).numpy(), rtol=1e-5)
    assert len(set(np.round(found["rope_freqs.weight"], 3))) > 2
    assert read_settings(tmp_path / "x.gguf")["tokenizer.ggml.pre"] == "llama-bpe"


def test_threads_and_chunks_change_no_byte(tmp_path, monkeypatch):
    base = write_base(tmp_path / "base", hidden=256, inner=512)
    lora = write_lora(tmp_path / "lora", base)
    one = export_adapter(lora, output=tmp_path / "a.gguf", threads=1)
    monkeypatch.setattr("bp_export.gguf.writer.CHUNK_WEIGHTS", 1000)
    assert export_adapter(lora, output=tmp_path / "b.gguf", threads=3).sha256 == one.sha256
    assert one.sha256 == sha256_file(one.path) == sha256_file(tmp_path / "b.gguf")
    whole = export_adapter(lora, format="merged", output=tmp_path / "c", threads=1)
    monkeypatch.setattr("bp_export.formats.merged.CHUNK_WEIGHTS", 1000)
    parts = export_adapter(lora, format="merged", output=tmp_path / "d", threads=3)
    assert whole.sha256 == parts.sha256 == sha256_file(tmp_path / "d" / "model.safetensors")


def test_a_sharded_base_gives_the_same_tensors(tmp_path):
    base = write_base(tmp_path / "base", hidden=64)
    from bp_export.formats.merged import write_merged
    from bp_export.source import Source

    with FoldedModel(TensorReader(read_model_index(base))) as model:
        source = Source(base, None, base, "x", None)
        write_merged(model, source, tmp_path / "sharded", shard_bytes=50_000)
    assert len(list((tmp_path / "sharded").glob("model-*.safetensors"))) > 1
    one = export_adapter(base, output=tmp_path / "a.gguf", quantization="q8_0", name="x")
    assert (
        export_adapter(tmp_path / "sharded", output=tmp_path / "b.gguf", quantization="q8_0", name="x").sha256
        == one.sha256
    )


def test_progress_counts_up_to_the_end_and_the_hash_is_the_files(tmp_path):
    import hashlib

    base = write_base(tmp_path / "base")
    seen = []
    outcome = export_adapter(base, progress=lambda done, total: seen.append((done, total)))
    assert outcome.path == tmp_path / "base-q4_k_m.gguf"
    assert seen == sorted(seen)
    assert seen[-1][0] == seen[-1][1]
    assert hashlib.sha256(outcome.path.read_bytes()).hexdigest() == outcome.sha256
    assert outcome.kernels == describe_kernels()


def test_settings_say_what_the_model_is(tmp_path):
    base = write_base(tmp_path / "base", kind="qwen2", pad_vocab=3)
    settings = read_settings(export_adapter(base, quantization="q8_0").path)
    assert settings["general.architecture"] == "qwen2"
    assert settings["qwen2.attention.head_count_kv"] == 2
    assert settings["tokenizer.ggml.pre"] == "qwen2"
    assert settings["tokenizer.ggml.tokens"][-1].startswith("[PAD")
    assert settings["tokenizer.ggml.eos_token_id"] == 2
    assert list(settings)[-2:] == ["general.quantization_version", "general.file_type"]
