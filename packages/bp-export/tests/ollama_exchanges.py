"""One row of requests that an Ollama is asked, and its answers with all that changes from day to day taken out.

`python ollama_exchanges.py ADDRESS` records a real server's answers as ``ollama_fixtures/v<version>.json``; the tests
put the same requests to the fake and compare.
"""

import hashlib
import json
import re
import sys
import time
from pathlib import Path

import httpx

sys.path.insert(0, str(Path(__file__).parent))

FIXTURES = Path(__file__).parent / "ollama_fixtures"
NAME = "bp-recorded:test"
CHAT = [{"role": "user", "content": "the cat"}]
OPTIONS = {"temperature": 0, "seed": 0, "num_predict": 4}
TIMES = re.compile(r"(_at|_duration|^size|_count)$")
ALWAYS_NEW = {"digest", "modelfile", "content", "context", "total", "completed", "tensors", "thinking"}


def build_files(folder):
    """What is uploaded, with digests that no server has seen: models, an adapter, and a file that is none."""
    from export_pico import export_adapter, write_base, write_lora

    base = write_base(folder / "base", hidden=256, inner=256)
    odd = write_base(folder / "odd", hidden=256, inner=256)
    (odd / "chat_template.jinja").write_text("{% for m in messages %}[{{ m.role }}] {{ m.content }} [/]{% endfor %}")
    lora = write_lora(folder / "lora", base)
    name = f"recorded {time.time_ns()}"
    (folder / "text.gguf").write_text(f"this is no GGUF, {name}")
    return {
        "model": export_adapter(base, quantization="q8_0", name=name, output=folder / "model.gguf").path,
        "odd": export_adapter(odd, quantization="q8_0", name=name, output=folder / "odd.gguf").path,
        "full": export_adapter(base, quantization="f16", name=name, output=folder / "full.gguf").path,
        "adapter": export_adapter(lora, format="gguf-adapter", name=name, output=folder / "lora.gguf").path,
        "text": folder / "text.gguf",
    }


class Recorder:
    def __init__(self, client, files):
        self.client = client
        self.bytes = {name: path.read_bytes() for name, path in files.items()}
        self.digests = {name: "sha256:" + hashlib.sha256(raw).hexdigest() for name, raw in self.bytes.items()}
        self.exchanges = []

    def ask(self, what, method, path, body=None, content=None, made=False):
        """``made``: the server makes a file, which may be one of ours to the byte; that is not compared."""
        reply = self.client.request(method, path, json=body, content=content)
        told = None if body is None else json.loads(self._hide(json.dumps(body)))
        answer = {"status": reply.status_code, "type": reply.headers.get("content-type"), "body": self._read(reply)}
        if made and isinstance(answer["body"], list):
            layers = ("using existing layer <digest of model>", "layer <digest>")
            answer["body"] = [
                {**line, "status": line["status"].replace(*layers)} if "status" in line else line
                for line in answer["body"]
            ]
        if content is not None:
            told = f"<bytes of {next(n for n, raw in self.bytes.items() if raw == content)}>"
        where = "/api/blobs/" + self._hide(path.removeprefix("/api/blobs/")) if "/blobs/" in path else path
        asked = {"method": method, "path": where, "body": told}
        self.exchanges.append({"what": what, "request": asked, "answer": answer})
        return reply

    def _hide(self, text):
        for name, digest in self.digests.items():
            text = text.replace(digest, f"<digest of {name}>").replace(digest.replace(":", "-"), f"<digest of {name}>")
        text = re.sub(r"sha256[:-][0-9a-f]{64}", "<digest>", text)
        return re.sub(r"(creating new|using existing) layer <digest>", "layer <digest>", text)

    def _read(self, reply):
        text = self._hide(reply.text)
        try:
            lines = [normalise(json.loads(line)) for line in text.splitlines() if line.strip()]
        except ValueError:
            return text
        if "ndjson" in reply.headers.get("content-type", ""):
            return join_repeats(lines)
        return lines[0] if lines else None


def normalise(value, key=""):
    """What changes from day to day, or with a model's details, as its type."""
    if isinstance(value, dict) and key == "model_info":
        return {k: value[k] for k in sorted(value) if k in ("general.architecture", "llama.block_count")}
    if isinstance(value, dict):
        return {k: normalise(v, k) for k, v in value.items()}
    if isinstance(value, list) and key not in ALWAYS_NEW:
        return [normalise(v, key) for v in value]
    if TIMES.search(key) or key in ALWAYS_NEW:
        return f"<{type(value).__name__}>"
    if isinstance(value, str):
        value = re.sub(r"\S*/blobs/(?=<digest)", "", value)  # the server's own folder
    if key == "parameters" and isinstance(value, str):
        return sorted(value.splitlines())  # in the order of a Go map, which is none
    return value


def join_repeats(lines):
    """Lines that only repeat the one before, as progress and streamed words do, count once."""
    return [line for i, line in enumerate(lines) if i == 0 or line != lines[i - 1]]


