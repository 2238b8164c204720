"""Exported tensors against stored hashes of files that were llama_model_quantize's; see `make_golden.py`."""

import json

import pytest
from export_pico import export_adapter
from make_golden import CASES, GOLDEN, hash_tensors, write_stable_base

from bp_export import QUANTIZATIONS


@pytest.mark.parametrize("name", CASES)
def test_tensors_have_the_stored_hashes(tmp_path, name):
    base = write_stable_base(tmp_path, name)
    stored = json.loads(GOLDEN.read_text())[name]
    assert set(stored) == set(QUANTIZATIONS) - {"f32", "f16"}
    for quantization, expected in stored.items():
        path = export_adapter(base, quantization=quantization, output=tmp_path / f"{quantization}.gguf").path
        assert hash_tensors(path) == expected, quantization
