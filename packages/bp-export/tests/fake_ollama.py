"""A strict stand-in for Ollama's server, of either protocol generation; what it answers is checked against records of
real servers (``ollama_fixtures``), and what it is asked in a chat llama.cpp answers, from the very bytes that came.

Old (to 0.29): only Go templates; one that it does not know by heart means that prompts pass raw. New (from 0.30): the
GGUF's own Jinja template counts where no Go template is given. Newest (from 0.34.1): no adapters, no quantizing.
"""

import contextlib
import datetime as dt
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from bp_export.chat.server import LlamaServer
from bp_export.gguf.file import read_settings
from bp_export.ollama.go_templates import find_go_template
from bp_export.verify.probe import tokenize

FIELDS = {
    "model",
    "from",
    "files",
    "adapters",
    "template",
    "system",
    "license",
    "parameters",
    "messages",
    "quantize",
    "stream",
}
NAME = re.compile(r"([\w-][\w.:-]*/)?([\w-]+/)?[A-Za-z0-9_][\w.-]{0,79}(:[A-Za-z0-9_][\w.-]{0,79})?")
DIGEST = re.compile(r"sha256[:-][0-9a-f]{64}")
MADE = {"F32", "F16", "Q4_K_S", "Q4_K_M", "Q8_0"}
CHATML = "{{- range .Messages }}<|im_start|>{{ .Role }}\n{{ .Content }}<|im_end|>\n{{ end }}<|im_start|>assistant\n"
RAW = "{{ .Prompt }}"
NDJSON, JSON = "application/x-ndjson", "application/json; charset=utf-8"


