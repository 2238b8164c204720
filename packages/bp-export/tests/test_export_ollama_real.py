"""The same steps against a real Ollama, where OLLAMA_HOST names one that answers."""

import os

import pytest
from export_pico import export_adapter, write_base

from bp_export import ask_model, list_models, register_gguf, remove_model, require_ollama
from bp_export.errors import OllamaRegistrationError

pytestmark = pytest.mark.ollama


@pytest.fixture
def host():
    named = os.environ.get("OLLAMA_HOST", "")
    address = named if "://" in named else f"http://{named}"
    try:
        require_ollama(address)
    except OllamaRegistrationError as error:
        pytest.skip(f"no Ollama: {error.message}")
    return address


def test_upload_create_show_chat_list_remove(host, tmp_path):
    path = export_adapter(write_base(tmp_path / "base", hidden=256, inner=256), quantization="q8_0").path
    seen = []
    made = register_gguf(path, "bp-pico:test", host=host, context=256, system="Be short.", status=seen.append)
    try:
        assert seen[-1] == "success"
        assert not made.is_raw
        assert "bp-pico:test" in [model.name for model in list_models(host)]
        assert isinstance(ask_model("bp-pico:test", [{"role": "user", "content": "the cat"}], host, max_tokens=4), str)
    finally:
        remove_model("bp-pico:test", host)
    assert "bp-pico:test" not in [model.name for model in list_models(host)]


def test_errors_inside_its_streams_are_errors(host, tmp_path):
    path = export_adapter(write_base(tmp_path / "base"), quantization="q8_0").path
    with pytest.raises(OllamaRegistrationError):
        register_gguf(path, "bp-pico:test", host=host, template="{{ .Broken")
    with pytest.raises(OllamaRegistrationError, match="not found"):
        ask_model("bp-none", [{"role": "user", "content": "x"}], host)
    with pytest.raises(OllamaRegistrationError, match="not found"):
        remove_model("bp-none", host)
