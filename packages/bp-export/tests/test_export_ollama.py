"""Registration against a strict stand-in for Ollama's server: it checks digests, order and fields, and can fail."""

import hashlib
import json
import re
import socket
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from export_pico import export_adapter, write_base

from bp_export import ask_model, list_models, register_gguf, remove_model, require_ollama, takes_adapters
from bp_export.cli import main
from bp_export.errors import OllamaRegistrationError

FIELDS = {"model", "files", "template", "system", "parameters", "license", "messages", "stream"}


class FakeOllama(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def reply(self, status, data=None, lines=None):
        body = b"" if data is None else json.dumps(data).encode()
        if lines is not None:
            body = b"".join(json.dumps(line).encode() + b"\n" for line in lines)
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_HEAD(self):
        self.server.calls.append("HEAD")
        digest = self.path.removeprefix("/api/blobs/")
        known = re.fullmatch(r"sha256:[0-9a-f]{64}", digest)
        self.reply(400 if not known else 200 if digest in self.server.blobs else 404)

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.calls.append(self.path.split("/")[2])
        getattr(self, self.path.split("/")[2])(body)

    def blobs(self, body):
        digest = self.path.removeprefix("/api/blobs/")
        got = "sha256:" + hashlib.sha256(body).hexdigest()
        if got != digest or self.server.failure == "digest":
            self.reply(400, {"error": f'digest mismatch, expected "{digest}", got "{got}"'})
            return
        self.server.blobs.add(digest)
        self.reply(201)

    def create(self, body):
        request = json.loads(body)
        assert set(request) <= FIELDS
        assert all(not name.startswith("/") and ".." not in name for name in request["files"])
        if self.server.failure == "status":
            self.reply(400, {"error": "invalid model name"})
            return
        lines = [{"status": "parsing GGUF"}]
        if not set(request["files"].values()) <= self.server.blobs:
            lines.append({"error": "blob not found"})
        elif self.server.failure == "stream":
            lines.append({"error": "supplied file was not in GGUF format"})
        elif self.server.failure != "short":
            lines += [{"status": "writing manifest"}, {"status": "success"}]
            self.server.models[request["model"]] = request
        self.reply(200, lines=lines)

    def show(self, body):
        request = self.server.models[json.loads(body)["model"]]
        own = "{{ .Prompt }}" if self.server.is_old else ""
        self.reply(200, {"template": request.get("template", own), "parameters": ""})

    def chat(self, body):
        request = json.loads(body)
        if request["model"] not in self.server.models:
            self.reply(404, {"error": f"model '{request['model']}' not found"})
            return
        self.reply(200, {"message": {"role": "assistant", "content": "hi"}, "done": True, "done_reason": "stop"})

    def do_GET(self):
        if self.path == "/api/version":
            self.reply(200, {"version": "0.32.15"})
        else:
            names = [{"name": name, "size": 1, "digest": "x"} for name in self.server.models]
            self.reply(200, {"models": names})

    def do_DELETE(self):
        name = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["model"]
        known = self.server.models.pop(name, None)
        self.reply(200 if known else 404, None if known else {"error": f"model '{name}' not found"})


@pytest.fixture
def ollama():
    server = ThreadingHTTPServer(("127.0.0.1", 0), FakeOllama)
    server.blobs, server.models, server.calls, server.failure, server.is_old = set(), {}, [], None, False
    threading.Thread(target=server.serve_forever, daemon=True).start()
    server.url = f"http://127.0.0.1:{server.server_port}"
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ollama")
    return export_adapter(write_base(folder / "base"), quantization="q8_0").path


def test_a_model_is_uploaded_created_and_looked_at(ollama, model):
    seen = []
    made = register_gguf(
        model,
        "me/pico:latest",
        host=ollama.url,
        system="Be short.",
        context=512,
        license="MIT",
        status=seen.append,
    )
    assert ollama.calls == ["HEAD", "blobs", "create", "show"]
    request = ollama.models["me/pico:latest"]
    assert request["parameters"] == {"repeat_penalty": 1.0, "stop": ["<|im_end|>"], "num_ctx": 512}
    assert request["system"] == "Be short."
    assert request["license"] == "MIT"
    assert request["files"] == {model.name: "sha256:" + hashlib.sha256(model.read_bytes()).hexdigest()}
    assert seen == ["parsing GGUF", "writing manifest", "success"]
    assert not made.is_raw
    assert "template" not in request
    assert made.stop == ("<|im_end|>",)


def test_a_known_blob_is_not_sent_again(ollama, model):
    register_gguf(model, "a", host=ollama.url)
    made = register_gguf(model, "b", host=ollama.url, template="{{ .System }}")
    assert ollama.calls == ["HEAD", "blobs", "create", "show", "HEAD", "create", "show"]
    assert not made.is_raw


def test_an_older_server_that_would_pass_prompts_raw_gets_a_go_template(ollama, model):
    ollama.is_old = True
    made = register_gguf(model, "pico", host=ollama.url)
    assert ollama.calls == ["HEAD", "blobs", "create", "show", "create", "show"]
    assert "<|im_start|>{{ .Role }}" in made.template
    assert not made.is_raw
    assert register_gguf(model, "raw", host=ollama.url, template="{{ .Prompt }}").is_raw


def test_the_system_message_that_the_template_adds_goes_along(ollama, tmp_path):
    base = write_base(tmp_path / "base")
    template = (base / "chat_template.jinja").read_text()
    first = "{% if messages[0].role != 'system' %}<|im_start|>system\nYou are Smol.<|im_end|>\n{% endif %}"
    (base / "chat_template.jinja").write_text(first + template)
    path = export_adapter(base, quantization="q8_0").path
    register_gguf(path, "a", host=ollama.url)
    register_gguf(path, "b", host=ollama.url, system="Mine.")
    assert [ollama.models[name]["system"] for name in "ab"] == ["You are Smol.", "Mine."]


def test_models_are_listed_asked_and_removed(ollama, model, capsys):
    assert require_ollama(ollama.url) == "0.32.15"
    assert main(["ollama", "--host", ollama.url, "register", str(model), "pico", "--context", "256"]) == 0
    assert [m.name for m in list_models(ollama.url)] == ["pico"]
    assert ask_model("pico", [{"role": "user", "content": "hello"}], ollama.url) == "hi"
    assert main(["ollama", "--host", ollama.url, "--json", "list"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])[0]["name"] == "pico"
    remove_model("pico", ollama.url)
    assert list_models(ollama.url) == []
    assert main(["ollama", "--host", ollama.url, "rm", "pico"]) == 2
    assert "not found" in capsys.readouterr().err
    with pytest.raises(OllamaRegistrationError, match="not found"):
        ask_model("pico", [], ollama.url)


@pytest.mark.parametrize(("version", "yes"), [("0.24.0", True), ("0.34.0", True), ("0.34.1", False), ("1.0", False)])
def test_which_versions_take_adapters(version, yes):
    assert takes_adapters(version) is yes
    assert not takes_adapters("")


def test_an_absent_server_is_noticed_before_the_export(tmp_path):
    base = write_base(tmp_path / "base")
    assert main([str(base), "--ollama", "--ollama-host", "http://127.0.0.1:9"]) == 2
    assert main([str(base), "--ollama", "--ollama-name", "no good"]) == 2
    assert list(tmp_path.glob("*.gguf")) == []


@pytest.mark.parametrize(
    ("failure", "word"),
    [
        ("digest", "digest mismatch"),
        ("status", "invalid model name"),
        ("stream", "not in GGUF format"),
        ("short", "did not report success"),
    ],
)
def test_refusals_are_one_coded_error(ollama, model, failure, word):
    ollama.failure = failure
    with pytest.raises(OllamaRegistrationError, match=word):
        register_gguf(model, "pico", host=ollama.url)


def test_an_absent_server_says_how_to_start_it(model):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with pytest.raises(OllamaRegistrationError, match="does not answer") as caught:
        register_gguf(model, "pico", host=f"http://127.0.0.1:{port}")
    assert "ollama serve" in caught.value.way_out


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
    assert main(arguments) == 2
    assert "[DEP_OLLAMA_REGISTRATION_FAILED]" in capsys.readouterr().err
    assert (tmp_path / "base-q8_0.gguf").is_file()
