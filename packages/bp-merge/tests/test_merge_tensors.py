"""Safetensors reading and writing, against the safetensors package and torch's rounding."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from bp_merge import (
    TensorReader,
    TensorsInvalidError,
    decode,
    encode,
    read_index,
    read_model_index,
    round_to,
    write_tensors,
)

FLOATS = arrays(np.uint32, st.integers(1, 50), elements=st.integers(0, 2**32 - 1)).map(
    lambda bits: bits.view(np.float32)
)


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
def test_safetensors_package_reads_what_is_written(tmp_path, dtype):
    torch = pytest.importorskip("torch")
    load_file = pytest.importorskip("safetensors.torch").load_file
    rng = np.random.default_rng(0)
    tensors = {"b": rng.standard_normal((5, 3), np.float32), "a": rng.standard_normal(7, np.float32)}
    write_tensors(tmp_path / "x.safetensors", tensors, dtype=dtype)
    loaded = load_file(tmp_path / "x.safetensors")
    kind = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}[dtype]
    for name, value in tensors.items():
        assert loaded[name].dtype == kind
        assert torch.equal(loaded[name], torch.from_numpy(value).to(kind))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_reads_what_the_safetensors_package_wrote(tmp_path, dtype):
    torch = pytest.importorskip("torch")
    save_file = pytest.importorskip("safetensors.torch").save_file
    weight = torch.randn(6, 4).to(getattr(torch, dtype))
    save_file({"w": weight, "v": weight[0].clone()}, tmp_path / "x.safetensors")
    with TensorReader(read_index(tmp_path / "x.safetensors")) as reader:
        assert list(reader.tensors) == ["v", "w"]
        assert np.array_equal(reader.read("w"), weight.float().numpy())
        assert np.array_equal(reader.read_rows("w", 2, 5), weight.float().numpy()[2:5])
        assert reader.read("v").shape == (4,)


@given(FLOATS)
def test_bf16_rounding_is_torchs(values):
    torch = pytest.importorskip("torch")
    expected = torch.from_numpy(values.copy()).bfloat16().float().numpy()
    rounded = round_to(values, "BF16")
    assert np.array_equal(np.isnan(rounded), np.isnan(expected))
    finite = ~np.isnan(expected)
    assert np.array_equal(rounded[finite].view(np.uint32), expected[finite].view(np.uint32))


@given(FLOATS, st.sampled_from(["BF16", "F16", "F32"]))
def test_rounding_twice_is_rounding_once_and_encode_agrees(values, dtype):
    once = round_to(values, dtype)
    assert np.array_equal(round_to(once, dtype), once, equal_nan=True)
    assert np.array_equal(decode(encode(values, dtype), dtype), once, equal_nan=True)


def test_shards_are_found_through_the_index(tmp_path):
    for shard, name in (("model-1.safetensors", "a"), ("model-2.safetensors", "b")):
        write_tensors(tmp_path / shard, {name: np.ones((2, 2), np.float32)})
    index = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert list(read_model_index(tmp_path)) == ["a", "b"]
    index["weight_map"]["c"] = "model-2.safetensors"
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(TensorsInvalidError, match="names c"):
        read_model_index(tmp_path)
    (tmp_path / "model-2.safetensors").unlink()
    with pytest.raises(TensorsInvalidError, match="cannot be read"):
        read_model_index(tmp_path)


@pytest.mark.parametrize("damage", ["missing", "cut", "header", "dtype", "short"])
def test_damaged_files_are_coded_errors(tmp_path, damage):
    file = tmp_path / "x.safetensors"
    write_tensors(file, {"w": np.ones((4, 4), np.float32)})
    whole = file.read_bytes()
    if damage == "missing":
        file.unlink()
    elif damage == "cut":
        file.write_bytes(whole[:-8])
    elif damage == "header":
        file.write_bytes(whole[:8] + b"x" + whole[9:])
    elif damage == "dtype":
        file.write_bytes(whole.replace(b'"F32"', b'"I32"'))
    else:
        file.write_bytes(whole[:5])
    with pytest.raises(TensorsInvalidError):
        read_index(file)


def test_a_file_cut_after_indexing_is_a_coded_error(tmp_path):
    file = tmp_path / "x.safetensors"
    write_tensors(file, {"w": np.ones((4, 4), np.float32)})
    index = read_index(file)
    file.write_bytes(file.read_bytes()[:-8])
    with TensorReader(index) as reader, pytest.raises(TensorsInvalidError, match="ended inside w"):
        reader.read("w")
