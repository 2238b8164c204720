"""What is not installed is named, with the line that installs it."""

import sys
from importlib.util import find_spec

import numpy as np
import pytest
from export_pico import write_base, write_lora

import bp_export
from bp_export.chat import server
from bp_export.errors import GgmlMissingError, HubMissingError, LlamaCppMissingError
from bp_export.gguf.file import TensorType
from bp_export.quant import kernels


@pytest.fixture
def hide(monkeypatch):
    """Lets a package be as good as not installed."""

    def hide_it(name):
        monkeypatch.setitem(sys.modules, name, None)
        for module in (server, kernels.importlib.util):
            monkeypatch.setattr(module, "find_spec", lambda asked: None if asked == name else find_spec(asked))

    return hide_it


def test_without_llama_cpp_nothing_is_verified_or_asked(hide, tmp_path):
    lora = write_lora(tmp_path / "lora", write_base(tmp_path / "base"))
    hide("xllamacpp")
    for act in (
        lambda: bp_export.export_adapter(lora, base=tmp_path / "base", verify=True),
        lambda: bp_export.chat.open_session(lora, base=tmp_path / "base").__enter__(),
    ):
        with pytest.raises(LlamaCppMissingError) as caught:
            act()
        assert "pip install" in caught.value.fix
    assert not list(tmp_path.glob("*.gguf"))
    assert bp_export.export_adapter(lora, base=tmp_path / "base").parity is None, "by default it goes without"


def test_without_ggml_only_its_own_types_are_refused(hide, monkeypatch):
    hide("libggml")
    kernels.load_ggml.cache_clear()
    try:
        with pytest.raises(GgmlMissingError) as caught:
            kernels.quantize_rows(np.ones((1, 256), np.float32), TensorType.Q4_K, np.ones(256, np.float32))
        assert "pip install" in caught.value.fix
        assert kernels.quantize_rows(np.ones((1, 256), np.float32), TensorType.Q8_0).size == 272
        assert kernels.quantize_rows(np.ones((1, 32), np.float32), TensorType.Q5_0).size == 22
        with pytest.raises(GgmlMissingError):
            kernels.quantize_rows(np.ones((1, 256), np.float32), TensorType.Q3_K)
    finally:
        kernels.load_ggml.cache_clear()


@pytest.mark.parametrize("kind", sorted(set(bp_export.QUANTIZATIONS) - {"iq4_xs", "q3_k_m", "q2_k"}))
def test_a_model_is_exported_without_ggml_but_for_three_types(kind, hide, tmp_path):
    """`pip install bp-export` brings no ggml: a file has tensors of several types, norms in f32 among them."""
    lora = write_lora(tmp_path / "lora", write_base(tmp_path / "base"))
    hide("libggml")
    kernels.load_ggml.cache_clear()
    try:
        found = bp_export.export_adapter(lora, base=tmp_path / "base", quantization=kind, verify=False)
        assert found.path.stat().st_size == found.bytes > 0
    finally:
        kernels.load_ggml.cache_clear()


def test_without_the_hub_s_client_nothing_is_pushed(hide, tmp_path):
    hide("huggingface_hub")
    with pytest.raises(HubMissingError) as caught:
        bp_export.hub.push(tmp_path, "me/model")
    assert "bp-export[hub]" in caught.value.fix
