"""Heads and embeddings that training told apart, resized tables, and tensors that a GGUF does not hold."""

import json

import numpy as np
import pytest
from export_pico import export_adapter, write_base, write_json, write_lora
from gguf import GGUFReader
from golden_models import write_model

from bp_export.errors import AdapterFormatError, ArchitectureUnsupportedError, ModelInvalidError
from bp_merge import AdapterMismatchError, TensorReader, read_index, read_model_index, write_tensors

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def read_all(index):
    with TensorReader(index) as reader:
        return {name: reader.read(name) for name in reader.tensors}


def add_tensors(lora, tensors):
    file = lora / "adapter_model.safetensors"
    write_tensors(file, {**read_all(read_index(file)), **{f"base_model.model.{n}": v for n, v in tensors.items()}})


def change_json(path, **changes):
    write_json(path, {**json.loads(path.read_text()), **changes})


def to_bf16(values):
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000).astype(np.uint32).view(np.float32)


def read_gguf(path):
    return {
        t.name: np.array(t.data) for t in GGUFReader(path).tensors if t.name in ("output.weight", "token_embd.weight")
    }


def draw_pair(rows, columns, *, is_embedding=False):
    random = np.random.default_rng(5)
    a, b = random.standard_normal((8, columns), np.float32) * 0.1, random.standard_normal((rows, 8), np.float32) * 0.1
    if is_embedding:
        embedding = "model.embed_tokens.lora_embedding_"
        return {f"{embedding}A": b.T.copy(), f"{embedding}B": a.T.copy()}, 2 * (b @ a)
    return {"lm_head.lora_A.weight": a, "lm_head.lora_B.weight": b}, 2 * (b @ a)


def drift(e):
    return {EMBEDDING: e + 0.01, HEAD: e - 0.01}, e + 0.01, e - 0.01


def train_head(e):
    return {HEAD: e * 1.5}, e, e * 1.5


def train_table(e):
    return {EMBEDDING: e * 1.5}, e * 1.5, e


def head_pair(e):
    tensors, change = draw_pair(*e.shape)
    return tensors, e, e + change


def table_pair(e):
    tensors, change = draw_pair(*e.shape, is_embedding=True)
    return tensors, to_bf16(e + to_bf16(change)), e


@pytest.mark.parametrize("train", [drift, train_head, train_table, head_pair, table_pair])
@pytest.mark.parametrize("format", ["gguf", "merged"])
def test_what_training_told_apart_stays_apart(tmp_path, train, format):
    """Each of the two matrices as PEFT's model has it while it trains; the merged config says that they are two."""
    base = write_base(tmp_path / "base", kind="qwen2", tied=True)
    lora = write_lora(tmp_path / "lora", base)
    tensors, table, head = train(read_all(read_model_index(base))[EMBEDDING])
    add_tensors(lora, tensors)
    options = {"quantization": "f32"} if format == "gguf" else {}
    made = export_adapter(lora, format=format, **options)
    if format == "merged":
        found = read_all(read_model_index(made.path))
        assert json.loads((made.path / "config.json").read_text())["tie_word_embeddings"] is False
        found = {"token_embd.weight": found[EMBEDDING], "output.weight": found[HEAD]}
        again = export_adapter(made.path, quantization="f32", output=tmp_path / "again.gguf")
        assert all(np.array_equal(values, found[name]) for name, values in read_gguf(again.path).items())
    else:
        found = read_gguf(made.path)
    assert np.abs(found["token_embd.weight"] - to_bf16(table)).max() < 1e-6
    assert np.abs(found["output.weight"] - to_bf16(head)).max() < 0.004  # one rounding of bf16
    assert not np.array_equal(found["token_embd.weight"], found["output.weight"])


def keep_head(e):
    return {HEAD: e}


def train_both(e):
    return {EMBEDDING: e + 0.01, HEAD: e + 0.01}


def leave_untrained(e):
    tensors, _ = draw_pair(*e.shape)
    return {**tensors, "lm_head.lora_B.weight": np.zeros((e.shape[0], 8), np.float32)}


