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
from typing import Any

from bp_export.errors import OllamaRegistrationError
from bp_export.gguf import read_settings, read_stop_strings
from bp_runs.files import sha256_file

DEFAULT_HOST = "http://127.0.0.1:11434"
_BLOCK_BYTES = 2**20
_SECONDS = 600.0
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


def register_gguf(
    path: Path,
    name: str,
    *,
    host: str | None = None,
    system: str | None = None,
    template: str | None = None,
    context: int | None = None,
    stop: Sequence[str] | None = None,
    status: Callable[[str], None] | None = None,
) -> OllamaModel:
    """Upload a GGUF and create a model of it; one of the same name is replaced, as Ollama does.

    Args:
        path: The GGUF.
        name: The model's name: ``[host/][namespace/]model[:tag]``.
        host: The server; by default ``http://127.0.0.1:11434``.
        system: A system prompt to keep with it.
        template: A Go template, for servers older than 0.30 that do not know the GGUF's own.
        context: Tokens of context (``num_ctx``).
        stop: Stop words; by default the end tokens that the GGUF names.
        status: Called with each of Ollama's status lines.

    Raises:
        OllamaRegistrationError: The server is away, refuses the name or the file, or ends without success.
        ChatFailedError: The file is no GGUF.
    """
    if not _NAME.fullmatch(name):
        raise OllamaRegistrationError(
            f"{name!r} is no name for an Ollama model",
            way_out="Use letters, digits, -, _ and .: --ollama-name my-model",
        )
    server = (host or DEFAULT_HOST).rstrip("/")
    settings = read_settings(path)
    words = tuple(stop if stop is not None else read_stop_strings(settings))
    digest = f"sha256:{sha256_file(path)}"
    _upload(server, path, digest)
    parameters: dict[str, Any] = {"stop": list(words)} if words else {}
    if context is not None:
        parameters["num_ctx"] = context
    body = {"model": name, "files": {path.name: digest}, "system": system, "template": template}
    _create(server, {k: v for k, v in {**body, "parameters": parameters}.items() if v}, status)
    shown = _read_json(_open(server, "/api/show", json.dumps({"model": name}).encode()))
    found = str(shown.get("template", ""))
    return OllamaModel(name, server, found, words, found.strip() == "{{ .Prompt }}")


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
    for line in _read_lines(_open(server, "/api/create", json.dumps(body).encode())):
        if "error" in line:
            raise _build_refusal(str(line["error"]))
        last = str(line.get("status", last))
        if status is not None:
            status(last)
    if last != "success":
        raise OllamaRegistrationError(f"Ollama stopped at {last!r} and did not report success")


def _open(server: str, address: str, data: bytes | Iterator[bytes], headers: Mapping[str, str] | None = None) -> Any:
    """An open answer of a POST; errors of the connection and of the server become coded ones."""
    request = urllib.request.Request(  # noqa: S310  # the user's own server
        server + address, data=data, headers=dict(headers or {"Content-Type": "application/json"}), method="POST"
    )
    try:
        return urllib.request.urlopen(request, timeout=_SECONDS)  # noqa: S310
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
    return OllamaRegistrationError(
        f"Ollama refuses: {words}", way_out="Read what it says; an older Ollama may need an update: ollama --version"
    )


def _build_away(server: str, error: BaseException) -> OllamaRegistrationError:
    return OllamaRegistrationError(f"Ollama does not answer at {server}", cause=str(error))
