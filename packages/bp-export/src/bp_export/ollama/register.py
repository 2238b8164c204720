"""Register a GGUF, or an adapter, with Ollama: upload the blobs, create the model, look at it, and ask it once.

The stop words are sent always, since older servers know none for a template that they do not recognize.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ollama import Client

from bp_data.templates.engine import find_default_system
from bp_export.errors import OllamaRegistrationError
from bp_export.formats.ollama_adapter import OllamaAdapter, read_ollama_adapter, require_same_layout
from bp_export.gguf.file import read_settings, read_stop_strings
from bp_export.local_paths import StrPath
from bp_export.ollama.compare import compare_model
from bp_export.ollama.go_templates import find_go_template, is_of_other_family
from bp_export.ollama.server import (
    MERGED_WAY,
    connect,
    find_server,
    has_blob,
    read_version,
    require_free_name,
    require_name,
    takes_adapters,
)
from bp_export.verify.report import ParityReport
from bp_export.verify.template import RenderingCheck, check_gguf, read_gguf_template
from bp_runs.errors import InvalidSettingError
from bp_runs.files import sha256_file
from bp_runs.wording import setting_ref

FIRST_QUESTION = "Say hello in one short sentence."
_FIRST_TOKENS = 16
_DEFAULT_CONTEXT = 4096  # Ollama's own on machines with less than 24 GiB of GPU memory
_RAW = "{{ .Prompt }}"
_OWN_TEMPLATE = "not tested: Ollama renders chats with a template of its own and not with the GGUF's"
# Ollama's own default for repetitions is 1.1, which is not what was trained nor what was verified.
_PLAIN: Mapping[str, Any] = {"repeat_penalty": 1.0}

Status = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class OllamaModel:
    """A registered model."""

    name: str
    host: str
    version: str
    """The server's."""
    template: str
    """What Ollama says it will use; empty where it leaves the template to the GGUF."""
    stop: tuple[str, ...]
    """The stop words that were sent."""
    is_raw: bool
    """Whether Ollama would pass prompts on without any template (old versions, unknown templates)."""
    answer: str | None
    """Its first words to the question that tries it; None where it was not asked."""
    rendering: RenderingCheck
    """Whether its chat template renders ten conversations as at training."""
    context: int | None = None
    """Tokens of context that were set (``num_ctx``); None for Ollama's default."""
    parity: ParityReport | None = None
    """How it compares with the trained model, over Ollama's API; None if it was not asked, or is an adapter."""

    def describe_context(self) -> str:
        """The context in words."""
        return "Ollama's default" if self.context is None else f"{self.context} tokens"


def register_model(path: StrPath, name: str, *, trained: StrPath | None = None, **options: Any) -> OllamaModel:
    """Register a GGUF, or a folder of the format ``ollama-adapter``.

    Args:
        path: The file or the folder.
        name: The model's name.
        trained: As `register_gguf`; an adapter in Ollama is not compared.
        **options: What `register_gguf` and `register_adapter` have in common.

    Raises:
        InvalidSettingError: ``trained`` with a folder.
        CodedError: As `register_gguf` and `register_adapter`.
    """
    if not Path(path).is_dir():
        return register_gguf(path, name, trained=trained, **options)
    if trained is not None:
        raise InvalidSettingError(
            f"{path} is a folder, and only a GGUF is compared with what was trained",
            fix="Leave it out: {set:trained}",
        )
    return register_adapter(path, name, **options)


