"""The chat template on its way from training to a chat: the same text, the same end of a turn, the same hashes."""

import json

import pytest
from export_pico import TEMPLATE, export_adapter, skip_without_llama_cpp, write_base, write_lora
from fake_ollama import serve

from bp_data.templates.engine import ChatTemplate
from bp_data.templates.reader import SpecialTokens, read_special_tokens
from bp_data.templates.render_hashes import CONVERSATIONS, hash_conversations
from bp_export.chat.llama import LlamaChat
from bp_export.cli.app import main
from bp_export.errors import TemplateChangedError
from bp_export.formats.ollama_adapter import read_ollama_adapter
from bp_export.gguf.file import read_settings, read_stop_strings
from bp_export.ollama.register import register_adapter, register_gguf
from bp_export.verify.template import check_gguf, read_gguf_template
from bp_runs.adapter import changed_files, copy_tokenizer_files, read_manifest, write_manifest

OTHER = TEMPLATE.replace("assistant\n", "helper\n")
NAMED = [{"name": "default", "template": TEMPLATE}, {"name": "tool_use", "template": "T" + TEMPLATE}]


def end_with_another_eos(base, kind):
    """A model whose eos is <|endoftext|> and whose turns end with <|im_end|>, its template in one of five places."""
    (base / "chat_template.jinja").unlink()
    config = json.loads((base / "tokenizer_config.json").read_text())
    config |= {"eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>"}
    if kind in ("text", "list"):
        config["chat_template"] = TEMPLATE if kind == "text" else NAMED
    elif kind == "json":
        (base / "chat_template.json").write_text(json.dumps({"chat_template": TEMPLATE}))
    else:
        (base / "chat_template.jinja").write_text(TEMPLATE)
    if kind == "additional":
        (base / "additional_chat_templates").mkdir()
        (base / "additional_chat_templates/tool_use.jinja").write_text("T" + TEMPLATE)
    (base / "tokenizer_config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("kind", ["text", "list", "json", "jinja", "additional"])
def test_the_file_stops_where_turns_end_wherever_the_template_is(tmp_path, kind):
    base = write_base(tmp_path / "base", eos_token_id=0)
    end_with_another_eos(base, kind)
    settings = read_settings(export_adapter(base, quantization="q8_0").path)
    tokens = settings["tokenizer.ggml.tokens"]
    assert tokens[settings["tokenizer.ggml.eos_token_id"]] == "<|im_end|>"
    assert read_stop_strings(settings) == ["<|im_end|>"]
    assert settings["tokenizer.chat_template"] == TEMPLATE
    named = {"default": TEMPLATE, **({"tool_use": "T" + TEMPLATE} if kind in ("list", "additional") else {})}
    found = read_gguf_template(settings)
    assert (found.texts, found.terminator) == (named, "<|im_end|>")


def store_hashes(lora, base, template=TEMPLATE):
    """Write an adapter's manifest as training does."""
    copy_tokenizer_files(base, lora)
    (lora / "chat_template.jinja").write_text(template)
    hashes = hash_conversations(ChatTemplate(template, SpecialTokens(read_special_tokens(base))))
    write_manifest(lora, run_id="r1", base=str(base), template=hashes.to_dict())
    return hashes


@pytest.fixture
def adapter(tmp_path):
    base = write_base(tmp_path / "base")
    lora = write_lora(tmp_path / "lora", base)
    store_hashes(lora, base)
    return lora


def test_an_export_reproduces_the_hashes_and_the_file_carries_them(adapter):
    made = export_adapter(adapter, quantization="q8_0")
    assert (made.rendering.result, made.rendering.note) == ("passed", "10 conversations render as at training")
    assert check_gguf(made.path) == made.rendering
    merged = export_adapter(adapter, format="merged")
    again = export_adapter(merged.path, quantization="q8_0")
    assert {merged.rendering.result, again.rendering.result, check_gguf(again.path).result} == {"passed"}
    (merged.path / "chat_template.jinja").write_text(OTHER)
    with pytest.raises(TemplateChangedError):
        export_adapter(merged.path, quantization="q8_0", force=True)


@pytest.mark.parametrize("format", ["gguf", "merged", "lora", "ollama-adapter"])
def test_a_changed_template_is_not_exported(adapter, tmp_path, format):
    (adapter / "chat_template.jinja").write_text(OTHER)
    with pytest.raises(TemplateChangedError, match="10 of 10 conversations") as caught:
        export_adapter(adapter, format=format, output=tmp_path / "out", ollama_base="b" if "ollama" in format else None)
    assert caught.value.details == {"conversations": list(range(1, 11))}
    assert str(adapter) in caught.value.fix
    assert not (tmp_path / "out").exists()


def test_a_change_that_shows_in_one_conversation_alone_is_named(adapter):
    (adapter / "chat_template.jinja").write_text("{% if tools %}T{% endif %}" + TEMPLATE)
    with pytest.raises(TemplateChangedError, match="1 of 10 conversations") as caught:
        export_adapter(adapter, quantization="q8_0")
    assert caught.value.details == {"conversations": [10]}
    (adapter / "chat_template.jinja").unlink()
    with pytest.raises(TemplateChangedError, match="has no chat template"):
        export_adapter(adapter, quantization="q8_0")


def test_adapters_without_hashes_and_with_hashes_of_others_are_not_tested(adapter, tmp_path):
    manifest = read_manifest(adapter)
    manifest["template"]["conversations"] = "0" * 64
    (adapter / "run.json").write_text(json.dumps(manifest))
    assert "other conversations" in export_adapter(adapter, quantization="q8_0").rendering.note
    (adapter / "run.json").unlink()
    for format in ("lora", "mlx", "merged"):
        made = export_adapter(adapter, format=format)
        assert made.rendering.result == "not tested"
        assert made.rendering.note.startswith("not tested: no hashes")


def write_other_template(adapter):
    """A GGUF whose template was replaced after training, as a tool that edits GGUFs would."""
    path = export_adapter(adapter, quantization="q8_0").path
    data = path.read_bytes()
    assert data.count(b"assistant\n") == 1
    path.write_bytes(data.replace(b"assistant\n", b"assistent\n"))
    return path


@pytest.mark.parametrize("version", ["0.32.15", "0.29.0"])
def test_ollama_gets_no_file_that_renders_otherwise(adapter, tmp_path, monkeypatch, version):
    skip_without_llama_cpp()
    monkeypatch.setattr("fake_ollama.find_go_template", lambda jinja: None)  # it knows no template by heart
    path = export_adapter(adapter, quantization="q8_0").path
    with serve(tmp_path, version) as server:
        made = register_gguf(path, "right", host=server.url, question=None)
        # Servers before 0.30 can't run Jinja: they get a Go template, which nothing here can render.
        expected = "passed" if version == "0.32.15" else "not tested"
        assert made.rendering.result == expected
        path.unlink()
        with pytest.raises(TemplateChangedError, match="10 of 10") as caught:
            register_gguf(write_other_template(adapter), "wrong", host=server.url)
        assert "export ADAPTER" in caught.value.fix
        assert "wrong" not in str(server.models)


def test_an_adapter_for_ollama_goes_on_no_base_that_renders_otherwise(adapter, tmp_path, monkeypatch):
    base = tmp_path / "base"
    gguf = export_adapter(base, quantization="f32").path
    made = export_adapter(adapter, format="ollama-adapter", output=tmp_path / "shipped", ollama_base=str(gguf))
    assert read_ollama_adapter(made.path).hashes is not None
    monkeypatch.setattr("fake_ollama.find_go_template", lambda jinja: None)
    with serve(tmp_path, "0.32.15") as server:
        assert register_adapter(made.path, "a", host=server.url, question=None).rendering.result == "passed"
        data = gguf.read_bytes()
        gguf.write_bytes(data.replace(b"assistant\n", b"assistent\n"))
        with pytest.raises(TemplateChangedError):
            register_adapter(made.path, "b", host=server.url, question=None)


def test_chat_rejects_a_file_that_renders_otherwise(adapter):
    skip_without_llama_cpp()
    with pytest.raises(TemplateChangedError):
        LlamaChat(write_other_template(adapter))


def test_parity_counts_the_hashes(adapter):
    skip_without_llama_cpp()
    made = export_adapter(adapter, quantization="f16", verify=True)
    checks = {check.name: check for check in made.parity.checks}
    assert (checks["training"].result, checks["template"].note) == ("passed", f"{len(CONVERSATIONS)} conversations")


def test_copies_and_manifests_hold_named_templates(adapter, tmp_path):
    (adapter / "additional_chat_templates").mkdir()
    (adapter / "additional_chat_templates/tool_use.jinja").write_text(TEMPLATE)
    write_manifest(adapter, run_id="r1", base="base")
    assert "additional_chat_templates/tool_use.jinja" in read_manifest(adapter)["files"]
    for format in ("lora", "merged"):
        made = export_adapter(adapter, format=format, output=tmp_path / f"a-{format}")
        assert (made.path / "additional_chat_templates/tool_use.jinja").read_text() == TEMPLATE
    assert changed_files(tmp_path / "a-lora") == []
    export_adapter(adapter, format="lora", output=tmp_path / "a-lora", force=True)


def test_chat_says_whether_its_template_was_tested(adapter, tmp_path, capsys, monkeypatch):
    skip_without_llama_cpp()
    monkeypatch.setattr("builtins.input", lambda *_: "/bye")
    assert main(["chat", str(adapter)]) == 0
    assert "10 conversations render as at training" in capsys.readouterr().err
    assert main(["chat", str(tmp_path / "base"), "--prompt", "the cat", "--max-tokens", "1", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["rendering"]["result"] == "not tested"


THINKING = "{% if enable_thinking is defined %}[thinking]{% endif %}" + TEMPLATE
DATED = (
    "\n  {%- if not date_string is defined %}{%- set date_string = '26 Jul 2024' %}{%- endif %}[{{ date_string }}]"
    + TEMPLATE
)


@pytest.mark.parametrize("template", [THINKING, DATED], ids=["thinking", "dated"])
def test_what_llama_cpp_sets_by_itself_stays_undefined_as_at_training(tmp_path, template):
    """Qwen3.5 and Llama 3.1: training renders without thinking and with a fixed day, llama.cpp with and with today."""
    skip_without_llama_cpp()
    base = write_base(tmp_path / "base")
    lora = write_lora(tmp_path / "lora", base)
    store_hashes(lora, base, template)
    made = export_adapter(lora, quantization="f16", verify=True)
    checks = {check.name: check.result for check in made.parity.checks}
    assert (checks["training"], checks["template"]) == ("passed", "passed")
    LlamaChat(made.path).close()
    (lora / "run.json").unlink()
    assert (
        read_settings(export_adapter(lora, quantization="f16", force=True).path)["tokenizer.chat_template"] == template
    )


def test_chat_rejects_a_template_that_llama_cpp_renders_otherwise(tmp_path):
    skip_without_llama_cpp()
    base = write_base(tmp_path / "base")
    lora = write_lora(tmp_path / "lora", base)
    # A filter that Jinja has and llama.cpp's engine does not apply as Jinja does.
    store_hashes(lora, base, "{{ '%s' | format(messages[0].content) }}" + TEMPLATE)
    path = export_adapter(lora, quantization="q8_0").path
    assert check_gguf(path).result == "passed"
    with pytest.raises(TemplateChangedError, match=r"llama\.cpp renders"):
        LlamaChat(path)
