"""Bases that bitsandbytes packed in 4 bits: refused with the original's name, or unpacked bit for bit as it does."""

import json

import gguf
import numpy as np
import pytest
from export_pico import export_adapter, write_base, write_json, write_lora

from bp_export.errors import ModelInvalidError
from bp_merge import TensorReader, TensorsInvalidError, open_model, read_model_index

torch = pytest.importorskip("torch")
bitsandbytes = pytest.importorskip("bitsandbytes")
safetensors = pytest.importorskip("safetensors.torch")


def pack(base, *, kind, nested, dtype="bfloat16"):
    """Pack a base's linear weights as transformers saves them; returns what bitsandbytes unpacks them to."""
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    tensors = safetensors.load_file(base / "model.safetensors")
    expected = {}
    for name in [name for name in tensors if "_proj.weight" in name]:
        weight = tensors.pop(name).to(getattr(torch, dtype))
        codes, state = quantize_4bit(weight, quant_type=kind, compress_statistics=nested)
        tensors[name] = codes
        tensors |= {f"{name}.{key}": value for key, value in state.as_dict(packed=True).items()}
        expected[name] = dequantize_4bit(codes, state).float().numpy()
    safetensors.save_file({name: value.contiguous() for name, value in tensors.items()}, base / "model.safetensors")
    config = json.loads((base / "config.json").read_text())
    packed = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": kind}
    write_json(base / "config.json", {**config, "quantization_config": packed})
    return expected


@pytest.fixture
def base(tmp_path):
    return write_base(tmp_path / "pico-bnb-4bit", hidden=128, inner=192)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(
    ("kind", "nested", "dtype"),
    [("nf4", True, "bfloat16"), ("nf4", False, "float16"), ("fp4", True, "float32"), ("fp4", False, "bfloat16")],
)
def test_weights_are_those_that_bitsandbytes_unpacks(base, kind, nested, dtype):
    expected = pack(base, kind=kind, nested=nested, dtype=dtype)
    with open_model(base, dequantize=True) as reader:
        assert "model.norm.weight" in reader.tensors
        assert not [name for name in reader.tensors if "absmax" in name or "quant" in name]
        for name, values in expected.items():
            assert np.array_equal(reader.read(name), values), name
            cut = [reader.read_rows(name, i, min(i + 5, len(values))) for i in range(0, len(values), 5)]
            assert np.array_equal(np.concatenate(cut), values), name


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_blocks_run_on_from_row_to_row_where_rows_are_no_multiple_of_them(tmp_path):
    """There bitsandbytes' own CPU kernel begins a block with each row, and is far from the weights that it packed."""
    base = write_base(tmp_path / "odd", hidden=96, inner=160, heads=6)
    with TensorReader(read_model_index(base)) as reader:
        before = {name: reader.read(name) for name in reader.tensors}
    pack(base, kind="nf4", nested=False)
    with open_model(base, dequantize=True) as reader:
        for name, values in before.items():
            assert np.abs(reader.read(name) - values).max() < 0.16 * np.abs(values).max(), name


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_packed_base_is_refused_or_exported_as_its_unpacked_self(tmp_path, base):
    lora = write_lora(tmp_path / "lora", base)
    plain = write_base(tmp_path / "plain", hidden=128, inner=192)
    expected = pack(base, kind="nf4", nested=True)
    with pytest.raises(ModelInvalidError, match="bitsandbytes") as caught:
        export_adapter(lora)
    assert 'base="pico";' in caught.value.fix
    assert "dequantize=True" in caught.value.fix

    weights = safetensors.load_file(plain / "model.safetensors")
    weights |= {name: torch.from_numpy(values).bfloat16() for name, values in expected.items()}
    safetensors.save_file(weights, plain / "model.safetensors")
    ours = export_adapter(lora, dequantize=True, quantization="q8_0", output=tmp_path / "ours.gguf")
    theirs = export_adapter(lora, base=plain, quantization="q8_0", output=tmp_path / "theirs.gguf")
    assert ours.sha256 == theirs.sha256
    merged = export_adapter(lora, dequantize=True, format="merged", output=tmp_path / "merged").path
    assert "quantization_config" not in json.loads((merged / "config.json").read_text())
    again = export_adapter(merged, quantization="q8_0", output=tmp_path / "again.gguf").path
    found = {t.name: t.data for t in gguf.GGUFReader(again).tensors}
    assert all(np.array_equal(found[t.name], t.data) for t in gguf.GGUFReader(ours.path).tensors)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_what_is_packed_otherwise_or_not_whole_is_refused(tmp_path, base):
    lora = write_lora(tmp_path / "lora", base)
    pack(base, kind="nf4", nested=True)
    config = json.loads((base / "config.json").read_text())
    for method in ({"quant_method": "gptq"}, {"quant_method": "bitsandbytes", "load_in_8bit": True}):
        write_json(base / "config.json", {**config, "quantization_config": method})
        with pytest.raises(ModelInvalidError):
            export_adapter(lora, dequantize=True)
    write_json(base / "config.json", config)
    tensors = safetensors.load_file(base / "model.safetensors")
    for end in (".absmax", ".quant_map", ".nested_absmax"):
        torn = {n: t[:-1].clone() if n.endswith("q_proj.weight" + end) else t for n, t in tensors.items()}
        safetensors.save_file(torn, base / "model.safetensors")
        with pytest.raises(TensorsInvalidError, match="q_proj"):
            export_adapter(lora, dequantize=True)
    for end in (".absmax", ".nested_quant_map"):
        lacking = {name: value for name, value in tensors.items() if not name.endswith("q_proj.weight" + end)}
        safetensors.save_file(lacking, base / "model.safetensors")
        with pytest.raises(TensorsInvalidError, match="q_proj"):
            export_adapter(lora, dequantize=True)
    assert not list(tmp_path.glob("*.gguf"))


def test_a_16_bit_model_is_read_as_training_in_4_bits_saw_it(base):
    with (
        open_model(base) as plain,
        open_model(base, dequantize=True) as one,
        TensorReader(read_model_index(base)) as other,
    ):
        assert dict(plain.tensors) == dict(one.tensors) == dict(other.tensors)
        assert all(np.array_equal(plain.read(name), other.read(name)) for name in plain.tensors)
        changed = {name for name in one.tensors if not np.array_equal(one.read(name), other.read(name))}
        assert changed == {name for name in one.tensors if name.endswith("_proj.weight")}
