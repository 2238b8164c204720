"""Do chats render as they did at training? The ten conversations of `bp_data.templates.render_hashes`, by their hashes.

Training stores the hashes in the adapter's ``run.json``. Each step on the way to a chat must reproduce them:

    export         the template next to the adapter, with the engine that training used
    parity         the template in the GGUF that was written; and llama.cpp's own rendering of it, token by token
    chat           the template in the GGUF; and llama.cpp's own rendering of it, as text
    Ollama         the template in the GGUF, where the server renders chats with that

A GGUF carries the hashes along (`CONVERSATIONS_KEY`, `RENDERED_KEY`), and a merged folder in its ``export.json``.
Adapters from elsewhere have none: then nothing is tested, and the check says so.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

from gguf import GGUFWriter, TokenType

from bp_data.errors import TemplateFailedError
from bp_data.templates.engine import ChatTemplate
from bp_data.templates.reader import SpecialTokens, read_special_tokens, read_template_files
from bp_data.templates.render_hashes import (
    ConversationHashes,
    Messages,
    find_differences,
    hash_conversations,
    with_tools,
)
from bp_export.chat.server import LlamaServer
from bp_export.errors import ChatFailedError, TemplateChangedError
from bp_export.formats.output import read_mark
from bp_export.gguf.file import read_settings
from bp_runs.adapter import read_manifest

CONVERSATIONS_KEY: Final = "backpropagate.template.conversations"
RENDERED_KEY: Final = "backpropagate.template.rendered"

_NO_HASHES = "not tested: no hashes of rendered conversations were stored at training"
_OTHER_SET = "not tested: the hashes stored at training are of other conversations"


@dataclass(frozen=True, slots=True)
class RenderingCheck:
    """Whether the ten conversations render as at training; a difference is an error, not a result."""

    result: Literal["passed", "not tested"]
    note: str
    """What was compared, or why nothing was: ``not tested: …``."""


def read_trained_hashes(folder: Path) -> ConversationHashes | None:
    """What training stored in an adapter's or a model's folder; None for folders from elsewhere.

    Raises:
        AdapterInvalidError: ``run.json`` is damaged.
    """
    stored = read_manifest(folder).get("template") or (read_mark(folder) or {}).get("template")
    return ConversationHashes.from_dict(stored)


def check_folder(folder: Path, hashes: ConversationHashes | None) -> RenderingCheck:
    """Compare the template of a tokenizer's folder with training.

    Raises:
        TemplateChangedError: A conversation renders differently.
        TemplateFailedError, TokenizerInvalidError: The folder's template can't be read.
    """
    if hashes is None:
        return RenderingCheck("not tested", _NO_HASHES)
    files = read_template_files(folder)
    template = None
    if files is not None:
        template = ChatTemplate(files.texts, SpecialTokens(read_special_tokens(folder)), source=files.source)
    fix = f"Restore the chat template in {folder} as training saved it: tokenizer_config.json and chat_template.jinja."
    return _compare(hashes, template, str(folder), fix)


def check_gguf(
    path: Path, settings: Mapping[str, Any] | None = None, hashes: ConversationHashes | None = None
) -> RenderingCheck:
    """Compare the template in a GGUF with training.

    Args:
        path: The file.
        settings: Its settings, if they are read already.
        hashes: What training stored, instead of what the file carries.

    Raises:
        TemplateChangedError: A conversation renders differently.
        ChatFailedError: It is no GGUF.
    """
    settings = read_settings(path) if settings is None else settings
    hashes = hashes or read_gguf_hashes(settings)
    if hashes is None:
        return RenderingCheck("not tested", _NO_HASHES)
    fix = "Export the adapter again: {do:export ADAPTER force=true}"
    return _compare(hashes, read_gguf_template(settings), str(path), fix)


def render_in_llama_cpp(
    server: LlamaServer, messages: Messages, tools: Sequence[Mapping[str, Any]] | None = None
) -> str | None:
    """The prompt as llama.cpp's chat makes it, without the BOS that its tokenizer adds; None if it rejects the chat."""
    body: dict[str, Any] = {"messages": [_to_openai(message) for message in messages]}
    try:
        return str(server.post("/apply-template", {**body, **({"tools": tools} if tools else {})})["prompt"])
    except ChatFailedError:
        return None