@pytest.mark.parametrize("train", [keep_head, train_both, leave_untrained])
def test_what_is_the_same_stays_one(tmp_path, train):
    base = write_base(tmp_path / "base", kind="qwen2", tied=True)
    lora = write_lora(tmp_path / "lora", base)
    add_tensors(lora, train(read_all(read_model_index(base))[EMBEDDING]))
    assert set(read_gguf(export_adapter(lora, quantization="f32").path)) == {"token_embd.weight"}
    merged = export_adapter(lora, format="merged").path
    assert json.loads((merged / "config.json").read_text())["tie_word_embeddings"] is True
    assert HEAD not in read_model_index(merged)


def test_weights_tied_on_request_stay_one(tmp_path):
    base = write_base(tmp_path / "base", tied=True)
    lora = write_lora(tmp_path / "lora", base)
    add_tensors(lora, draw_pair(*read_model_index(base)[EMBEDDING].shape, is_embedding=True)[0])
    change_json(lora / "adapter_config.json", ensure_weight_tying=True)
    assert set(read_gguf(export_adapter(lora, quantization="f32").path)) == {"token_embd.weight"}


def test_the_tensors_are_believed_over_the_config(tmp_path):
    base = write_base(tmp_path / "base", tied=False)
    change_json(base / "config.json", tie_word_embeddings=True)
    assert "output.weight" in read_gguf(export_adapter(base, quantization="f32").path)
    values = read_all(read_model_index(base))
    write_tensors(base / "model.safetensors", {**values, HEAD: values[EMBEDDING]}, dtype="BF16")
    assert "output.weight" not in read_gguf(export_adapter(base, quantization="f32", force=True).path)


def test_a_head_that_llama_cpp_does_not_read_is_refused(tmp_path):
    lora = write_model(tmp_path, "gemma2")
    table = read_model_index(tmp_path / "base")[EMBEDDING].shape
    add_tensors(lora, draw_pair(*table)[0])
    with pytest.raises(ArchitectureUnsupportedError, match="head"):
        export_adapter(lora, quantization="f32")
    assert export_adapter(lora, format="merged").path.is_dir()


@pytest.mark.parametrize("format", ["gguf-adapter", "ollama-adapter"])
def test_an_adapter_alone_cannot_bring_a_head_along(tmp_path, format):
    base = write_base(tmp_path / "base", tied=True)
    lora = write_lora(tmp_path / "lora", base)
    add_tensors(lora, draw_pair(*read_model_index(base)[EMBEDDING].shape)[0])
    with pytest.raises(AdapterFormatError, match="head of a tied model"):
        export_adapter(lora, format=format, ollama_base="x")


@pytest.mark.parametrize("rows", [-8, 8])
def test_a_resized_table_is_the_models(tmp_path, rows):
    """Qwen pads its table; resize_token_embeddings to the tokenizer's length cuts it, and the adapter saves both."""
    base = write_base(tmp_path / "base", kind="qwen2", tied=False, pad_vocab=16)
    lora = write_lora(tmp_path / "lora", base)
    values = read_all(read_model_index(base))
    resized = {name: np.resize(values[name], (values[name].shape[0] + rows, 64)) for name in (EMBEDDING, HEAD)}
    add_tensors(lora, resized)
    found = read_gguf(export_adapter(lora, quantization="f32").path)
    assert np.array_equal(found["token_embd.weight"], to_bf16(resized[EMBEDDING]))
    assert found["output.weight"].shape == resized[HEAD].shape
    merged = export_adapter(lora, format="merged").path
    assert json.loads((merged / "config.json").read_text())["vocab_size"] == len(resized[HEAD])


def test_tables_of_two_sizes_are_refused(tmp_path):
    base = write_base(tmp_path / "base", kind="qwen2", tied=False, pad_vocab=16)
    lora = write_lora(tmp_path / "lora", base)
    add_tensors(lora, {HEAD: read_all(read_model_index(base))[HEAD][:-8]})
    with pytest.raises(ModelInvalidError, match="the head is"):
        export_adapter(lora, quantization="f32")


