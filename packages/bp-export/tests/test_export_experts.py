"""Mixtures of experts: both forms of a checkpoint give the same file, and what no adapter reached is said."""

import json

import gguf
import numpy as np
import pytest
from export_pico import export_adapter, skip_without_llama_cpp, write_json
from golden_models import write_model

from bp_export.errors import AdapterFormatError, ArchitectureUnsupportedError, ModelInvalidError
from bp_export.formats.gguf_adapter import require_plain
from bp_merge import FoldedModel, LoraAdapter, LoraPair, open_model, read_index, read_model_index, write_tensors
from bp_merge.tensors import TensorReader

NAME = "model.layers.{}.mlp.experts"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A pico Qwen3-MoE whose three layers have four experts each, and an adapter on all matrices."""
    folder = tmp_path_factory.mktemp("experts")
    write_model(folder, "qwen3moe")
    return folder


def read_all(file):
    with TensorReader(read_index(file)) as reader:
        return {name: reader.read(name) for name in reader.tensors}


def fuse(base, target):
    """The same checkpoint as transformers 5 has it in memory: all experts of a layer in two tensors."""
    target.mkdir()
    for file in base.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    tensors = read_all(base / "model.safetensors")
    for layer in range(3):
        stem = NAME.format(layer)
        own = {p: [tensors.pop(f"{stem}.{e}.{p}_proj.weight") for e in range(4)] for p in ("gate", "up", "down")}
        tensors[f"{stem}.gate_up_proj"] = np.concatenate([np.stack(own["gate"]), np.stack(own["up"])], axis=1)
        tensors[f"{stem}.down_proj"] = np.stack(own["down"])
    write_tensors(target / "model.safetensors", tensors, dtype="BF16")
    return target


def test_fused_and_single_experts_give_the_same_files(folder, tmp_path):
    fused = fuse(folder / "base", tmp_path / "fused")
    for quantization in ("bf16", "q4_k_m"):
        files = [
            export_adapter(
                folder / "lora",
                base=base,
                quantization=quantization,
                output=tmp_path / f"{i}.gguf",
                name="x",
                force=True,
            )
            for i, base in enumerate((folder / "base", fused))
        ]
        assert files[0].sha256 == files[1].sha256, quantization
    merged = [
        export_adapter(folder / "lora", format="merged", base=base, output=tmp_path / f"merged-{i}").path
        for i, base in enumerate((folder / "base", fused))
    ]
    one = read_all(fuse(merged[0], tmp_path / "refused") / "model.safetensors")
    two = read_all(merged[1] / "model.safetensors")
    assert list(one) == list(two)
    assert f"{NAME.format(0)}.gate_up_proj" in two
    assert all(np.array_equal(one[name], two[name]) for name in one)


def test_experts_without_adapter_weights_are_reported(folder, tmp_path):
    (tmp_path / "lora").mkdir()
    (tmp_path / "lora" / "adapter_config.json").write_bytes((folder / "lora" / "adapter_config.json").read_bytes())
    tensors = read_all(folder / "lora" / "adapter_model.safetensors")
    kept = {name: value for name, value in tensors.items() if "layers.1.mlp.experts.2.up_proj" not in name}
    assert len(kept) == len(tensors) - 2
    write_tensors(tmp_path / "lora" / "adapter_model.safetensors", kept)
    expected = f"1 matrices of experts have no adapter weights and stay the base's, such as {NAME.format(1)}.2.up_proj"
    for format in ("gguf", "merged"):
        done = export_adapter(tmp_path / "lora", format=format, output=tmp_path / format)
        assert any(note.startswith(expected) for note in done.notes), done.notes
    assert not export_adapter(folder / "lora", output=tmp_path / "whole.gguf").notes


def test_the_gate_passes_a_mixture(folder, tmp_path):
    skip_without_llama_cpp()
    report = export_adapter(folder / "lora", quantization="q8_0", output=tmp_path / "x.gguf", verify=True).parity
    assert report.reference == "independent forward pass"
    assert {check.name: check.result for check in report.checks}["divergence"] == "passed"


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"norm_topk_prob": False}, "norm_topk_prob"),
        ({"mlp_only_layers": [0]}, "layers without experts"),
        ({"decoder_sparse_step": 2}, "layers without experts"),
        ({"num_local_experts": 5}, "expert 4 is missing"),
        ({"num_local_experts": 3}, "there are 4"),
    ],
)
def test_what_a_gguf_cannot_say_is_refused_before_it_is_written(folder, tmp_path, change, word):
    base = tmp_path / "base"
    base.mkdir()
    for file in (folder / "base").iterdir():
        (base / file.name).write_bytes(file.read_bytes())
    write_json(base / "config.json", {**json.loads((base / "config.json").read_text()), **change})
    with pytest.raises((ArchitectureUnsupportedError, ModelInvalidError), match=word):
        export_adapter(base, output=tmp_path / "x.gguf")
    assert not (tmp_path / "x.gguf").exists()


def test_two_tensors_of_one_name_are_refused(folder, tmp_path):
    base = tmp_path / "base"
    base.mkdir()
    for file in (folder / "base").iterdir():
        (base / file.name).write_bytes(file.read_bytes())
    tensors = read_all(base / "model.safetensors")
    assert set(tensors) == set(read_model_index(base))
    write_tensors(
        base / "model.safetensors", {**tensors, "model.layers.0.block_sparse_moe.gate.weight": np.zeros((4, 256), "f4")}
    )
    with pytest.raises(ModelInvalidError, match="which are one tensor"):
        export_adapter(base, output=tmp_path / "x.gguf")


@pytest.mark.parametrize("format", ["gguf-adapter", "mlx"])
def test_adapter_formats_refuse_experts(folder, tmp_path, format):
    with pytest.raises(AdapterFormatError, match="single experts"):
        export_adapter(folder / "lora", format=format, output=tmp_path / "x")


def test_experts_in_unsloths_form_are_rejected_too():
    """Named ``experts.gate_up_projs.3``, all of them would go to one tensor of the file."""
    pair = LoraPair(np.ones((2, 8), np.float32), np.ones((16, 2), np.float32), 1.0)
    named = {f"model.layers.0.mlp.experts.gate_up_projs.{i}": pair for i in range(3)}
    with pytest.raises(AdapterFormatError, match="gate_up_projs"):
        require_plain(LoraAdapter(None, named), "gguf-adapter")


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    """A pico gpt-oss whose experts are in 4 bits, and an adapter on its attention."""
    folder = tmp_path_factory.mktemp("packed")
    write_model(folder, "gpt-oss")
    base = folder / "base"
    random = np.random.default_rng(5)
    floats = read_all(base / "model.safetensors")
    entries = {}
    for name, value in floats.items():
        if name.endswith(("gate_up_proj", "down_proj")):
            experts, inp, out = value.shape
            entries[f"{name}_blocks"] = ("U8", random.integers(0, 256, (experts, out, inp // 32, 16), np.uint8))
            entries[f"{name}_scales"] = ("U8", random.integers(117, 122, (experts, out, inp // 32)).astype(np.uint8))
        else:
            entries[name] = ("F32", value)
    header, offset = {}, 0
    for name, (dtype, value) in entries.items():
        header[name] = {"dtype": dtype, "shape": value.shape, "data_offsets": [offset, offset + value.nbytes]}
        offset += value.nbytes
    text = json.dumps(header).encode()
    data = b"".join(value.tobytes() for _, value in entries.values())
    (base / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + data)
    config = json.loads((base / "config.json").read_text())
    write_json(base / "config.json", {**config, "quantization_config": {"quant_method": "mxfp4"}})
    return folder


def test_experts_in_4_bits_are_copied_and_the_gate_passes(packed, tmp_path):
    """GGUF's MXFP4 holds the same codes in another order, so nothing is rounded; a merged folder holds them in 16 bits."""
    skip_without_llama_cpp()
    done = export_adapter(packed / "lora", quantization="mxfp4", output=tmp_path / "x.gguf", verify=True)
    assert {check.name: check.result for check in done.parity.checks}["divergence"] == "passed"
    found = {tensor.name: tensor for tensor in gguf.GGUFReader(done.path).tensors}
    with FoldedModel(open_model(packed / "base")) as model:
        for projection in ("gate", "up", "down"):
            tensor = found[f"blk.1.ffn_{projection}_exps.weight"]
            assert tensor.tensor_type.name == "MXFP4"
            values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
            for expert in range(4):
                name = f"model.layers.1.mlp.experts.{expert}.{projection}_proj.weight"
                assert np.array_equal(values[expert], model.read_rows(name, 0, 256)), name
        merged = export_adapter(packed / "lora", format="merged", output=tmp_path / "merged").path
        with FoldedModel(open_model(merged)) as other:
            assert set(other.tensors) == set(model.tensors)
            assert np.array_equal(other.read_rows(name, 0, 256), model.read_rows(name, 0, 256))
    assert "quantization_config" not in json.loads((merged / "config.json").read_text())
    assert f"{NAME.format(0)}.gate_up_proj" in read_index(merged / "model.safetensors")