def register_gguf(
    path: StrPath,
    name: str,
    *,
    host: str | None = None,
    system: str | None = None,
    template: str | None = None,
    context: int | None = None,
    stop: Sequence[str] | None = None,
    license: str | None = None,
    trained: StrPath | None = None,
    allowed: float | None = None,
    force: bool = False,
    question: str | None = FIRST_QUESTION,
    status: Status | None = None,
) -> OllamaModel:
    """Upload a GGUF, create a model of it, look at what it became, ask it once, and compare it with what was trained.

    Args:
        path: The GGUF.
        name: The model's name: ``[host/][namespace/]model[:tag]``.
        host: The server; by default ``http://127.0.0.1:11434``.
        system: A system prompt to keep with it. By default the one that the GGUF's own template adds where a
            conversation has none: Ollama's templates know no such thing.
        template: A Go template, for servers older than 0.30. By default none; if the server then passes prompts on
            raw or takes another family's, the one in `bp_export.ollama.go_templates` that fits the GGUF's own.
        context: Tokens of context (``num_ctx``); by default Ollama's own, or the file's where that is shorter.
        stop: Stop words; by default the end tokens that the GGUF names.
        license: Text of the model's license, to keep with it; by default the one that the GGUF names.
        trained: The adapter's or the trained model's folder, whose witness the model in Ollama is compared with.
        allowed: Nats that the merged weights may be away from that witness, as the export found; None for the usual.
        force: Whether it may take the place of a model of the same name.
        question: What the new model is asked, to see that it runs; None for nothing, and for no comparison.
        status: Called with each of Ollama's status lines.

    Raises:
        OllamaNameTakenError: There is a model of that name, and ``force`` is not set.
        OllamaRegistrationError: The server is away, rejects the name or the file, ends without success, or cannot run
            the model (which stays registered then).
        TemplateChangedError: Its chat template renders chats differently than training did.
        ChatFailedError: The file is no GGUF.
        ParityFailedError: In Ollama it does not say what was trained, or renders chats differently; the model
            stays registered.
    """
    path = Path(path)
    version, server = _require_place(name, host, force=force), find_server(host)
    settings = read_settings(path)
    if settings.get("general.type") == "adapter":
        raise _refuse_bare_adapter(path)
    if settings.get("split.count", 1) > 1:
        raise OllamaRegistrationError(
            f"{path} is one of several files, and Ollama takes one",
            fix="Export it as one file, without {set:split_bytes}.",
        )
    rendering = check_gguf(path, settings)
    system = _find_system(settings) if system is None else system
    words = tuple(stop if stop is not None else read_stop_strings(settings))
    context = _choose_context(settings, context)
    asked = _build_request(name, words, context, system, license or _find_license(settings))
    with connect(server) as client:
        towers = path.with_name(f"mmproj-{path.name}")  # an export's vision tower, if there is one
        parts = [path, towers] if towers.is_file() else [path]
        asked["files"] = {part.name: _upload(client, server, part, status) for part in parts}
        _create(client, {**asked, "template": template}, status)
        found = _read_template(client, name)
        jinja = str(settings.get("tokenizer.chat_template", ""))
        known = find_go_template(jinja)
        if template is None and known and (found.strip() == _RAW or is_of_other_family(found, jinja)):
            _create(client, {**asked, "template": known}, status)
            found = _read_template(client, name)
    rendering = _unless_replaced(rendering, found, settings)
    answer, parity = None, None
    if question is not None:
        answer = _try(name, question, server)
        folder = None if trained is None else Path(trained)
        parity = compare_model(name, server, path, system=system, trained=folder, allowed=allowed)
    return OllamaModel(name, server, version, found, words, found.strip() == _RAW, answer, rendering, context, parity)


def register_adapter(
    folder: StrPath,
    name: str,
    *,
    host: str | None = None,
    system: str | None = None,
    context: int | None = None,
    license: str | None = None,
    force: bool = False,
    question: str | None = FIRST_QUESTION,
    status: Status | None = None,
) -> OllamaModel:
    """Register a folder of the format ``ollama-adapter``: its adapter on the base that the server has, or on a GGUF.

    Args:
        folder: What `bp_export.export_adapter` wrote.
        name: As `register_gguf`, and so are the others.
        system: A system prompt to keep with it; by default the base's there.
        license: Text of the model's license; by default the base's there.

    Raises:
        OllamaRegistrationError: As `register_gguf`; the version takes no adapters, or there is no such base.
        AdapterMismatchError: The base there has another architecture, depth or width than the adapter's.
        AdapterFormatError: It is no such folder.
        OllamaNameTakenError: As `register_gguf`.
    """
    adapter = read_ollama_adapter(Path(folder))
    settings: Mapping[str, Any] = {}
    rendering = RenderingCheck("not tested", _OWN_TEMPLATE)
    if adapter.base_file is not None:
        settings = read_settings(adapter.base_file)
        rendering = check_gguf(adapter.base_file, settings, adapter.hashes)
    version, server = _require_place(name, host, force=force), find_server(host)
    if not takes_adapters(version):
        raise OllamaRegistrationError(f"Ollama {version} takes no adapters", fix=MERGED_WAY)
    context = _cap_context(adapter.context, context)
    asked = _build_request(name, adapter.stop, context, system, license)
    with connect(server) as client:
        asked |= _find_base(client, server, adapter, status)
        asked["adapters"] = {adapter.path.name: _upload(client, server, adapter.path, status)}
        _create(client, asked, status)
        found = _read_template(client, name)
    rendering = _unless_replaced(rendering, found, settings)
    answer = None if question is None else _try(name, question, server)
    return OllamaModel(name, server, version, found, adapter.stop, found.strip() == _RAW, answer, rendering, context)


def read_license(path: Path) -> str:
    """The text of a license's file.

    Raises:
        OllamaRegistrationError: It cannot be read as UTF-8.
    """
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise OllamaRegistrationError(
            f"the license {path} cannot be read", cause=str(error), fix="Name a text file: {set:license=LICENSE}"
        ) from error


def ask_model(
    name: str, messages: Sequence[Mapping[str, str]], host: str | None = None, *, max_tokens: int = 128
) -> str:
    """A registered model's next message, always its likeliest tokens.

    Raises:
        OllamaRegistrationError: There is no such model, its runner fails, or the server does not answer.
    """
    return "".join(stream_answer(name, messages, host, max_tokens=max_tokens))


