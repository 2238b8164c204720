"""Register a GGUF with Ollama over its HTTP API: upload the blob, create the model, look at what it became.

The protocol is Ollama's docs/api.md. Two of its traits shape this client: an error may come as a line of a stream whose
status is 200, so every line is read and only ``success`` means done; and the stop words are sent always, since older
servers know none for a template that they do not recognise.
"""

from __future__ import annotations

import json
import os
import re
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from types import MappingProxyType
from typing import Any

from bp_export.errors import OllamaRegistrationError
from bp_export.gguf import read_settings, read_stop_strings
from bp_export.gotemplates import find_go_template
from bp_export.template import find_default_system
from bp_runs.files import sha256_file

DEFAULT_HOST = "http://127.0.0.1:11434"
_BLOCK_BYTES = 2**20
_SECONDS, _LOOK_SECONDS = 600.0, 10.0
_JSON: Mapping[str, str] = MappingProxyType({"Content-Type": "application/json"})
_RAW = "{{ .Prompt }}"
_ENDED_ADAPTERS = (0, 34, 1)
_PART = r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,79}"
_NAME = re.compile(rf"({_PART}(:\d+)?/)?({_PART}/)?{_PART}(:{_PART})?")


@dataclass(frozen=True, slots=True)
class OllamaModel:
    """A registered model."""

    name: str
    host: str
    template: str
    """What Ollama says it will use; empty where it leaves the template to the GGUF."""
    stop: tuple[str, ...]
    """The stop words that were sent."""
    is_raw: bool
    """Whether Ollama would pass prompts on without any template (old versions, unknown templates)."""


@dataclass(frozen=True, slots=True)
class ListedModel:
    """A model that a server has."""

    name: str
    bytes: int
    digest: str


def require_ollama(host: str | None = None, *, name: str | None = None) -> str:
    """The version of the server, for a look before hours of work.

    Args:
        host: The server; by default ``http://127.0.0.1:11434``.
        name: A name that a model is going to have there.

    Raises:
        OllamaRegistrationError: It does not answer, or is no Ollama, or refuses such names.
    """
    if name is not None:
        _require_name(name)
    return str(_read_json(_get(host, "/api/version")).get("version", ""))


def takes_adapters(version: str) -> bool:
    """Whether a version takes LoRA adapters, and quantizes while it creates: both ended with 0.34.1."""
    numbers = [int(part) for part in re.findall(r"\d+", version)[:3]]
    return bool(numbers) and tuple(numbers) < _ENDED_ADAPTERS


def list_models(host: str | None = None) -> list[ListedModel]:
    """The models that a server has.

    Raises:
        OllamaRegistrationError: As `require_ollama`.
    """
    entries = _read_json(_get(host, "/api/tags")).get("models") or []
    return [ListedModel(str(e["name"]), int(e.get("size", 0)), str(e.get("digest", ""))) for e in entries]


def remove_model(name: str, host: str | None = None) -> None:
    """Take a model away.

    Raises:
        OllamaRegistrationError: There is no such model, or the server does not answer.
    """
    body = json.dumps({"model": name}).encode()
    _read_bytes(_send(_find_server(host), "/api/delete", body, _JSON, "DELETE"))


def ask_model(
    name: str, messages: Sequence[Mapping[str, str]], host: str | None = None, *, max_tokens: int = 128
) -> str:
    """A registered model's next message, always its likeliest tokens.

    Raises:
        OllamaRegistrationError: There is no such model, its runner fails, or the server does not answer.
    """
    # Ollama's own default for repetitions is 1.1, with which the likeliest token is often not taken.
    options = {"temperature": 0, "seed": 0, "num_predict": max_tokens, "repeat_penalty": 1.0}
    body = {"model": name, "messages": [dict(m) for m in messages], "stream": False, "options": options}
    reply = _read_json(_open(_find_server(host), "/api/chat", json.dumps(body).encode()))
    try:
        return str(reply["message"]["content"])
    except (KeyError, TypeError) as error:
        raise OllamaRegistrationError("the answer is not Ollama's", cause=str(reply)[:200]) from error


