"""The same steps against a real Ollama: the one that OLLAMA_HOST names; skipped only where it names none."""

import pytest
import tokenizers
from export_pico import export_adapter, write_base, write_lora

from bp_export.errors import OllamaNameTakenError, OllamaRegistrationError
from bp_export.ollama import (
    ask_model,
    list_models,
    register_adapter,
    register_gguf,
    remove_model,
    require_ollama,
    takes_adapters,
)
from bp_export.ollama.register import FIRST_QUESTION

pytestmark = pytest.mark.ollama


def test_upload_create_show_chat_list_remove(real_ollama, tmp_path):
    path = export_adapter(write_base(tmp_path / "base", hidden=256, inner=256), quantization="q8_0").path
    seen = []
    made = register_gguf(
        path, "bp-pico:test", host=real_ollama, context=256, system="Be short.", force=True, status=seen.append
    )
    try:
        assert seen[-1] == "success"
        assert not made.is_raw
        assert made.answer is not None
        with pytest.raises(OllamaNameTakenError):
            register_gguf(path, "bp-pico:test", host=real_ollama)
        assert "bp-pico:test" in [model.name for model in list_models(real_ollama)]
        assert isinstance(
            ask_model("bp-pico:test", [{"role": "user", "content": "the cat"}], real_ollama, max_tokens=4), str
        )
    finally:
        remove_model("bp-pico:test", real_ollama)
    assert "bp-pico:test" not in [model.name for model in list_models(real_ollama)]


LLAMA_3 = (
    "{% for m in messages %}{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' + m.content + '<|eot_id|>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
PHI_4 = (
    "{% for m in messages %}{{ '<|' + m.role + '|>' + m.content + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
MARKS = {
    "chatml": ("smollm", None, "<|im_end|>", ()),
    "llama-3": ("llama-bpe", LLAMA_3, "<|eot_id|>", ("<|start_header_id|>", "<|end_header_id|>")),
    "phi-4": ("smollm", PHI_4, "<|end|>", ("<|system|>", "<|user|>", "<|assistant|>")),
}


@pytest.mark.parametrize("marks", MARKS)
def test_template_and_stop_of_three_families(real_ollama, tmp_path, marks):
    """A random model says anything, so what Ollama renders is compared by the first token of three chats."""
    family, template, end, others = MARKS[marks]
    base = write_base(tmp_path / "base", hidden=256, inner=256, family=family, pad_vocab=8, tied=False)
    if template is not None:
        tokenizer = tokenizers.Tokenizer.from_file(str(base / "tokenizer.json"))
        tokenizer.add_special_tokens([end, *others])
        tokenizer.save(str(base / "tokenizer.json"))
        (base / "chat_template.jinja").write_text(template)
    path = export_adapter(base, quantization="f16").path
    made = register_gguf(path, "bp-marks:test", host=real_ollama, force=True)
    try:
        found = {check.name: check for check in made.parity.checks}
        assert found["template"].result == "passed", (found["template"].note, made.template)
        assert end in made.stop
        assert not made.is_raw
    finally:
        remove_model("bp-marks:test", real_ollama)


def test_an_adapter_on_its_base_or_the_fix_where_the_server_takes_none(real_ollama, tmp_path):
    base = write_base(tmp_path / "base", hidden=256, inner=256)
    path = export_adapter(base, quantization="q8_0").path
    register_gguf(path, "bp-base:test", host=real_ollama, force=True, question=None)
    shipped = export_adapter(
        write_lora(tmp_path / "lora", base), format="ollama-adapter", ollama_base="bp-base:test"
    ).path
    try:
        if takes_adapters(require_ollama(real_ollama)):
            tuned = register_adapter(shipped, "bp-tuned:test", host=real_ollama, force=True, context=256)
            question = [{"role": "user", "content": FIRST_QUESTION}]
            assert tuned.answer != ask_model("bp-base:test", question, real_ollama, max_tokens=16)
            remove_model("bp-tuned:test", real_ollama)
        else:
            with pytest.raises(OllamaRegistrationError, match="takes no adapters"):
                register_adapter(shipped, "bp-tuned:test", host=real_ollama)
    finally:
        remove_model("bp-base:test", real_ollama)


def test_errors_inside_its_streams_are_errors(real_ollama, tmp_path):
    path = export_adapter(write_base(tmp_path / "base"), quantization="q8_0").path
    with pytest.raises(OllamaRegistrationError):
        register_gguf(path, "bp-pico:test", host=real_ollama, template="{{ .Broken")
    with pytest.raises(OllamaRegistrationError, match="not found"):
        ask_model("bp-none", [{"role": "user", "content": "x"}], real_ollama)
    with pytest.raises(OllamaRegistrationError, match="not found"):
        remove_model("bp-none", real_ollama)
