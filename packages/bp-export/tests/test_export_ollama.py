"""Registration against a strict stand-in for Ollama's server of both generations: upload, create, show, and a chat."""

import hashlib
import json
import os
import socket
import subprocess
import sys

import pytest
from export_pico import export_adapter, skip_without_llama_cpp, write_base, write_lora
from fake_ollama import serve

from bp_data.templates.render_hashes import CONVERSATIONS
from bp_export.chat import LlamaChat
from bp_export.cli.app import main
from bp_export.errors import (
    AdapterFormatError,
    OllamaNameTakenError,
    OllamaRegistrationError,
    QuantizationUnknownError,
)
from bp_export.ollama import (
    ask_model,
    find_server,
    list_models,
    register_adapter,
    register_gguf,
    remove_model,
    require_ollama,
    stream_answer,
    takes_adapters,
)
from bp_export.ollama.register import FIRST_QUESTION
from bp_export.ollama.server import is_local
from bp_merge import AdapterMismatchError
from bp_runs.errors import InvalidSettingError

skip_without_llama_cpp()

QUESTION = [{"role": "user", "content": "the cat"}]


@pytest.fixture
def ollama(tmp_path):
    """The new generation."""
    (tmp_path / "server").mkdir()
    with serve(tmp_path / "server") as server:
        yield server


@pytest.fixture
def old_ollama(tmp_path):
    (tmp_path / "old").mkdir()
    with serve(tmp_path / "old", "0.24.0") as server:
        yield server


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ollama")
    return export_adapter(write_base(folder / "base"), quantization="q8_0").path


def test_a_vision_tower_next_to_the_model_is_registered_with_it(ollama, model, tmp_path):
    """Real servers (0.24, 0.34.1) take the two files of one create as model and projector."""
    own, tower = tmp_path / "x.gguf", tmp_path / "mmproj-x.gguf"
    for path in (own, tower):
        path.write_bytes(model.read_bytes())
    register_gguf(own, "me/seeing", host=ollama.url, question=None)
    assert list(ollama.models["me/seeing:latest"]["request"]["files"]) == ["x.gguf", "mmproj-x.gguf"]


def test_a_model_is_uploaded_created_looked_at_and_asked(ollama, model):
    seen = []
    made = register_gguf(
        model, "me/pico:latest", host=ollama.url, system="Be short.", context=512, license="MIT", status=seen.append
    )
    assert ollama.calls[:5] == ["HEAD", "blobs", "create", "show", "chat"]
    checks = {check.name: check for check in made.parity.checks}
    assert (checks["witness"].result, checks["template"].result) == ("not tested", "passed"), checks["template"].note
    assert checks["template"].note == "3 conversations as Ollama renders them"
    request = ollama.models["me/pico:latest"]["request"]
    assert request["parameters"] == {"repeat_penalty": 1.0, "stop": ["<|im_end|>"], "num_ctx": 512}
    assert (request["system"], request["license"]) == ("Be short.", "MIT")
    assert request["files"] == {model.name: "sha256:" + hashlib.sha256(model.read_bytes()).hexdigest()}
    assert "template" not in request
    assert seen[0].startswith("uploading base-q8_0.gguf")
    assert (seen[1], seen[-1]) == ("parsing GGUF", "success")
    assert (made.version, made.is_raw, made.stop) == ("0.32.15", False, ("<|im_end|>",))
    assert made.answer == ask_model(
        "me/pico:latest", [{"role": "user", "content": FIRST_QUESTION}], ollama.url, max_tokens=16
    )


def test_a_template_that_ollama_renders_differently_is_no_success(ollama, model, capsys, monkeypatch):
    monkeypatch.setattr("bp_export.ollama.compare._CHATS", CONVERSATIONS[1:2])
    render = type(ollama).render
    monkeypatch.setattr(type(ollama), "render", lambda self, made, messages: " " + render(self, made, messages))
    assert main(["ollama", "--host", ollama.url, "register", str(model), "odd"]) == 3
    said = capsys.readouterr().err
    assert "renders chats differently" in said
    assert "conversation 1" in said
    assert "Update Ollama" in said
    assert "odd:latest" in ollama.models


def test_what_llama_cpp_says_to_the_file_ollama_says(ollama, old_ollama, model):
    with LlamaChat(model) as chat:
        expected = chat.answer(QUESTION, max_tokens=6)
    for server in (ollama, old_ollama):
        register_gguf(model, "pico", host=server.url, question=None)
        assert ask_model("pico", QUESTION, server.url, max_tokens=6) == expected
    assert "".join(stream_answer("pico", QUESTION, ollama.url, max_tokens=6)) == expected
    assert len(list(stream_answer("pico", QUESTION, ollama.url, max_tokens=6))) > 1