def register_gguf(
    path: Path,
    name: str,
    *,
    host: str | None = None,
    system: str | None = None,
    template: str | None = None,
    context: int | None = None,
    stop: Sequence[str] | None = None,
    license: str | None = None,
    status: Callable[[str], None] | None = None,
) -> OllamaModel:
    """Upload a GGUF and create a model of it; one of the same name is replaced, as Ollama does.

    Args:
        path: The GGUF.
        name: The model's name: ``[host/][namespace/]model[:tag]``.
        host: The server; by default ``http://127.0.0.1:11434``.
        system: A system prompt to keep with it. By default the one that the GGUF's own template adds where a
            conversation has none: Ollama's templates know no such thing.
        template: A Go template, for servers older than 0.30. By default none, and where the server then passes prompts
            on raw, the one in `bp_export.gotemplates` that fits the GGUF's own.
        context: Tokens of context (``num_ctx``).
        stop: Stop words; by default the end tokens that the GGUF names.
        license: Text of the model's licence, to keep with it.
        status: Called with each of Ollama's status lines.

    Raises:
        OllamaRegistrationError: The server is away, refuses the name or the file, or ends without success.
        ChatFailedError: The file is no GGUF.
    """
    _require_name(name)
    server = _find_server(host)
    settings = read_settings(path)
    if system is None:
        system = _find_system(settings)
    words = tuple(stop if stop is not None else read_stop_strings(settings))
    digest = f"sha256:{sha256_file(path)}"
    _upload(server, path, digest)
    # Ollama's own default punishes repetition by 1.1, which is not what was trained nor what was verified.
    parameters: dict[str, Any] = {"repeat_penalty": 1.0} | ({"stop": list(words)} if words else {})
    if context is not None:
        parameters["num_ctx"] = context
    body = {"model": name, "files": {path.name: digest}, "system": system, "license": license, "parameters": parameters}
    _create(server, {**body, "template": template}, status)
    found = _read_template(server, name)
    known = find_go_template(str(settings.get("tokenizer.chat_template", "")))
    if template is None and known and found.strip() == _RAW:
        _create(server, {**body, "template": known}, status)
        found = _read_template(server, name)
    return OllamaModel(name, server, found, words, found.strip() == _RAW)


def _require_name(name: str) -> None:
    if not _NAME.fullmatch(name):
        raise OllamaRegistrationError(
            f"{name!r} is no name for an Ollama model",
            way_out="Use letters, digits, -, _ and .: --ollama-name my-model",
        )


def _find_system(settings: Mapping[str, Any]) -> str | None:
    template, tokens = settings.get("tokenizer.chat_template"), settings.get("tokenizer.ggml.tokens", [])
    ids = {f"{kind}_token": settings.get(f"tokenizer.ggml.{kind}_token_id") for kind in ("bos", "eos")}
    words = {name: tokens[i] for name, i in ids.items() if isinstance(i, int) and 0 <= i < len(tokens)}
    return find_default_system(template, words) if isinstance(template, str) else None


def _find_server(host: str | None) -> str:
    return (host or DEFAULT_HOST).rstrip("/")


def _read_template(server: str, name: str) -> str:
    shown = _read_json(_open(server, "/api/show", json.dumps({"model": name}).encode()))
    return str(shown.get("template", ""))


def _upload(server: str, path: Path, digest: str) -> None:
    """Send the file's bytes, unless the server has them."""
    address = f"/api/blobs/{digest}"
    if _has_blob(server, address):
        return
    with path.open("rb") as file:
        headers = {"Content-Length": str(os.fstat(file.fileno()).st_size), "Content-Type": "application/octet-stream"}
        _read_bytes(_open(server, address, iter(lambda: file.read(_BLOCK_BYTES), b""), headers=headers))


