"""A running Ollama: reached through its official Python client, its version, and the models that it has.

The protocol is Ollama's docs/api.md. An error may come as a line of a stream whose status is 200; the client raises it.
"""

from __future__ import annotations

import contextlib
import ipaddress
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import httpx

from bp_export.errors import OllamaNameTakenError, OllamaRegistrationError
from bp_runs.errors import InvalidSettingError

try:
    from ollama import Client, ResponseError
except ValueError as error:  # at its import the client reads a variable that we take as an argument
    raise InvalidSettingError(
        "OLLAMA_HOST cannot be read as an address", cause=str(error), fix="Say: OLLAMA_HOST=127.0.0.1:11434"
    ) from error

_PORTS, _DEFAULT_PORT = {"http": 80, "https": 443}, 11434
_SECONDS, _LOOK_SECONDS = 600.0, 10.0
_ENDED_ADAPTERS = (0, 34, 1)
_PART = r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,79}"
_NAME = re.compile(rf"({_PART}(:\d+)?/)?({_PART}/)?{_PART}(:{_PART})?")
_OWN_PREFIXES = ("registry.ollama.ai/", "library/")


@dataclass(frozen=True, slots=True)
class ListedModel:
    """A model that a server has."""

    name: str
    bytes: int
    digest: str


def require_ollama(host: str | None = None, *, name: str | None = None, force: bool = False) -> str:
    """The version of the server, for a look before hours of work.

    Args:
        host: The server; by default ``http://127.0.0.1:11434``.
        name: A name that a model is going to have there.
        force: Whether it may take the place of a model of that name.

    Raises:
        OllamaRegistrationError: It does not answer, or is no Ollama, or rejects such names.
        OllamaNameTakenError: It has a model of that name.
    """
    if name is not None:
        require_name(name)
    version = read_version(host)
    if name is not None and not force:
        require_free_name(name, host)
    return version


def read_version(host: str | None = None) -> str:
    """What the server says of itself: ``0.32.15``.

    Raises:
        OllamaRegistrationError: It does not answer, or is no Ollama.
    """
    server = find_server(host)
    with _coded(server):
        reply = httpx.get(f"{server}/api/version", timeout=_LOOK_SECONDS, trust_env=not is_local(server))
        if reply.status_code != httpx.codes.OK:
            raise ResponseError(reply.text, reply.status_code)
        return str(reply.json()["version"])


def takes_adapters(version: str) -> bool:
    """Whether a version takes LoRA adapters, and quantizes while it creates: both ended with 0.34.1."""
    numbers = [int(part) for part in re.findall(r"\d+", version)[:3]]
    return bool(numbers) and tuple(numbers) < _ENDED_ADAPTERS


def list_models(host: str | None = None) -> list[ListedModel]:
    """The models that a server has.

    Raises:
        OllamaRegistrationError: As `require_ollama`.
    """
    with connect(host, seconds=_LOOK_SECONDS) as client:
        return [ListedModel(str(m.model), int(m.size or 0), str(m.digest or "")) for m in client.list().models]


def remove_model(name: str, host: str | None = None) -> None:
    """Take a model away.

    Raises:
        OllamaRegistrationError: There is no such model, or the server does not answer.
    """
    with connect(host) as client:
        client.delete(name)


def has_blob(server: str, digest: str) -> bool:
    """Whether the server has the bytes already; a second upload would be cut off by its early answer."""
    with _coded(server):
        address = f"{server}/api/blobs/{digest}"
        return httpx.head(address, timeout=_LOOK_SECONDS, trust_env=not is_local(server)).status_code == httpx.codes.OK


def post_json(server: str, call: str, body: Mapping[str, Any]) -> dict[str, Any]:
    """The answer to one request without a stream, with fields that the official client leaves out.

    Raises:
        OllamaRegistrationError: The server is away, rejects it, or breaks off.
    """
    with _coded(server):
        reply = httpx.post(f"{server}/api/{call}", json=body, timeout=_SECONDS, trust_env=not is_local(server))
        found = reply.json()
        if reply.status_code != httpx.codes.OK or "error" in found:
            raise ResponseError(str(found.get("error", reply.text)), reply.status_code)
        return dict(found)


