"""The texts of a chat, one leaf each, and the same chat with placeholders in their stead.

A chat whose leaves are placeholders shows what a template does with each: where it is written, how often, or not at
all. Blanks around a text, ``<think>`` marks, keys, booleans and JSON-schema words stay as they are, since templates
branch on them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final, Literal, TypeAlias

from bp_data.example import REASONING_FIELDS, Chat, Message

Kind: TypeAlias = Literal["text", "thought", "call", "argument", "id", "name", "tool", "description"]
Value: TypeAlias = str | int | float
Pick: TypeAlias = Callable[[int, Kind], bool]
"""Whether leaves of a turn (-1: the tools) and of a kind are replaced."""

OWN: Final[frozenset[Kind]] = frozenset({"text", "thought", "call", "argument"})
"""What an assistant's turn says; an id is the caller's bookkeeping, which some templates write and others don't."""
REQUIRED: Final[frozenset[Kind]] = OWN | {"tool"}
"""What a template must write somewhere: nobody may believe that a model was trained on what it never saw."""

# Letters and digits only, so that no template escapes, trims or splits them, and of one length, so that none of them
# begins another.
_MARK: Final = "Zq{:05d}qZ"
_NUMBER: Final = 91_827_000_000
MARKS: Final = re.compile(r"Zq\d{5}qZ|918270\d{5}(?:\.5)?|Zi\d{4,}")
# How templates write a value: as it is, as JSON without its quotes, as Python does.
WRITERS: Final[tuple[Callable[[Value], str], ...]] = (
    str,
    lambda value: json.dumps(value, ensure_ascii=False)[1:-1] if isinstance(value, str) else json.dumps(value),
    lambda value: json.dumps(value)[1:-1] if isinstance(value, str) else json.dumps(value),
    lambda value: repr(value)[1:-1] if isinstance(value, str) else repr(value),
)
# A whole text in a tag: Qwen's templates take a user's <tool_response> for a tool's turn.
_TAGGED: Final = re.compile(r"(<\w+>\s*)(.*?)(\s*</\w+>)", re.DOTALL)
_THOUGHT: Final = re.compile(r"(\s*(?:<think>)?\s*)(.*?)(\s*</think>\s*)(.*?)(\s*)", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Leaf:
    """One text or number of a chat.

    Attributes:
        turn: Place of its message; -1 for tools.
        kind: What it is.
        value: As in the row, without the blanks around a text.
        mark: Its placeholder, as rendered.
    """

    turn: int
    kind: Kind
    value: Value
    mark: str


@dataclass(slots=True)
class Outline:
    """A chat with placeholders.

    Attributes:
        messages, tools: As `ChatTemplate.render` takes them.
        leaves: All leaves of the chat, replaced or not, in order.
        replaced: Those that are placeholders here.
    """

    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None
    leaves: list[Leaf] = field(default_factory=list)
    replaced: list[Leaf] = field(default_factory=list)


def replace_leaves(chat: Chat, pick: Pick | None = None) -> Outline:
    """The chat with placeholders for the leaves that ``pick`` names; None: for all."""
    return _Replacer(chat, pick).outline


def to_outline(chat: Chat) -> Outline:
    """The chat as it is."""
    tools = None if chat.tools is None else [dict(tool) for tool in chat.tools]
    return Outline([message.to_dict() for message in chat.messages], tools)


class _Replacer:
    def __init__(self, chat: Chat, pick: Pick | None) -> None:
        self._pick = pick
        self._ids: dict[str, str] = {}
        self._calls: dict[str, str] = {}
        self.outline = Outline([], None)
        if chat.tools is not None:
            self.outline.tools = [self._tool(tool) for tool in chat.tools]
        for place, message in enumerate(chat.messages):
            self.outline.messages.append(self._message(place, message))

    def _message(self, place: int, message: Message) -> dict[str, Any]:
        turn: dict[str, Any] = {"role": message.role, "content": message.content}
        assistant = message.role == "assistant"
        for name, value in message.fields.items():
            if name == "tool_calls" and assistant and isinstance(value, list):
                continue
            if name in REASONING_FIELDS and assistant and isinstance(value, str):
                turn[name] = self._core(place, "thought", value)
            elif name in ("id", "tool_call_id") and isinstance(value, str):
                turn[name] = self._id(place, value)
            elif name == "name" and isinstance(value, str):
                turn[name] = self._leaf(place, "name", value)
            else:
                turn[name] = value
        # In the order in which templates write them: thought, words, calls.
        if message.content is not None:
            turn["content"] = self._content(place, message.content, assistant=assistant)
        if message.tool_calls and assistant:
            turn["tool_calls"] = [self._call(place, call) for call in message.tool_calls]
        return turn

    def _content(self, place: int, content: str, *, assistant: bool) -> str:
        if assistant and content.count("</think>") == 1 and (found := _THOUGHT.fullmatch(content)):
            opened, thought, closed, words, blanks = found.groups()
            if "<think>" not in thought + words:
                thought = self._core(place, "thought", thought)
                return opened + thought + closed + self._core(place, "text", words) + blanks
        if not assistant and (found := _TAGGED.fullmatch(content)):
            return found[1] + self._core(place, "text", found[2]) + found[3]
        return self._core(place, "text", content)

    def _core(self, place: int, kind: Kind, text: str) -> str:
        core = text.strip()
        if not core:
            return text
        before, _, after = text.partition(core) if len(core) < len(text) else ("", "", "")
        return f"{before}{self._leaf(place, kind, core)}{after}"

    def _call(self, place: int, call: Mapping[str, Any]) -> dict[str, Any]:
        function = call.get("function", call)
        name = str(function.get("name", ""))
        changed = {**function, "name": self._leaf(place, "call", name)}
        self._calls = {name: changed["name"]}
        if "arguments" in function:
            changed["arguments"] = self._values(place, "argument", function["arguments"])
        found = {key: self._id(place, value) if key == "id" else value for key, value in call.items()}
        return {**found, "function": changed} if "function" in call else changed

    def _values(self, place: int, kind: Kind, value: Any) -> Any:
        if isinstance(value, dict):
            return {key: self._values(place, kind, item) for key, item in value.items()}
        if isinstance(value, list):
            return [self._values(place, kind, item) for item in value]
        if isinstance(value, str):
            return self._core(place, kind, value)
        return self._leaf(place, kind, value) if isinstance(value, int | float) else value

    def _tool(self, tool: Mapping[str, Any]) -> dict[str, Any]:
        function = tool.get("function", tool)
        if not isinstance(function, dict):
            return dict(tool)
        changed = {key: self._described(value, key) for key, value in function.items()}
        changed["name"] = self._leaf(-1, "tool", str(function.get("name", "")))
        return {**tool, "function": changed} if "function" in tool else changed

    def _described(self, value: Any, key: str = "") -> Any:
        """A JSON schema with its descriptions replaced."""
        if isinstance(value, dict):
            return {name: self._described(item, name) for name, item in value.items()}
        if isinstance(value, list):
            return [self._described(item) for item in value]
        return self._leaf(-1, "description", value) if key == "description" and isinstance(value, str) else value

    def _id(self, place: int, value: Any) -> Any:
        """An id of the same length for each id, since some templates check it; short ones stay.

        Kimi's ids name the call, as in ``functions.weather:0``, and its template writes the id alone.
        """
        if not isinstance(value, str) or len(value) < 6:
            return value
        for name, mark in self._calls.items():
            if name and name in value and value not in self._ids:
                self._ids[value] = value.replace(name, mark)
        if value not in self._ids:
            self._ids[value] = f"Zi{len(self._ids) + 1:0{len(value) - 2}d}"
        shown = self._ids[value]
        return self._add(Leaf(place, "id", value, shown), value) if shown.startswith("Zi") else shown

    def _leaf(self, place: int, kind: Kind, value: str | float) -> Any:
        number = len(self.outline.leaves)
        if isinstance(value, bool) or value == "":
            return value
        if isinstance(value, str):
            return self._add(Leaf(place, kind, value, _MARK.format(number)), value)
        other = _NUMBER + number + (0.5 if isinstance(value, float) else 0)
        shown = self._add(Leaf(place, kind, value, str(other)), value)
        return shown if shown is value else other

    def _add(self, leaf: Leaf, value: Any) -> Any:
        self.outline.leaves.append(leaf)
        if self._pick is not None and not self._pick(leaf.turn, leaf.kind):
            return value
        self.outline.replaced.append(leaf)
        return leaf.mark