WRAPPED = {
    "saved by transformers 4": ("language_model.model.", "vision_tower."),
    "saved by transformers 5": ("model.language_model.", "model.vision_tower."),
}


@pytest.fixture(params=WRAPPED)
def vision_base(tmp_path, request):
    """Gemma 3 with a tensor of a vision tower, named as either version of transformers names it."""
    write_model(tmp_path, "gemma3")
    inner, tower = WRAPPED[request.param]
    base = tmp_path / "base"
    values = read_all(read_model_index(base))
    renamed = {name.replace("model.", inner, 1): value for name, value in values.items()}
    write_tensors(
        base / "model.safetensors", {**renamed, f"{tower}fc.weight": np.ones((4, 8), np.float32)}, dtype="BF16"
    )
    config = json.loads((base / "config.json").read_text())
    text = {key: config.pop(key) for key in list(config) if key not in ("architectures", "model_type")}
    text["model_type"] = "gemma3_text"
    write_json(
        base / "config.json",
        {"architectures": ["Gemma3ForConditionalGeneration"], "model_type": "gemma3", "text_config": text},
    )
    return base


def rename_modules(lora, prefix):
    file = lora / "adapter_model.safetensors"
    found = read_all(read_index(file))
    write_tensors(file, {name.replace("model.model.layers", f"model.{prefix}layers"): v for name, v in found.items()})


@pytest.mark.parametrize("prefix", ["model.", "model.language_model.", "language_model.model."])
def test_every_wrapper_around_a_language_model_is_known(tmp_path, vision_base, prefix):
    lora = tmp_path / "lora"
    plain = export_adapter(lora, quantization="q8_0", output=tmp_path / "plain.gguf")
    rename_modules(lora, prefix)
    made = export_adapter(lora, quantization="q8_0", output=tmp_path / "x.gguf")
    assert made.sha256 == plain.sha256
    assert made.notes[0].startswith("the file holds the language model only; left out: vision_tower")


@pytest.mark.parametrize("format", ["gguf", "gguf-adapter"])
def test_a_lora_on_a_vision_tower_is_left_out_only_on_request(tmp_path, vision_base, format):
    lora = tmp_path / "lora"
    tower = {"lora_A.weight": np.ones((8, 8), np.float32), "lora_B.weight": np.ones((4, 8), np.float32)}
    add_tensors(lora, {f"model.vision_tower.fc.{name}": value for name, value in tower.items()})
    with pytest.raises(AdapterMismatchError, match="does not hold") as caught:
        export_adapter(lora, format=format)
    assert "1 of the tensors that it changes are in vision_tower" in caught.value.cause
    assert "text_only" in caught.value.hint
    made = export_adapter(lora, format=format, text_only=True)
    assert any("1 tensors that the adapter changes in vision_tower are left out" in note for note in made.notes)
    assert not any("None" in tensor.name for tensor in GGUFReader(made.path).tensors)


def test_a_sparse_config_is_completed_by_its_class(tmp_path, vision_base):
    """Google's config.json of Gemma 3 omits what the class assumes: heads, head_dim, activation, tied embeddings."""
    base, lora = vision_base, tmp_path / "lora"
    full = export_adapter(lora, quantization="q8_0", output=tmp_path / "full.gguf")
    config = json.loads((base / "config.json").read_text())
    for key in (
        "rms_norm_eps",
        "hidden_activation",
        "tie_word_embeddings",
        "attention_bias",
        "use_bidirectional_attention",
    ):
        config["text_config"].pop(key, None)
    write_json(base / "config.json", config)
    assert export_adapter(lora, quantization="q8_0", output=tmp_path / "sparse.gguf").sha256 == full.sha256


@pytest.mark.slow
def test_the_table_of_defaults_is_transformers():
    pytest.importorskip("transformers")
    from make_config_defaults import FILE, build_defaults

    assert json.loads(FILE.read_text()) == build_defaults()