def test_a_known_blob_is_not_sent_again(ollama, model):
    register_gguf(model, "a", host=ollama.url, question=None)
    made = register_gguf(model, "b", host=ollama.url, template="{{ .System }}", question=None)
    assert ollama.calls == ["HEAD", "blobs", "create", "show", "HEAD", "create", "show"]
    assert not made.is_raw


def test_an_older_server_that_would_pass_prompts_raw_gets_a_go_template(old_ollama, model, monkeypatch):
    monkeypatch.setattr("fake_ollama.find_go_template", lambda jinja: None)  # it knows no template by heart
    made = register_gguf(model, "pico", host=old_ollama.url, question=None)
    assert old_ollama.calls == ["HEAD", "blobs", "create", "show", "create", "show"]
    assert "<|im_start|>{{ .Role }}" in made.template
    assert not made.is_raw
    assert register_gguf(model, "raw", host=old_ollama.url, template="{{ .Prompt }}", question=None).is_raw


def test_the_system_message_that_the_template_adds_goes_along_and_so_does_the_licence(ollama, tmp_path):
    base = write_base(tmp_path / "base")
    (base / "README.md").write_text("---\nlicense: apache-2.0\n---\n# Pico\n")
    template = (base / "chat_template.jinja").read_text()
    first = "{% if messages[0].role != 'system' %}<|im_start|>system\nYou are Smol.<|im_end|>\n{% endif %}"
    (base / "chat_template.jinja").write_text(first + template)
    path = export_adapter(base, quantization="q8_0").path
    register_gguf(path, "a", host=ollama.url, question=None)
    register_gguf(path, "b", host=ollama.url, system="Mine.", license="Mine too.", question=None)
    requests = [ollama.models[f"{name}:latest"]["request"] for name in "ab"]
    assert [r["system"] for r in requests] == ["You are Smol.", "Mine."]
    assert [r["license"] for r in requests] == ["apache-2.0", "Mine too."]


def test_a_name_that_is_taken_is_refused_before_the_upload(ollama, model, tmp_path, capsys):
    register_gguf(model, "Pico", host=ollama.url, question=None)
    calls = len(ollama.calls)
    for name in ("pico", "pico:latest", "library/pico"):
        with pytest.raises(OllamaNameTakenError, match="Pico:latest"):
            register_gguf(model, name, host=ollama.url)
    argv = [str(write_base(tmp_path / "late")), "--ollama-name", "pico", "--ollama-host", ollama.url]
    assert main(argv) == 1
    assert "[INPUT_OLLAMA_NAME_TAKEN]" in capsys.readouterr().err
    assert not list(tmp_path.glob("late-*.gguf"))
    assert len(ollama.calls) == calls
    register_gguf(model, "pico:other", host=ollama.url, question=None)
    register_gguf(model, "Pico", host=ollama.url, force=True, context=64, question=None)
    assert ollama.models["Pico:latest"]["parameters"]["num_ctx"] == 64


def test_a_template_of_another_family_is_replaced_by_the_right_one(old_ollama, tmp_path):
    """Ollama takes the nearest template that it knows: ChatML for a short one of Llama 3."""
    base = write_base(tmp_path / "base")
    (base / "chat_template.jinja").write_text(
        "{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n{{ m.content }}<|im_end|>{% endfor %}"
        "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
    )
    old_ollama.failure = "nearest"
    path = export_adapter(base, quantization="q8_0").path
    made = register_gguf(path, "pico", host=old_ollama.url, question=None)
    assert made.template.startswith("{{- range .Messages }}<|start_header_id|>")


@pytest.mark.parametrize(("longest", "sent"), [(8192, None), (4096, None), (2048, 2048)])
def test_the_context_is_ollama_s_default_whatever_the_length_of_the_rows_was(ollama, tmp_path, longest, sent):
    """A LoRA on rows of 256 tokens does not shorten a base of 8,192; only a file that allows less sets ``num_ctx``."""
    lora = write_lora(tmp_path / "lora", write_base(tmp_path / "base", max_position_embeddings=longest))
    (lora / "run.json").write_text(json.dumps({"run_id": "r", "settings": {"model": {"max_seq_length": 256}}}))
    made = register_gguf(export_adapter(lora, quantization="q8_0").path, "pico", host=ollama.url, question=None)
    assert made.context == sent
    assert ollama.models["pico:latest"]["parameters"].get("num_ctx") == sent
    assert made.describe_context() == ("Ollama's default" if sent is None else f"{sent} tokens")