class Refusal(Exception):
    def __init__(self, words, status=400):
        super().__init__(words)
        self.status = status


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def do_GET(self):
        if self.path == "/":
            return self.reply(200, b"Ollama is running", "text/plain; charset=utf-8")
        if self.path == "/api/version":
            return self.reply_json(200, {"version": self.server.version})
        assert self.path == "/api/tags", self.path
        return self.reply_json(200, {"models": [self.server.describe(name) for name in self.server.models]})

    def do_HEAD(self):
        self.server.calls.append("HEAD")
        digest = self.path.removeprefix("/api/blobs/")
        status = 400 if not DIGEST.fullmatch(digest) else 200 if digest in self.server.blobs else 404
        self.reply(status, b"", None if status == 200 else JSON)

    def do_POST(self):
        call = self.path.split("/")[2]
        self.server.calls.append(call)
        if self.server.failure == f"die in {call}":
            self.rfile.read(10)
            self.connection.close()
            self.close_connection = True
            return None
        body = (
            self.rfile.read(int(self.headers["Content-Length"]))
            if self.headers["Content-Length"]
            else self.read_chunks()
        )
        try:
            if call == "blobs":
                return self.take_blob(body)
            return getattr(self, {"create", "show", "chat", "generate"}.intersection([call]).pop())(
                json.loads(body or "null")
            )
        except Refusal as error:
            self.reply_json(error.status, {"error": str(error)})

    def do_DELETE(self):
        name = self.server.full_name(json.loads(self.rfile.read(int(self.headers["Content-Length"])))["model"])
        if self.server.models.pop(name, None) is None:
            return self.reply_json(404, {"error": f"model '{self.server.short_name(name)}' not found"})
        return self.reply(200, b"", None)

    def read_chunks(self):
        parts = []
        while self.headers.get("Transfer-Encoding") == "chunked" and (size := int(self.rfile.readline(), 16)):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        return b"".join(parts)

    def reply(self, status, body, kind):
        self.send_response(status)
        if kind:
            self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def reply_json(self, status, data):
        self.reply(status, json.dumps(data).encode(), JSON)

    def stream(self, lines, *, status=200):
        """Lines as they come, in chunks; a connection that is to be cut is cut after the first."""
        self.send_response(status)
        self.send_header("Content-Type", NDJSON)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        for line in lines:
            raw = json.dumps(line).encode() + b"\n"
            self.wfile.write(b"%x\r\n%s\r\n" % (len(raw), raw))
            if self.server.failure == "die in a stream":
                self.close_connection = True
                return
        self.wfile.write(b"0\r\n\r\n")

    def take_blob(self, body):
        digest = self.path.removeprefix("/api/blobs/")
        got = "sha256:" + hashlib.sha256(body).hexdigest()
        if digest in self.server.blobs:
            return self.reply(200, b"", None)
        self.server.keep(got, body)  # also under another digest than was said, as the real one does
        if got != digest or self.server.failure == "digest":
            raise Refusal(f'digest mismatch, expected "{digest}", got "{got}"')
        return self.reply(201, b"", None)

    def create(self, asked):
        if asked is None:
            raise Refusal("missing request body")
        assert set(asked) <= FIELDS, set(asked) - FIELDS
        if not NAME.fullmatch(asked["model"]) or self.server.failure == "status":
            raise Refusal("invalid model name")
        if not asked.get("from") and not asked.get("files"):
            return self.reply(400, b"{\"error\": \"neither 'from' or 'files' was specified\"}", "application/json")
        for key in (*asked.get("files", {}), *asked.get("adapters", {})):
            if key.startswith("/") or ".." in key:
                raise Refusal("file path must be relative" + (f": {key}" if self.server.is_newest else ""))
        if asked.get("adapters") and self.server.is_newest:
            raise Refusal("LoRA adapters are no longer supported")
        if asked.get("quantize") and self.server.is_newest:
            raise Refusal(
                "create-time quantization is only supported for safetensors imports; "
                "quantize GGUF models with llama.cpp tools before importing"
            )
        lines, error = self.server.create(asked)
        if asked.get("stream", True):
            return self.stream(
                [{"status": line} if isinstance(line, str) else line for line in lines]
                + ([{"error": error}] if error else [])
            )
        body = {"error": error} if error else {"status": lines[-1]}
        bad = 500 if self.server.is_newest else 400
        return self.reply(bad if error else 200, json.dumps(body).encode(), "application/json")

    def show(self, asked):
        model = self.find(asked)
        kept = {key: model[key] for key in ("license", "system") if model.get(key)}
        settings = self.server.settings(model)
        info = {key: value for key, value in settings.items() if not isinstance(value, list)}
        shown = {
            **kept,
            "modelfile": "# Modelfile",
            "template": model["template"],
            "details": {"parent_model": self.server.parent(model), **self.server.details(model)},
            "model_info": info,
            **({} if self.server.is_newest else {"tensors": []}),
            "capabilities": ["completion"],
            "modified_at": now(),
        }
        if model["parameters"]:
            lines = [(k, each) for k, v in model["parameters"].items() for each in (v if isinstance(v, list) else [v])]
            shown["parameters"] = "\n".join(
                f"{k:<30} {json.dumps(v) if isinstance(v, str) else f'{v:g}'}" for k, v in lines
            )
        self.reply_json(200, shown)

    def find(self, asked):
        name = (asked or {}).get("model", "")
        if not name:
            raise Refusal("model is required")
        if self.server.full_name(name) not in self.server.models:
            told = name if self.server.is_old or self.path != "/api/show" else self.server.full_name(name)
            raise Refusal(f"model '{told}' not found", 404)
        return self.server.models[self.server.full_name(name)]

    def chat(self, asked):
        logprobs = {"logprobs", "top_logprobs"}
        known = {"model", "messages", "tools", "stream", "options", "format", "keep_alive", "think"}
        assert set(asked) <= known | logprobs
        model = self.find(asked)
        if self.server.failure == "runner":
            raise Refusal("model runner has unexpectedly stopped", 500)
        if asked.get("logprobs"):
            prompt = self.server.render(model, asked["messages"])
            return self.reply_json(200, self.server.list_next(model, prompt))
        text, reason = self.server.answer(model, asked["messages"], asked.get("options") or {})
        head = {"model": asked["model"], "created_at": now()}
        end = {
            "done": True,
            "done_reason": reason,
            **dict.fromkeys(
                (
                    "total_duration",
                    "load_duration",
                    "prompt_eval_count",
                    "prompt_eval_duration",
                    "eval_count",
                    "eval_duration",
                ),
                1,
            ),
        }
        if self.server.is_newest:
            end["prompt_eval_cached_count"] = 1
        if asked.get("stream", True):
            pieces = re.findall(r"\s*\S+|\s+", text) or [""]
            lines = [{**head, "message": {"role": "assistant", "content": p}, "done": False} for p in pieces]
            return self.stream([*lines, {**head, "message": {"role": "assistant", "content": ""}, **end}])
        return self.reply_json(200, {**head, "message": {"role": "assistant", "content": text}, **end})

    def generate(self, asked):
        """Only as the exporter asks: one token after a raw prompt, and the likeliest in its place."""
        names = {"model", "prompt", "raw", "stream", "options", "logprobs", "top_logprobs"}
        assert (set(asked), asked["raw"], asked["stream"]) == (names, True, False)
        model = self.find(asked)
        return self.reply_json(200, self.server.list_next(model, asked["prompt"]))


