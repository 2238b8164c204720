"""A base through 4 bits and back, against bitsandbytes."""

import numpy as np
import pytest

from bp_merge import Nf4Reader, TensorReader, open_model, read_model_index, write_tensors
from bp_merge.nf4 import VALUES, _build_dynamic_map

NAMES = ("model.layers.0.mlp.up_proj.weight", "model.layers.1.self_attn.q_proj.weight")
SHAPES = ((96, 64), (33, 100))


def write_model(folder, dtype):
    random = np.random.default_rng(0)
    tensors = {n: random.standard_normal(s, np.float32) * np.float32(0.05) for n, s in zip(NAMES, SHAPES, strict=True)}
    tensors |= {"model.embed_tokens.weight": random.standard_normal((40, 64), np.float32)}
    tensors |= {"model.layers.0.input_layernorm.weight": np.ones(64, np.float32)}
    folder.mkdir(exist_ok=True)
    write_tensors(folder / "model.safetensors", tensors, dtype=dtype)
    return folder


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("dtype", ["BF16", "F32"])
def test_values_are_bitsandbytes(tmp_path, dtype, double):
    torch = pytest.importorskip("torch")
    functional = pytest.importorskip("bitsandbytes.functional")
    folder = write_model(tmp_path / "model", dtype)
    with (
        TensorReader(read_model_index(folder)) as plain,
        open_model(folder, dequantize=True, double_quantized=double) as rounded,
    ):
        assert rounded.packed == set(NAMES)
        for name in NAMES:
            weight = torch.from_numpy(plain.read(name)).to(torch.bfloat16 if dtype == "BF16" else torch.float32)
            codes, state = functional.quantize_4bit(weight, quant_type="nf4", compress_statistics=double)
            expected = functional.dequantize_4bit(codes, state).float().numpy()
            found = rounded.read(name)
            assert not np.array_equal(found, plain.read(name))
            # With double quantization the mean of the factors may differ in its last bit.
            assert np.abs(found - expected).max() <= (1e-7 if double else 0.0)
        others = set(plain.tensors) - set(NAMES)
        assert all(np.array_equal(rounded.read(name), plain.read(name)) for name in others)


def test_values_and_factors_have_bitsandbytes_tables():
    functional = pytest.importorskip("bitsandbytes.functional")
    assert np.array_equal(functional.get_4bit_type("nf4", device="cpu").numpy(), VALUES)
    assert np.array_equal(functional.create_dynamic_map().numpy(), _build_dynamic_map()[0])


def test_rows_by_themselves_are_those_of_the_whole(tmp_path):
    """Blocks of 64 run on over rows of 100."""
    folder = write_model(tmp_path / "model", "BF16")
    with Nf4Reader(read_model_index(folder), [NAMES[1]]) as reader:
        whole = reader.read(NAMES[1])
        for start, stop in ((0, 1), (5, 9), (16, 33), (32, 33)):
            assert np.array_equal(reader.read_rows(NAMES[1], start, stop), whole[start:stop])
        with TensorReader(read_model_index(folder)) as plain:
            assert np.array_equal(reader.read(NAMES[0]), plain.read(NAMES[0])), "only what is named is rounded"
