"""Ten short conversations that every export is tried with: one to four turns, systems, scripts, code, a tool call."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

Messages: TypeAlias = Sequence[Mapping[str, Any]]

TOOLS: Sequence[Mapping[str, Any]] = (
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