def test_models_are_registered_listed_asked_and_removed_from_the_command_line(ollama, model, capsys):
    assert require_ollama(ollama.url) == "0.32.15"
    assert main(["ollama", "--host", ollama.url, "register", str(model), "pico", "--context", "256"]) == 0
    assert "ollama run pico" in capsys.readouterr().out
    assert [m.name for m in list_models(ollama.url)] == ["pico:latest"]
    assert main(["ollama", "--host", ollama.url, "list"]) == 0
    assert capsys.readouterr().out.startswith("pico:latest ")
    assert main(["ollama", "--host", ollama.url, "--json", "list"]) == 0
    assert json.loads(capsys.readouterr().out)[0]["name"] == "pico:latest"
    assert main(["ollama", "--host", ollama.url, "rm", "pico"]) == 0
    assert list_models(ollama.url) == []
    capsys.readouterr()
    assert main(["ollama", "--host", ollama.url, "rm", "pico"]) == 2
    assert "not found" in capsys.readouterr().err
    with pytest.raises(OllamaRegistrationError, match="not found"):
        remove_model("pico", ollama.url)
    with pytest.raises(OllamaRegistrationError, match="not found"):
        ask_model("pico", QUESTION, ollama.url)


@pytest.fixture(scope="module")
def shipped(tmp_path_factory):
    """An adapter for Ollama on the model ``pico`` there."""
    folder = tmp_path_factory.mktemp("shipped")
    lora = write_lora(folder / "lora", write_base(folder / "base"))
    return export_adapter(lora, format="ollama-adapter", ollama_base="pico").path


def test_an_adapter_goes_on_a_base_that_the_server_has(old_ollama, model, shipped, capsys):
    register_gguf(model, "pico", host=old_ollama.url, question=None)
    assert main(["ollama", "--host", old_ollama.url, "--json", "register", str(shipped), "tuned"]) == 0
    made = json.loads(capsys.readouterr().out)[0]
    assert made["answer"] != ask_model(
        "pico", [{"role": "user", "content": FIRST_QUESTION}], old_ollama.url, max_tokens=16
    )
    request = old_ollama.models["tuned:latest"]["request"]
    assert (request["from"], list(request["adapters"])) == ("pico", ["adapter.gguf"])
    assert request["parameters"]["stop"] == ["<|im_end|>"]


def test_an_adapters_system_prompt_and_licence_go_along(old_ollama, model, shipped, tmp_path):
    register_gguf(model, "pico", host=old_ollama.url, question=None)
    (tmp_path / "LICENSE").write_text("Be kind.")
    argv = ["ollama", "--host", old_ollama.url, "register", str(shipped), "tuned", "--system", "Aye."]
    assert main([*argv, "--license", str(tmp_path / "LICENSE")]) == 0
    request = old_ollama.models["tuned:latest"]["request"]
    assert (request["system"], request["license"]) == ("Aye.", "Be kind.")


def test_an_adapter_on_another_base_is_refused(old_ollama, shipped, tmp_path):
    other = export_adapter(write_base(tmp_path / "other", layers=3), quantization="q8_0").path
    register_gguf(other, "pico", host=old_ollama.url, question=None)
    with pytest.raises(AdapterMismatchError, match="block_count"):
        register_adapter(shipped, "tuned", host=old_ollama.url)
    with pytest.raises(AdapterFormatError, match="no folder of the format"):
        register_adapter(tmp_path, "tuned", host=old_ollama.url)


def test_from_0_34_1_on_adapters_are_refused_and_the_merged_gguf_named(tmp_path, shipped, model):
    with serve(tmp_path, "0.34.1") as ollama:
        for path, register in ((shipped, register_adapter), (shipped / "adapter.gguf", register_gguf)):
            with pytest.raises(OllamaRegistrationError, match="adapter") as caught:
                register(path, "tuned", host=ollama.url)
            assert 'format="gguf"' in caught.value.fix
        assert ollama.calls == []
        assert register_gguf(model, "merged", host=ollama.url).answer is not None


@pytest.mark.parametrize(("version", "yes"), [("0.24.0", True), ("0.34.0", True), ("0.34.1", False), ("1.0", False)])
def test_which_versions_take_adapters(version, yes):
    assert takes_adapters(version) is yes
    assert not takes_adapters("")


def test_an_absent_server_is_noticed_before_the_export(tmp_path):
    base = write_base(tmp_path / "base")
    assert main([str(base), "--ollama", "--ollama-host", "http://127.0.0.1:9"]) == 2
    assert main([str(base), "--ollama", "--ollama-name", "no good"]) == 2
    assert list(tmp_path.glob("*.gguf")) == []


def test_a_default_name_that_cannot_be_had_is_noticed_before_the_export(ollama, model, tmp_path, capsys):
    base = write_base(tmp_path / "base")
    argv = [str(base), "--quantization", "q8_0", "--ollama", "--ollama-host", ollama.url]
    assert main([*argv, "--output", str(tmp_path / "my model.gguf")]) == 2
    assert "'my model' is no name" in capsys.readouterr().err
    register_gguf(model, "base-q8_0", host=ollama.url, question=None)
    assert main(argv) == 1
    assert "[INPUT_OLLAMA_NAME_TAKEN]" in capsys.readouterr().err
    assert list(tmp_path.glob("*.gguf")) == []
    assert main([*argv, "--name", "Other", "--no-verify"]) == 0
    assert "Other-q8_0:latest" in ollama.models