def _has_blob(server: str, address: str) -> bool:
    request = urllib.request.Request(server + address, method="HEAD")  # noqa: S310  # the user's own server
    try:
        with urllib.request.urlopen(request, timeout=_SECONDS):  # noqa: S310
            return True
    except urllib.error.HTTPError as error:
        error.close()
        return False
    except (OSError, HTTPException, ValueError) as error:
        raise _build_away(server, error) from error


def _create(server: str, body: Mapping[str, Any], status: Callable[[str], None] | None) -> None:
    last = ""
    told = {key: value for key, value in body.items() if value}
    for line in _read_lines(_open(server, "/api/create", json.dumps(told).encode())):
        if "error" in line:
            raise _build_refusal(str(line["error"]))
        last = str(line.get("status", last))
        if status is not None:
            status(last)
    if last != "success":
        raise OllamaRegistrationError(f"Ollama stopped at {last!r} and did not report success")


def _open(server: str, address: str, data: bytes | Iterator[bytes], headers: Mapping[str, str] | None = None) -> Any:
    """An open answer of a POST."""
    return _send(server, address, data, headers or _JSON, "POST")


def _get(host: str | None, address: str) -> Any:
    return _send(_find_server(host), address, None, {}, "GET", seconds=_LOOK_SECONDS)


def _send(
    server: str,
    address: str,
    data: bytes | Iterator[bytes] | None,
    headers: Mapping[str, str],
    method: str,
    *,
    seconds: float = _SECONDS,
) -> Any:
    """An open answer; errors of the connection and of the server become coded ones."""
    request = urllib.request.Request(  # noqa: S310  # the user's own server
        server + address, data=data, headers=dict(headers), method=method
    )
    try:
        return urllib.request.urlopen(request, timeout=seconds)  # noqa: S310
    except urllib.error.HTTPError as error:
        raise _build_refusal(_read_error(error)) from error
    except (OSError, HTTPException, ValueError) as error:
        raise _build_away(server, error) from error


def _read_bytes(answer: Any) -> bytes:
    try:
        with answer:
            return bytes(answer.read())
    except (OSError, HTTPException) as error:
        raise OllamaRegistrationError("Ollama broke off its answer", cause=str(error)) from error


def _read_lines(answer: Any) -> Iterator[dict[str, Any]]:
    """The objects of a stream of JSON lines."""
    try:
        with answer:
            for line in answer:
                if line.strip():
                    yield _parse(line)
    except (OSError, HTTPException) as error:
        raise OllamaRegistrationError("Ollama broke off its answer", cause=str(error)) from error


def _read_json(answer: Any) -> dict[str, Any]:
    return _parse(_read_bytes(answer))


def _parse(raw: bytes) -> dict[str, Any]:
    try:
        data = json.loads(raw)
    except ValueError as error:
        raise OllamaRegistrationError("the answer is not Ollama's", cause=raw[:200].decode(errors="replace")) from error
    if not isinstance(data, dict):
        raise OllamaRegistrationError("the answer is not Ollama's", cause=str(data)[:200])
    return data


def _read_error(error: urllib.error.HTTPError) -> str:
    with error:
        raw = error.read()
    try:
        return str(json.loads(raw)["error"])
    except (ValueError, KeyError, TypeError):
        return f"HTTP {error.code} {raw[:200].decode(errors='replace')}".strip()


def _build_refusal(words: str) -> OllamaRegistrationError:
    if "adapter" in words and "no longer" in words:
        return OllamaRegistrationError(
            f"Ollama refuses: {words}", way_out="Register base and adapter as one file: --format gguf --ollama"
        )
    return OllamaRegistrationError(
        f"Ollama refuses: {words}", way_out="Read what it says; an older Ollama may need an update: ollama --version"
    )


def _build_away(server: str, error: BaseException) -> OllamaRegistrationError:
    return OllamaRegistrationError(f"Ollama does not answer at {server}", cause=str(error))