def now():
    return dt.datetime.now(dt.UTC).isoformat()


def add_system(model, messages):
    """The model's system message, if the conversation has none (``ChatHandler`` in server/routes.go)."""
    is_missing = model.get("system") and messages[0]["role"] != "system"
    return [*([{"role": "system", "content": model["system"]}] if is_missing else []), *messages]


class FakeOllama(ThreadingHTTPServer):
    """The server at ``url``; ``calls`` names what it was asked, ``failure`` makes it fail."""

    daemon_threads = True

    def __init__(self, folder: Path, version: str = "0.32.15") -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.folder, self.version = folder, version
        numbers = tuple(map(int, version.split(".")))
        self.is_old, self.is_newest = numbers < (0, 30), numbers >= (0, 34, 1)
        self.blobs, self.models, self.calls, self.failure = {}, {}, [], None
        self.loaded = {}
        self.url = f"http://127.0.0.1:{self.server_port}"

    def keep(self, digest, body):
        self.blobs[digest] = self.folder / digest.replace(":", "-")
        self.blobs[digest].write_bytes(body)

    @staticmethod
    def full_name(name):
        return name if ":" in name else f"{name}:latest"

    @staticmethod
    def short_name(name):
        return name.removesuffix(":latest")

    def settings(self, model):
        return read_settings(self.blobs[model["digest"]])

    def details(self, model):
        settings = self.settings(model)
        family = settings["general.architecture"]
        kinds = {0: "F32", 1: "F16", 7: "Q8_0"}
        return {
            "format": "gguf",
            "family": family,
            "families": [family],
            "parameter_size": "865K",
            "quantization_level": kinds.get(settings["general.file_type"], "unknown"),
        }

    def parent(self, model):
        if self.is_newest:
            return next(iter(model["request"].get("files", {})), "")
        return f"/blobs/{model['digest']}" if self.is_old else ""

    def describe(self, name):
        model = self.models[name]
        settings, new = self.settings(model), {}
        if not self.is_old:
            family = settings["general.architecture"]
            new = {key: settings[f"{family}.{key}"] for key in ("context_length", "embedding_length")}
        row = {
            "name": name,
            "model": name,
            "modified_at": now(),
            "size": 1,
            "digest": model["digest"].partition(":")[2],
        }
        parent = self.parent(model) if self.is_newest else ""
        row |= {"details": {"parent_model": parent, **self.details(model), **new}}
        return row if self.is_old else {**row, "capabilities": ["completion"]}

    def create(self, asked):
        """Status lines, and the error that ends them or None."""
        lines = ["parsing GGUF"] if asked.get("files") or asked.get("adapters") else []
        if self.failure == "stream":
            return lines, "supplied file was not in GGUF format"
        if self.failure == "short":
            return lines, None
        source = dict(self.models.get(self.full_name(asked.get("from") or ""), {}))
        if asked.get("from") and not source:
            return lines, f"model '{asked['from']}' not found"
        digest = next(iter(asked.get("files", {"": source.get("digest")}).values()))  # a vision tower comes second
        for wanted in (digest, *asked.get("adapters", {}).values()):
            if wanted not in self.blobs:
                return lines, f"open /blobs/{wanted}: no such file or directory"
            magic = self.blobs[wanted].read_bytes()[:4]
            if magic != b"GGUF":
                newest = f"unsupported file type [{' '.join(map(str, magic))}]"
                return lines, newest if self.is_newest else "supplied file was not in GGUF format"
        quantize = asked.get("quantize", "").upper()
        if quantize and quantize not in MADE:
            return (
                lines,
                f"unsupported quantization type {quantize} - supported types are F32, F16, Q4_K_S, Q4_K_M, Q8_0",
            )
        return self.make(asked, source, digest, quantize, lines)

    def make(self, asked, source, digest, quantize, lines):
        template = asked.get("template", "")
        if not self.is_old and not self.is_newest and asked.get("files"):
            lines.append("verifying conversion")
        if template.count("{{") != template.count("}}"):
            return lines, "template error: template: :1: unclosed action"
        if quantize and self.is_old:
            lines += [
                {"status": f"quantizing F16 model to {quantize}", "digest": "", "total": 1, "completed": 1},
                "verifying conversion",
            ]
        lines.append(f"creating new layer sha256:{'1' * 64}" if quantize else f"using existing layer {digest}")
        jinja = read_settings(self.blobs[digest]).get("tokenizer.chat_template", "")
        known = CHATML if self.failure == "nearest" else find_go_template(jinja)
        if asked.get("files") and known and not template:
            lines += ["using autodetected template chatml"]
        kept = {key: asked[key] for key in ("system", "license") if asked.get(key)}
        if asked.get("adapters"):
            lines += [f"using existing layer sha256:{'2' * 64}"] if source.get("template") else []
            lines += [f"using existing layer {d}" for d in asked["adapters"].values()]
        parameters = {**source.get("parameters", {}), **asked.get("parameters", {})}
        if kept or parameters or template or (known and asked.get("files")):
            lines.append(f"creating new layer sha256:{'3' * 64}")
        chosen = template or source.get("template") or known or (RAW if self.is_old else jinja)
        self.models[self.full_name(asked["model"])] = {
            **source,
            **kept,
            "request": asked,
            "digest": digest,
            "template": chosen,
            "parameters": parameters,
            "adapter": next(iter(asked.get("adapters", {}).values()), source.get("adapter")),
        }
        return [*lines, "writing manifest", "success"], None

    def answer(self, model, messages, options):
        """What llama.cpp says on the uploaded bytes, and whether it stopped or was cut."""
        messages = add_system(model, messages)
        settings = {"temperature": 0.8, **model["parameters"], **options}
        adapter = self.blobs[model["adapter"]] if model.get("adapter") else None
        body = {
            "max_tokens": settings.get("num_predict", 64),
            "temperature": settings["temperature"],
            "seed": settings.get("seed", 0),
            "stop": settings.get("stop", []),
        }
        served = self.load(self.blobs[model["digest"]], adapter)
        if model["template"] == RAW and self.is_old:
            reply = served.post("/v1/completions", {**body, "prompt": messages[-1]["content"]})["choices"][0]
            return reply["text"], reply["finish_reason"]
        reply = served.post("/v1/chat/completions", {**body, "messages": messages})["choices"][0]
        return reply["message"]["content"] or "", reply["finish_reason"]

    def render(self, model, messages):
        messages = add_system(model, messages)
        if model["template"] == RAW and self.is_old:
            return messages[-1]["content"]
        served = self.load(self.blobs[model["digest"]], None)
        return served.post("/apply-template", {"messages": messages})["prompt"]

    def list_next(self, model, prompt):
        """The likeliest next tokens; none if the failure is that of a server before 0.12.11."""
        if self.failure == "no list":
            return {"done": True, "prompt_eval_count": 1}
        body = {"prompt": prompt, "n_predict": 1, "n_probs": 20, "temperature": 0, "cache_prompt": True}
        served = self.load(self.blobs[model["digest"]], None)
        reply = served.post("/completion", {**body, "logit_bias": [[served.letter, 1e6]]})
        top = reply["completion_probabilities"][0]["top_logprobs"]
        listed = [{key: one[key] for key in ("token", "bytes", "logprob")} for one in top]
        counts = {"prompt_eval_count": reply["tokens_evaluated"], "eval_count": 1}
        return {"done": True, **counts, "logprobs": [{**listed[0], "top_logprobs": listed}]}

    def load(self, path, adapter):
        """Loading takes seconds, so what is loaded stays, as with the real one."""
        if (path, adapter) not in self.loaded:
            self.loaded[path, adapter] = served = LlamaServer(path, 512, adapter=adapter)
            served.letter = tokenize(served, "a")[-1]
        return self.loaded[path, adapter]


@contextlib.contextmanager
def serve(folder: Path, version: str = "0.32.15"):
    server = FakeOllama(folder, version)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        for loaded in server.loaded.values():
            loaded.close()
