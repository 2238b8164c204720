"""Exported tensors against stored hashes of files that the reference programs made alike; see `make_golden.py`."""

import json
from pathlib import Path

import pytest
from export_pico import export_adapter
from golden_models import FILE, MODELS, list_quantizations, write_model
from make_golden import CASES, GOLDEN, hash_tensors, write_stable_base

from bp_export import QUANTIZATIONS
from bp_export.architectures import ARCHITECTURES

STORED = json.loads(GOLDEN.read_text())


@pytest.mark.parametrize("name", CASES)
def test_tensors_have_the_stored_hashes(tmp_path, name):
    base = write_stable_base(tmp_path, name)
    stored = STORED["plain"][name]
    assert set(stored) == set(QUANTIZATIONS) - {"f32", "f16", "mxfp4"}
    for quantization, expected in stored.items():
        path = export_adapter(base, quantization=quantization, output=tmp_path / f"{quantization}.gguf").path
        assert hash_tensors(path) == expected, quantization


@pytest.mark.parametrize("name", MODELS)
def test_every_architectures_tensors_are_the_chains(tmp_path, name):
    """PEFT's merge, llama.cpp's converter and llama_model_quantize made the same, when the hashes were stored."""
    lora = write_model(tmp_path, name)
    stored = STORED["architectures"][name]
    assert set(stored) == set(list_quantizations(name))
    for quantization, expected in stored.items():
        path = export_adapter(lora, quantization=quantization, output=tmp_path / f"{quantization}.gguf").path
        assert hash_tensors(path) == expected, quantization


def test_no_architecture_is_left_out():
    models = json.loads(FILE.read_text())
    covered = {ARCHITECTURES[models[name]["config"]["architectures"][0]] for name in MODELS}
    assert covered == set(ARCHITECTURES.values())
    assert set(STORED["architectures"]) == set(MODELS) == set(models)


def test_the_handbooks_table_names_every_model_and_all_agree():
    """`just oracle` wrote it; a model that was added since is missing."""
    page = (Path(__file__).parents[3] / "docs" / "reference" / "layouts.md").read_text(encoding="utf-8")
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in page.splitlines() if line.startswith("| `")]
    assert {row[1] for row in rows} == set(MODELS)
    assert {cell for row in rows for cell in row[2:]} == {"yes"}
