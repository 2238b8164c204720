"""Ten short conversations by which two renderings of chats are compared: systems, scripts, code, a tool call.

Training stores the SHA-256 of each rendered conversation with the adapter, and whoever renders chats for the same
model later (export, parity, Ollama, chat) must reproduce them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Final, TypeAlias

import orjson

from bp_data.templates.engine import ChatTemplate
from bp_runs.files import publish_json

Tools: TypeAlias = Sequence[Mapping[str, Any]]
Messages: TypeAlias = Sequence[Mapping[str, Any]]

TOOLS: Tools = (
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "description": "The weather of a city now.",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
        },
    },
)


def _say(role: str, content: str) -> Mapping[str, Any]:
    return {"role": role, "content": content}


_CALL = {"type": "function", "id": "call00001", "function": {"name": "get_weather", "arguments": {"city": "Paris"}}}

CONVERSATIONS: Sequence[Messages] = (
    (_say("user", "What is the capital of France?"),),
    (_say("system", "Answer in one short sentence."), _say("user", "Why is the sky blue?")),
    (
        _say("user", "Hi!"),
        _say("assistant", "Hello, how can I help?"),
        _say("user", "Name three colours, separated by commas."),
    ),
    (
        _say("system", "You are a patient teacher."),
        _say("user", "What is 12 + 30?"),
        _say("assistant", "12 + 30 = 42."),
        _say("user", "And 1234567 - 89?"),
    ),
    (_say("user", "Übersetze: „Guten Morgen“ — naïve café, 東京 🦙🦙 and नमस्ते!"),),
    (_say("user", "Fix this:\n\n```python\ndef f(x):\n\treturn  x+1   # isn't it?\n```\n"),),
    (_say("user", "  two leading spaces, three trailing   "),),
    (_say("user", 'Write {"a": [1, 2.5, null]} as YAML; keep <b>tags</b> & %signs%.'),),
    (
        _say("user", "I'LL write you'd've don't."),
        _say("assistant", "Fine.\n"),
        _say("user", "ok\n\n\nwhat's next?"),
        _say("assistant", "Next comes the end."),
        _say("user", "Is it 10,000 or 3.14?"),
    ),
    (
        _say("user", "What is the weather in Paris?"),
        {"role": "assistant", "content": "", "tool_calls": [_CALL]},
        {"role": "tool", "name": "get_weather", "tool_call_id": "call00001", "content": "18 °C, cloudy"},
    ),
)
"""The last one is a tool call, and goes along with `TOOLS`."""

SERVER_VARIABLES: Final[Mapping[str, object]] = {
    "enable_thinking": True,
    "date_string": "01 Jan 2000",
    "datetime": "Jan 01 2000 00:00:00 GMT",
}
"""Variables that llama.cpp gives to templates, each with a value that it may have; in training they are undefined."""

_RECORD_FILE: Final = "template.json"
# Templates that print the date must give the same hashes on every day.
_DAY: Final = datetime(2026, 1, 2, 3, 4, 5)


@dataclass(frozen=True, slots=True)
class ConversationHashes:
    """How a template renders `CONVERSATIONS`.

    Attributes:
        conversations: Hex SHA-256 of the conversations themselves, so that hashes of other ones are never compared.
        rendered: Hex SHA-256 of each rendered conversation with its generation prompt; empty if the template rejects
            the conversation.
    """

    conversations: str
    rendered: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """As in an adapter's ``run.json``."""
        return {"conversations": self.conversations, "rendered": list(self.rendered)}

    @classmethod
    def from_dict(cls, data: object) -> ConversationHashes | None:
        """Read back what `to_dict` gave; None for anything else."""
        if not isinstance(data, Mapping):
            return None
        which, rendered = data.get("conversations"), data.get("rendered")
        if not isinstance(which, str) or not isinstance(rendered, list | tuple):
            return None
        return cls(which, tuple(map(str, rendered)))


def hash_conversations(template: ChatTemplate) -> ConversationHashes:
    """Render `CONVERSATIONS` on a fixed day and hash each."""
    return hash_rendered(template.at_time(_DAY).try_render)


def hash_rendered(render: Callable[..., str | None]) -> ConversationHashes:
    """As `hash_conversations`, for any function called as ``render(messages, tools, add_generation_prompt=True)``."""
    texts = (render(chat, tools, add_generation_prompt=True) for chat, tools in with_tools())
    return ConversationHashes(
        _hash(orjson.dumps([CONVERSATIONS, TOOLS])),
        tuple("" if text is None else _hash(text.encode()) for text in texts),
    )


def write_template_record(folder: Path, template: ChatTemplate) -> None:
    """Store in a run's folder how its template renders chats, for adapters that are made of its checkpoints.

    Raises:
        DiskFullError, OutputNotWritableError: The file can't be written.
    """
    text = template.text if template.source == "default" else None
    publish_json(folder / _RECORD_FILE, {"default": text, "hashes": hash_conversations(template).to_dict()})


def read_template_record(folder: Path) -> tuple[str | None, ConversationHashes | None]:
    """The text of a run's template if its model had none, and the hashes of its renderings; None if not stored."""
    try:
        stored = orjson.loads((folder / _RECORD_FILE).read_bytes())
        text = stored["default"]
        return (text if isinstance(text, str) else None), ConversationHashes.from_dict(stored["hashes"])
    except (OSError, orjson.JSONDecodeError, KeyError, TypeError):
        return None, None


def with_tools() -> list[tuple[Messages, Tools | None]]:
    """Each conversation with its tools."""
    return [(chat, TOOLS if chat is CONVERSATIONS[-1] else None) for chat in CONVERSATIONS]


def find_server_variables(template: ChatTemplate) -> list[str]:
    """Names of `SERVER_VARIABLES` that change how the template renders a conversation."""
    text = "".join(template.texts.values())
    return [name for name, value in SERVER_VARIABLES.items() if name in text and _reads(template, name, value)]


def _reads(template: ChatTemplate, name: str, value: object) -> bool:
    return any(
        template.try_render(chat, tools, add_generation_prompt=True, variables={name: value})
        != template.try_render(chat, tools, add_generation_prompt=True)
        for chat, tools in with_tools()
    )


def find_differences(expected: ConversationHashes, found: ConversationHashes) -> list[int] | None:
    """Numbers, from 1, of the conversations that are rendered differently; None if they can't be compared."""
    if expected.conversations != found.conversations or len(expected.rendered) != len(found.rendered):
        return None
    pairs = zip(expected.rendered, found.rendered, strict=True)
    return [number for number, (old, new) in enumerate(pairs, 1) if old != new]


def _hash(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