@contextlib.contextmanager
def connect(host: str | None, *, seconds: float = _SECONDS) -> Iterator[Client]:
    """The official client; what it raises becomes coded.

    Raises:
        OllamaRegistrationError: From the block: the server is away, rejects, breaks off or is no Ollama.
    """
    server = find_server(host)
    with _coded(server), Client(server, timeout=seconds, trust_env=not is_local(server)) as client:
        yield client


def find_server(host: str | None) -> str:
    """A server's whole address, from what Ollama's own variable may hold: ``box``, ``:11500``, ``http://box:8080``.

    Args:
        host: None or nothing for ``http://127.0.0.1:11434``.

    Raises:
        InvalidSettingError: It is no address.
    """
    host = (host or "").strip()
    try:
        parts = urlsplit(host if "://" in host else f"http://{host}")
        port = parts.port or (_PORTS[parts.scheme] if "://" in host else _DEFAULT_PORT)
    except (ValueError, KeyError) as error:
        fix = "Give a host and a port, such as 127.0.0.1:11434."
        raise InvalidSettingError(f"{host!r} is not an address of Ollama", cause=str(error), fix=fix) from error
    name = parts.hostname or "127.0.0.1"
    name = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(name, name)  # noqa: S104  # listening everywhere includes here
    return f"{parts.scheme}://{f'[{name}]' if ':' in name else name}:{port}{parts.path.rstrip('/')}"


def is_local(server: str) -> bool:
    """Whether an address is this machine's own, which no proxy can reach."""
    name = urlsplit(server).hostname or ""
    try:
        address = ipaddress.ip_address(name)
    except ValueError:
        return name == "localhost"
    return address.is_loopback or address.is_unspecified


def require_name(name: str) -> None:
    """Reject a name that Ollama would reject after the upload.

    Raises:
        OllamaRegistrationError: Why not.
    """
    if not _NAME.fullmatch(name):
        raise OllamaRegistrationError(
            f"{name!r} is no name for an Ollama model",
            fix="Use letters, digits, -, _ and .: {set:ollama_name=my-model}",
        )


def require_free_name(name: str, host: str | None) -> None:
    """Reject a name that a model of the server has: Ollama itself would replace that without a word.

    Raises:
        OllamaNameTakenError: It has one.
    """
    taken = {_to_full_name(model.name): model.name for model in list_models(host)}
    if found := taken.get(_to_full_name(name)):
        raise OllamaNameTakenError(f"Ollama has a model {found} already")


def _to_full_name(name: str) -> str:
    """Lower case, with its tag, and without the parts that Ollama adds by itself."""
    name = name.lower()
    for prefix in _OWN_PREFIXES:
        name = name.removeprefix(prefix)
    return name if ":" in name.rpartition("/")[2] else f"{name}:latest"


@contextlib.contextmanager
def _coded(server: str) -> Iterator[None]:
    try:
        yield
    except ResponseError as error:
        raise _build_refusal(error) from error
    except (ConnectionError, httpx.ConnectError, httpx.ConnectTimeout) as error:
        raise OllamaRegistrationError(f"Ollama does not answer at {server}", cause=str(error)) from error
    except httpx.HTTPError as error:
        raise OllamaRegistrationError("Ollama broke off its answer", cause=str(error) or repr(error)) from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:  # JSON, its shape, or pydantic's view of that
        raise OllamaRegistrationError("the answer is not Ollama's", cause=str(error)[:200]) from error


def _build_refusal(error: ResponseError) -> OllamaRegistrationError:
    words = str(error.error).strip() or f"HTTP {error.status_code}"
    if "no longer supported" in words or ("quantize" in words and "llama.cpp" in words):
        return OllamaRegistrationError(f"Ollama rejects it: {words}", fix=MERGED_WAY)
    return OllamaRegistrationError(
        f"Ollama rejects it: {words}", fix="Read its message. An older Ollama may need an update: ollama --version"
    )


MERGED_WAY = (
    "Since 0.34.1 Ollama takes no adapters and does not quantize: export base and adapter as one quantized file: "
    "{do:export ./output/lora format=gguf quantization=q4_k_m ollama=true}"
)