def stream_answer(
    name: str,
    messages: Sequence[Mapping[str, str]],
    host: str | None = None,
    *,
    max_tokens: int = 128,
    temperature: float = 0.0,
    seed: int = 0,
) -> Iterator[str]:
    """A registered model's next message, piece by piece as it is made.

    Args:
        name: The model's name there.
        messages: Each with ``role`` and ``content``.
        host: The server; by default ``http://127.0.0.1:11434``.
        max_tokens: Tokens at most.
        temperature: 0 for always the likeliest token.
        seed: For other temperatures.

    Raises:
        OllamaRegistrationError: As `ask_model`.
    """
    options = {"temperature": temperature, "seed": seed, "num_predict": max_tokens, **_PLAIN}
    with connect(host) as client:
        for part in client.chat(name, [dict(m) for m in messages], stream=True, options=options):
            yield part.message.content or ""


def _require_place(name: str, host: str | None, *, force: bool) -> str:
    """The server's version, once it is sure that the name can be had there."""
    require_name(name)
    version = read_version(host)
    if not force:
        require_free_name(name, host)
    return version


def _refuse_bare_adapter(path: Path) -> OllamaRegistrationError:
    return OllamaRegistrationError(f"{path} is an adapter and not a model", fix=MERGED_WAY)


def _choose_context(settings: Mapping[str, Any], asked: int | None) -> int | None:
    """What to set: as asked, the file's own where Ollama's default is longer, else nothing.

    Training on short rows does not shorten what a model can read, so a run's row length has no say here.

    Raises:
        InvalidSettingError: The file's context is shorter than what was requested.
    """
    longest = settings.get(f"{settings.get('general.architecture')}.context_length")
    return _cap_context(longest if isinstance(longest, int) else None, asked)


def _cap_context(longest: int | None, asked: int | None) -> int | None:
    if longest is None:
        return asked
    if asked is not None and asked > longest:
        raise InvalidSettingError(
            f"a context of {asked} tokens is more than the {longest} that the file allows",
            cause="past it the model would answer differently than it was trained to",
            fix=f"Use at most that: {setting_ref('ollama_context', longest)}",
        )
    return longest if asked is None and longest < _DEFAULT_CONTEXT else asked


def _build_request(
    name: str, stop: Sequence[str], context: int | None, system: str | None, license: str | None
) -> dict[str, Any]:
    parameters = {**_PLAIN, "stop": list(stop) or None, "num_ctx": context}
    told = {key: value for key, value in parameters.items() if value is not None}
    return {"model": name, "system": system, "license": license, "parameters": told}


def _find_base(client: Client, server: str, adapter: OllamaAdapter, status: Status | None) -> dict[str, Any]:
    """What the adapter continues: a GGUF to upload, or a model of the server that has the base's layout."""
    if adapter.base_file is not None:
        return {"files": {adapter.base_file.name: _upload(client, server, adapter.base_file, status)}}
    require_same_layout(adapter, client.show(adapter.runs_on).modelinfo or {})
    return {"from_": adapter.runs_on}


def _find_system(settings: Mapping[str, Any]) -> str | None:
    template = read_gguf_template(settings)
    return None if template is None else find_default_system(template)


def _unless_replaced(check: RenderingCheck, found: str, settings: Mapping[str, Any]) -> RenderingCheck:
    """The check of a GGUF's template, unless the server shows that it renders chats with another one."""
    is_other = bool(found.strip()) and found != settings.get("tokenizer.chat_template")
    return RenderingCheck("not tested", _OWN_TEMPLATE) if is_other else check


def _find_license(settings: Mapping[str, Any]) -> str | None:
    """The license's name and address as the GGUF has them."""
    found = (settings.get(f"general.license{part}") for part in (".name", "", ".link"))
    return "\n".join(dict.fromkeys(str(value) for value in found if value)) or None


def _read_template(client: Client, name: str) -> str:
    return client.show(name).template or ""


def _upload(client: Client, server: str, path: Path, status: Status | None) -> str:
    """Send the file's bytes, unless the server has them; returns their digest."""
    digest = f"sha256:{sha256_file(path)}"
    if not has_blob(server, digest):
        if status is not None:
            status(f"uploading {path.name} ({path.stat().st_size / 2**20:,.0f} MiB)")
        client.create_blob(path)
    return digest


def _create(client: Client, asked: Mapping[str, Any], status: Status | None) -> None:
    last = ""
    for part in client.create(**{key: value for key, value in asked.items() if value}, stream=True):
        last = part.status or last
        if status is not None:
            status(last)
    if last != "success":
        raise OllamaRegistrationError(f"Ollama stopped at {last!r} and did not report success")


def _try(name: str, question: str, server: str) -> str:
    return ask_model(name, [{"role": "user", "content": question}], server, max_tokens=_FIRST_TOKENS)