@pytest.mark.parametrize(
    ("failure", "word"),
    [
        ("digest", "digest mismatch"),
        ("status", "invalid model name"),
        ("stream", "not in GGUF format"),
        ("short", "did not report success"),
        ("runner", "unexpectedly stopped"),
        ("die in blobs", "broke off|does not answer"),
        ("die in create", "broke off|does not answer"),
        ("die in a stream", "broke off|did not report"),
        ("die in chat", "broke off|does not answer"),
    ],
)
def test_refusals_and_deaths_are_one_coded_error(ollama, model, failure, word):
    ollama.failure = failure
    with pytest.raises(OllamaRegistrationError, match=word):
        register_gguf(model, "pico", host=ollama.url)
    assert model.is_file()


def test_an_absent_server_says_how_to_start_it(model):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with pytest.raises(OllamaRegistrationError, match="does not answer") as caught:
        register_gguf(model, "pico", host=f"http://127.0.0.1:{port}")
    assert "ollama serve" in caught.value.fix


@pytest.mark.parametrize("name", ["", "a b", "-x", "a/b/c/d", "x:", "../x"])
def test_bad_names_are_refused_before_anything_is_sent(ollama, model, name):
    with pytest.raises(OllamaRegistrationError, match="no name"):
        register_gguf(model, name, host=ollama.url)
    assert ollama.calls == []


def test_the_command_registers_and_keeps_the_file_when_that_fails(ollama, tmp_path, capsys):
    base = write_base(tmp_path / "base")
    arguments = [
        str(base),
        "--no-verify",
        "--quantization",
        "q8_0",
        "--ollama",
        "--ollama-name",
        "pico",
        "--ollama-host",
        ollama.url,
    ]
    assert main([*arguments, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["ollama"] == "pico"
    ollama.failure = "stream"
    assert main([*arguments, "--force"]) == 2
    assert "[DEP_OLLAMA_REGISTRATION_FAILED]" in capsys.readouterr().err
    assert (tmp_path / "base-q8_0.gguf").is_file()


def test_one_of_several_files_is_not_registered(ollama, tmp_path, capsys):
    base = write_base(tmp_path / "base")
    with pytest.raises(QuantizationUnknownError, match="no bytes"):
        export_adapter(base, split_bytes=0)
    first = export_adapter(base, quantization="bf16", split_bytes=2**14, verify=False).path
    with pytest.raises(OllamaRegistrationError, match="one of several"):
        register_gguf(first, "pico-parts", host=ollama.url)
    with pytest.raises(SystemExit):
        main([str(base), "--split-mib", "1", "--ollama-name", "pico-parts", "--ollama-host", ollama.url])
    assert "--split-mib makes several" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("server", "here"),
    [("http://0.0.0.0:11434", True), ("http://[::1]:1", True), ("http://localhost", True), ("http://10.0.0.1", False)],
)
def test_no_proxy_is_asked_for_this_machine(server, here):
    assert is_local(server) is here


@pytest.mark.parametrize(
    ("given", "address"),
    [
        (None, "http://127.0.0.1:11434"),
        (" ", "http://127.0.0.1:11434"),
        ("http://", "http://127.0.0.1:80"),
        ("0.0.0.0", "http://127.0.0.1:11434"),
        (":11500", "http://127.0.0.1:11500"),
        ("https://ollama.lan/", "https://ollama.lan:443"),
        ("http://box:8080/ollama/", "http://box:8080/ollama"),
        ("[::]:11500", "http://[::1]:11500"),
    ],
)
def test_an_address_may_be_as_short_as_ollama_s_own_variable(given, address):
    assert find_server(given) == address


@pytest.mark.parametrize("given", ["box:many", "box:99999", "ftp://box", "http://[::1"])
def test_what_is_no_address_is_rejected_before_anything_is_sent(given):
    with pytest.raises(InvalidSettingError, match="not an address of Ollama"):
        require_ollama(given)


@pytest.mark.parametrize("host", ["box:many", "box:99999"])
def test_a_variable_of_ollama_that_is_no_address_is_told_as_one(host):
    """Its client reads the variable when it is imported, so that only a new process shows it."""
    command = [
        sys.executable,
        "-c",
        "import sys; from bp_export.cli.app import main; sys.exit(main(['ollama', 'list']))",
    ]
    done = subprocess.run(command, env={**os.environ, "OLLAMA_HOST": host}, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith("[CONFIG_INVALID_SETTING]: OLLAMA_HOST cannot be read as an address")