def check_server(server: LlamaServer, path: Path, settings: Mapping[str, Any]) -> None:
    """Compare what llama.cpp makes of a GGUF's template with what training's engine makes of it.

    Raises:
        TemplateChangedError: A conversation that both render is another text.
    """
    template = read_gguf_template(settings)
    if template is None:
        return
    bos = str(template.special_tokens.get("bos_token", ""))
    wrong = []
    for number, (messages, tools) in enumerate(with_tools(), 1):
        ours = template.try_render(messages, tools, add_generation_prompt=True)
        theirs = render_in_llama_cpp(server, messages, tools)
        if ours is not None and theirs is not None and ours.removeprefix(bos) != theirs.removeprefix(bos):
            wrong.append(number)
    if wrong:
        raise TemplateChangedError(
            f"llama.cpp renders the chat template of {path} differently than training did: "
            f"conversations {', '.join(map(str, wrong))}",
            fix="Install a llama.cpp that renders the template: {install:--upgrade xllamacpp}",
            details={"conversations": wrong},
        )


def _to_openai(message: Mapping[str, Any]) -> dict[str, Any]:
    """llama.cpp takes a call's arguments as OpenAI's API has them: as a JSON string."""
    calls = [
        {**call, "function": {**call["function"], "arguments": json.dumps(call["function"]["arguments"])}}
        for call in message.get("tool_calls", ())
    ]
    return {**message, **({"tool_calls": calls} if calls else {})}


def add_hashes(writer: GGUFWriter, hashes: ConversationHashes) -> None:
    """Put the hashes among a GGUF's settings."""
    writer.add_string(CONVERSATIONS_KEY, hashes.conversations)
    writer.add_array(RENDERED_KEY, list(hashes.rendered))


def read_gguf_hashes(settings: Mapping[str, Any]) -> ConversationHashes | None:
    """The hashes in a GGUF's settings; None for a GGUF that another program wrote."""
    return ConversationHashes.from_dict(
        {"conversations": settings.get(CONVERSATIONS_KEY), "rendered": settings.get(RENDERED_KEY)}
    )


def read_gguf_template(settings: Mapping[str, Any]) -> ChatTemplate | None:
    """The chat template in a GGUF, which sees ``bos_token`` and ``eos_token`` as llama.cpp gives them.

    None without a template, or with one that is not valid Jinja.
    """
    keys = {"default": "tokenizer.chat_template"}
    keys |= {name: f"{keys['default']}.{name}" for name in settings.get("tokenizer.chat_templates", ())}
    texts = {name: str(settings[key]) for name, key in keys.items() if isinstance(settings.get(key), str)}
    if "default" not in texts:
        return None
    tokens = settings.get("tokenizer.ggml.tokens", [])
    ids = {f"{kind}_token": settings.get(f"tokenizer.ggml.{kind}_token_id") for kind in ("bos", "eos")}
    special = {name: str(tokens[i]) for name, i in ids.items() if isinstance(i, int) and 0 <= i < len(tokens)}
    kinds = settings.get("tokenizer.ggml.token_type", [])
    added = [str(token) for token, kind in zip(tokens, kinds, strict=False) if kind in _ADDED]
    try:
        return ChatTemplate(texts, SpecialTokens(special, added))
    except TemplateFailedError:
        return None


_ADDED = (int(TokenType.CONTROL), int(TokenType.USER_DEFINED))


def _compare(expected: ConversationHashes, template: ChatTemplate | None, place: str, fix: str) -> RenderingCheck:
    if template is None:
        raise TemplateChangedError(f"{place} has no chat template, and the model was trained with one", fix=fix)
    found = hash_conversations(template)
    wrong = find_differences(expected, found)
    if wrong is None:
        return RenderingCheck("not tested", _OTHER_SET)
    if wrong:
        numbers = ", ".join(map(str, wrong))
        raise TemplateChangedError(
            f"{place} renders chats differently than training did: {len(wrong)} of {len(found.rendered)} conversations",
            cause=f"the hashes of conversations {numbers} differ from those stored at training",
            fix=fix,
            details={"conversations": wrong},
        )
    return RenderingCheck("passed", f"{len(found.rendered)} conversations render as at training")