def record(address, files):
    """All exchanges with a server that holds none of the files; it is left as it was, but for blobs."""
    with httpx.Client(base_url=address, timeout=300, trust_env=False) as client:
        return ask_all(Recorder(client, files))


def ask_all(r):
    zeros = "sha256:" + "0" * 64
    r.ask("alive", "GET", "/")
    r.ask("a blob that it has not", "HEAD", f"/api/blobs/{zeros}")
    r.ask("a digest that is none", "HEAD", "/api/blobs/sha256:12")
    r.ask("bytes of another digest", "POST", f"/api/blobs/{zeros}", content=r.bytes["text"])
    for name, raw in r.bytes.items():
        r.ask(f"upload of {name}", "POST", f"/api/blobs/{r.digests[name]}", content=raw)
    r.ask("upload of what it has", "POST", f"/api/blobs/{r.digests['model']}", content=r.bytes["model"])
    r.ask("a blob that it has", "HEAD", f"/api/blobs/{r.digests['model']}")

    files = {"model.gguf": r.digests["model"]}
    r.ask("create of nothing", "POST", "/api/create")
    r.ask("create without a source", "POST", "/api/create", {"model": NAME})
    r.ask("create without a name", "POST", "/api/create", {"model": "", "files": files})
    r.ask("create under a bad name", "POST", "/api/create", {"model": "a b", "files": files})
    r.ask(
        "create from an absolute path", "POST", "/api/create", {"model": NAME, "files": {"/m.gguf": r.digests["model"]}}
    )
    r.ask("create from a blob that it has not", "POST", "/api/create", {"model": NAME, "files": {"m.gguf": zeros}})
    text = {"model": NAME, "files": {"m.gguf": r.digests["text"]}}
    r.ask("create from what is no GGUF", "POST", "/api/create", text)
    r.ask("the same without a stream", "POST", "/api/create", {**text, "stream": False})
    r.ask("create with a broken template", "POST", "/api/create", {"model": NAME, "files": files, "template": "{{ .X"})
    r.ask(
        "create with a type that it cannot make",
        "POST",
        "/api/create",
        {"model": NAME, "files": {"m.gguf": r.digests["full"]}, "quantize": "q5_k_m"},
    )
    r.ask(
        "create with quantizing",
        "POST",
        "/api/create",
        {"model": NAME, "files": {"m.gguf": r.digests["full"]}, "quantize": "q8_0"},
        made=True,
    )
    parameters = {"stop": ["<|im_end|>"], "num_ctx": 256, "repeat_penalty": 1.0}
    whole = {"model": NAME, "files": files, "system": "Be short.", "license": "MIT", "parameters": parameters}
    r.ask("create", "POST", "/api/create", whole)
    r.ask("create again", "POST", "/api/create", {**whole, "stream": False})
    r.ask("tags", "GET", "/api/tags")
    r.ask("show", "POST", "/api/show", {"model": NAME})
    r.ask("show of none", "POST", "/api/show", {"model": "bp-none"})
    r.ask("show without a name", "POST", "/api/show", {})
    chat = {"model": NAME, "messages": CHAT, "options": OPTIONS}
    r.ask("chat", "POST", "/api/chat", chat)
    r.ask("chat without a stream", "POST", "/api/chat", {**chat, "stream": False})
    r.ask("chat with none", "POST", "/api/chat", {**chat, "model": "bp-none"})
    r.ask("create with a template", "POST", "/api/create", {**whole, "template": "{{ .System }} {{ .Prompt }}"})
    r.ask("show of that", "POST", "/api/show", {"model": NAME})
    r.ask(
        "create with a template that nobody knows",
        "POST",
        "/api/create",
        {"model": "bp-odd", "files": {"m.gguf": r.digests["odd"]}},
    )
    r.ask("show of that one", "POST", "/api/show", {"model": "bp-odd"})
    r.ask(
        "create with an adapter",
        "POST",
        "/api/create",
        {"model": "bp-lora", "from": NAME, "adapters": {"adapter.gguf": r.digests["adapter"]}},
    )
    r.ask("chat with an adapter", "POST", "/api/chat", {**chat, "model": "bp-lora", "stream": False})
    for name in (NAME, "bp-odd", "bp-lora", "bp-none"):
        r.ask(f"delete of {name}", "DELETE", "/api/delete", {"model": name})
    return r.exchanges


def main():
    import tempfile

    address = sys.argv[1]
    version = httpx.get(f"{address}/api/version", trust_env=False).json()["version"]
    with tempfile.TemporaryDirectory() as folder:
        exchanges = record(address, build_files(Path(folder)))
    FIXTURES.mkdir(exist_ok=True)
    out = FIXTURES / f"v{version}.json"
    out.write_text(json.dumps({"version": version, "exchanges": exchanges}, indent=1, ensure_ascii=False) + "\n")
    print(out)


if __name__ == "__main__":
    main()
