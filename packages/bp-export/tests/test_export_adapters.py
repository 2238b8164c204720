"""An adapter by itself, split files and the dry run: each read by what it is made for, or against the whole file."""

import json

import gguf
import numpy as np
import pytest
from export_pico import export_adapter, read_place, skip_without_llama_cpp, write_base, write_lora

from bp_export import plan_export
from bp_export.chat.server import LlamaServer
from bp_export.cli.app import main
from bp_export.errors import AdapterFormatError, OutputTakenError, ParityFailedError
from bp_export.formats import mlx
from bp_export.gguf import read_settings
from bp_export.verify import is_verifiable
from bp_merge import AdapterMismatchError, TensorReader, load_adapter, read_index, write_tensors


@pytest.fixture
def lora(tmp_path):
    return write_lora(tmp_path / "lora", write_base(tmp_path / "base"))


def set_config(lora, **changes):
    file = lora / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def read_likely(server):
    return read_place(server, [1, 40, 77, 120, 33, 260])


@pytest.mark.parametrize("config", [{}, {"use_rslora": True}, {"alpha_pattern": {"q_proj": 3}}])
def test_a_gguf_adapter_on_the_base_is_the_merged_model(tmp_path, lora, config):
    skip_without_llama_cpp()
    set_config(lora, **config)
    base = export_adapter(tmp_path / "base", quantization="f32", output=tmp_path / "base.gguf").path
    merged = export_adapter(lora, quantization="f32", output=tmp_path / "merged.gguf").path
    outcome = export_adapter(lora, format="gguf-adapter")
    assert outcome.path == tmp_path / "base-tuned-lora.gguf"
    assert outcome.tensors == 28
    with LlamaServer(merged, 256) as server:
        expected = read_likely(server)
    with LlamaServer(base, 256, adapter=outcome.path) as server:
        found = read_likely(server)
    with LlamaServer(base, 256) as server:
        plain = read_likely(server)
    # The merged weights are rounded to bf16, the adapter's product is not.
    assert max(abs(found[i] - expected[i]) for i in expected) < 0.05
    assert max(abs(plain[i] - expected[i]) for i in expected) > 0.2


def test_an_ollama_adapter_is_a_modelfile_on_a_checked_base(tmp_path, lora):
    base = export_adapter(tmp_path / "base", quantization="q4_k_m", output=tmp_path / "base.gguf").path
    outcome = export_adapter(lora, format="ollama-adapter", ollama_base=str(base))
    lines = (outcome.path / "Modelfile").read_text().splitlines()
    assert lines == [f"FROM {base}", "ADAPTER ./adapter.gguf", 'PARAMETER stop "<|im_end|>"']
    assert json.loads((outcome.path / "base.json").read_text())["base"] == str(tmp_path / "base")
    named = export_adapter(lora, format="ollama-adapter", ollama_base="smollm2:135m", output=tmp_path / "named")
    assert (named.path / "Modelfile").read_text().startswith("FROM smollm2:135m\n")


def test_an_ollama_adapter_on_another_base_is_refused(tmp_path, lora):
    other = export_adapter(write_base(tmp_path / "other", seed=5), quantization="q8_0", output=tmp_path / "other.gguf")
    with pytest.raises(AdapterMismatchError, match="differs"):
        export_adapter(lora, format="ollama-adapter", ollama_base=str(other.path))
    for wrong in (None, str(tmp_path / "missing.gguf")):
        with pytest.raises(AdapterFormatError):
            export_adapter(lora, format="ollama-adapter", ollama_base=wrong)
    assert not (tmp_path / "base-tuned-ollama").exists()


def test_mlxs_adapter_multiplies_to_the_same_change(tmp_path, lora):
    set_config(lora, alpha_pattern={"q_proj": 3})
    outcome = export_adapter(lora, format="mlx")
    assert [(c.name, c.result) for c in outcome.parity.checks] == [("adapter", "passed"), ("witness", "not tested")]
    assert (outcome.parity.result, outcome.parity.checks[0].note[:10]) == ("passed", "14 modules")
    config = json.loads((outcome.path / "adapter_config.json").read_text())
    assert config["fine_tune_type"] == "lora"
    assert config["num_layers"] == 2
    parameters = config["lora_parameters"]
    assert parameters["keys"] == sorted(
        f"{k}_proj"
        for k in ("mlp.down", "mlp.gate", "mlp.up", "self_attn.k", "self_attn.o", "self_attn.q", "self_attn.v")
    )
    with TensorReader(read_index(outcome.path / "adapters.safetensors")) as reader:
        for name, pair in load_adapter(lora).modules.items():
            a, b = reader.read(f"{name}.lora_a"), reader.read(f"{name}.lora_b")
            assert a.shape == (pair.shape[1], parameters["rank"])
            assert np.allclose((a @ b).T * parameters["scale"], pair.delta(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("fault", ["transposed", "scale", "missing", "swapped", "nan"])
def test_an_mlx_folder_that_changes_the_base_differently_fails(tmp_path, lora, monkeypatch, fault):
    name, end = "model.layers.1.self_attn.q_proj", "lora_b"
    keep = mlx.write_tensors

    def spoil(path, tensors):
        key = f"{name}.{end}"
        if fault == "transposed":
            tensors[key] = np.ascontiguousarray(tensors[key][:, ::-1])
        elif fault == "scale":
            tensors[key] = tensors[key] * np.float32(1.001)
        elif fault == "missing":
            del tensors[key]
        elif fault == "nan":
            tensors[key] = tensors[key] * np.float32("nan")
        else:
            other = key.replace("layers.1", "layers.0")
            tensors[key], tensors[other] = tensors[other], tensors[key]
        keep(path, tensors)

    monkeypatch.setattr(mlx, "write_tensors", spoil)
    with pytest.raises(ParityFailedError, match="not the trained adapter") as caught:
        export_adapter(lora, format="mlx")
    assert name.split(".", 3)[3] in caught.value.cause
    assert caught.value.details["result"] == "failed"


def test_ranks_that_differ_are_filled_up_for_mlx(tmp_path):
    base = write_base(tmp_path / "base")
    lora = write_lora(tmp_path / "lora", base, r=4, modules={"model.layers.1.self_attn.q_proj": (64, 64)})
    set_config(lora, r=8, rank_pattern={"q_proj": 4})
    outcome = export_adapter(lora, format="mlx")
    config = json.loads((outcome.path / "adapter_config.json").read_text())
    assert config["lora_parameters"]["rank"] == 4


@pytest.mark.parametrize("format", ["gguf-adapter", "mlx", "ollama-adapter"])
def test_what_these_forms_cannot_say_is_refused(tmp_path, format):
    base = write_base(tmp_path / "base")
    lora = write_lora(tmp_path / "lora", base)
    set_config(lora, fan_in_fan_out=True)
    with pytest.raises((AdapterFormatError, AdapterMismatchError)):
        export_adapter(lora, format=format, ollama_base="x")
    if format != "mlx":
        with pytest.raises(AdapterFormatError, match="not an adapter"):
            export_adapter(base, format=format, ollama_base="x")


def test_a_split_gguf_holds_the_same_tensors_and_loads(tmp_path, lora):
    skip_without_llama_cpp()
    whole = export_adapter(lora, quantization="q8_0", output=tmp_path / "whole.gguf")
    split = export_adapter(lora, quantization="q8_0", output=tmp_path / "x.gguf", split_bytes=50_000)
    files = sorted(tmp_path.glob("x-*.gguf"))
    assert split.path == files[0]
    assert len(files) > 2
    assert files[-1].name == f"x-{len(files):05d}-of-{len(files):05d}.gguf"
    assert split.bytes == sum(file.stat().st_size for file in files)
    expected = {t.name: t.data for t in gguf.GGUFReader(whole.path).tensors}
    found = {t.name: t.data for file in files for t in gguf.GGUFReader(file).tensors}
    assert list(found) == list(expected)
    assert all(np.array_equal(found[name], expected[name]) for name in expected)
    with LlamaServer(whole.path, 256) as one, LlamaServer(split.path, 256) as other:
        assert read_likely(one) == read_likely(other)
    files[1].write_text("mine")
    with pytest.raises(OutputTakenError):
        export_adapter(lora, quantization="q8_0", output=tmp_path / "x.gguf", split_bytes=50_000)


def test_a_stop_half_way_leaves_none_of_the_split_files(tmp_path, lora):
    def stop(done, total):
        if done > total // 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        export_adapter(lora, output=tmp_path / "x.gguf", split_bytes=20_000, progress=stop)
    assert list(tmp_path.glob("*x-*")) == []


def test_a_dry_run_says_what_comes_and_writes_nothing(tmp_path, lora, capsys):
    plan = plan_export(lora, quantization="q4_k_m")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["base", "lora"]
    outcome = export_adapter(lora, quantization="q4_k_m")
    made = {t.name: (t.tensor_type.name, t.n_bytes) for t in gguf.GGUFReader(outcome.path).tensors}
    assert {t.name: (t.type, t.bytes) for t in plan.tensors} == made
    assert plan.path == outcome.path
    assert sum(t.is_changed for t in plan.tensors) == 14
    assert plan.seconds > 0
    assert main([str(lora), "--dry-run"]) == 0
    assert "blk.0.attn_q.weight" in capsys.readouterr().out
    assert main([str(lora), "--dry-run", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["bytes"] == plan.bytes


def test_tokens_that_training_added_are_in_the_file(tmp_path, lora):
    transformers = pytest.importorskip("transformers")
    base = tmp_path / "base"
    vocab = json.loads((base / "config.json").read_text())["vocab_size"]
    with TensorReader(read_index(lora / "adapter_model.safetensors")) as reader:
        tensors = {name: reader.read(name) for name in reader.tensors}
    table = np.random.default_rng(3).standard_normal((vocab + 2, 64), np.float32)
    tensors["base_model.model.model.embed_tokens.weight"] = table
    write_tensors(lora / "adapter_model.safetensors", tensors)
    set_config(lora, modules_to_save=["embed_tokens"])
    for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (lora / file).write_text((base / file).read_text())
    data = json.loads((lora / "tokenizer.json").read_text())
    data["added_tokens"] += [{**data["added_tokens"][0], "id": vocab + i, "content": f"<new{i}>"} for i in range(2)]
    (lora / "tokenizer.json").write_text(json.dumps(data))
    outcome = export_adapter(lora, quantization="f16", output=tmp_path / "x.gguf", verify=is_verifiable())
    if outcome.parity:
        checks = {check.name: check for check in outcome.parity.checks}
        assert (checks["template"].result, checks["effect"].result) == ("passed", "not tested")
    path = export_adapter(lora, quantization="f32").path
    found = {t.name: t.data for t in gguf.GGUFReader(path).tensors}["token_embd.weight"]
    assert np.allclose(found, table, rtol=2**-7)
    settings = read_settings(path)
    assert settings["tokenizer.ggml.tokens"][-2:] == ["<new0>", "<new1>"]
    assert settings["llama.vocab_size"] == vocab + 2
    merged = export_adapter(lora, format="merged").path
    model = transformers.AutoModelForCausalLM.from_pretrained(merged, dtype="auto")
    assert model.get_input_embeddings().weight.shape == (vocab + 2, 64)
