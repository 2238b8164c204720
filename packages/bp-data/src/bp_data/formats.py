"""What a row means: the format is found for each row by its columns, and nothing in it is dropped in silence.

    messages                              OpenAI: role, content, tool_calls; beside it tools
    conversations                         ShareGPT: from/value or role/content; beside it system, tools
    instruction, output [input]           Alpaca; beside it system, history
    chosen, rejected [prompt]             preference: texts or lists of turns; the prompt may be in both answers
    prompt, completion, label             KTO: label is true or false, 1 or 0
    prompt, completion                    one question, one answer; texts or lists of turns, the prompt's only read
    question, answer
    instruction, response [context]
    text                                  raw text, trained on whole

A column whose value is null counts as absent, so rows of a table that mixes formats are fine. The first format above
whose columns are all there is taken; columns that no format knows (id, source …) are left aside. Where a method wants
one kind of row, formats of that kind are looked for first, and a row of another kind is refused.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any, Final, Literal, TypeAlias

import orjson

from bp_data.errors import RowFault, RowFaultError
from bp_data.example import Chat, Example, Judged, Message, Preference, Rejected, Role, Row, Text
from bp_data.read import name_type

_Data: TypeAlias = Mapping[str, Any]
Wanted: TypeAlias = Literal["sft", "preference", "kto"]
"""What kind of row a method trains on."""

ROLES: Final[Mapping[str, Role]] = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "model": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
    "function_response": "tool",
}
"""Names that data sets give to the four roles; ShareGPT's ``function_call`` is an assistant's turn as well."""

# Fields of a turn that become its role and content; the others reach the template as they are.
_CORE_FIELDS = frozenset({"role", "from", "content", "value", "weight", "function_call", "tool_calls"})


def parse_row(row: Row, wanted: Wanted | None = None) -> Example | Rejected:
    """The row as an `Example`, or why it is none; whatever the fields hold, nothing else is raised.

    Args:
        row: A row as read.
        wanted: ``sft`` takes a `Chat` or `Text`, ``preference`` a `Preference`, ``kto`` a `Judged`; None takes all.
    """
    data = {name: value for name, value in row.data.items() if value is not None}
    try:
        return _reader(data, wanted)(data)
    except RowFaultError as fault:
        return Rejected(row.number, fault.code, fault.reason, row.source)


def _reader(data: _Data, wanted: Wanted | None) -> Callable[[_Data], Example]:
    fitting = [(kind, read) for kind, columns, read in _FORMATS if all(name in data for name in columns)]
    if "label" in data and not is_label(data["label"]):
        fitting = [(kind, read) for kind, read in fitting if kind != "kto"]
    if not fitting:
        seen = ", ".join(sorted(map(str, data))) or "none"
        known = "; ".join(" + ".join(columns) for _, columns, _ in _FORMATS)
        raise RowFaultError(RowFault.COLUMNS_UNKNOWN, f"columns seen: {seen}; known are: {known}")
    for kind, read in fitting:
        # A judged answer is no example to follow: it may be a bad one.
        if wanted == "sft" and kind == "kto":
            break
        if wanted in (None, kind):
            return read
    kind = fitting[0][0]
    raise RowFaultError(
        RowFault.WRONG_KIND, f"it is a row for {_METHODS[kind]}, and one for {_METHODS[wanted]} is wanted"
    )


def _read_messages(data: _Data) -> Chat:
    if data.get("functions"):
        raise RowFaultError(RowFault.FIELD_UNSUPPORTED, "`functions` is the old form; name them in `tools`")
    turns = [_read_turn(turn, f"messages[{place}]") for place, turn in enumerate(_list(data, "messages"))]
    return _chat(turns, _read_tools(data))


def _read_conversations(data: _Data) -> Chat:
    turns = [_read_turn(turn, f"conversations[{place}]") for place, turn in enumerate(_list(data, "conversations"))]
    system = _optional_text(data, "system")
    if system:
        if turns and turns[0].role == "system" and turns[0].content != system:
            raise RowFaultError(
                RowFault.FIELD_UNSUPPORTED, "`system` and the first turn are two different system prompts"
            )
        if not turns or turns[0].role != "system":
            turns.insert(0, Message("system", system))
    return _chat(turns, _read_tools(data))


def _read_completion(data: _Data) -> Chat:
    prompt = read_turns(data, "prompt", "user")
    completion = read_turns(data, "completion", "assistant")
    turns = [*_read_history(data), *prompt]
    if isinstance(data["prompt"], str):
        return _chat([*_system_turn(data), *turns, *completion])
    chat = _chat([*_system_turn(data), *turns, *completion], _read_tools(data))
    return Chat(chat.messages, chat.tools, len(chat.messages) - len(completion))


def _read_judged(data: _Data) -> Judged:
    chat = _read_completion(data)
    judged = Chat(
        chat.messages, chat.tools, chat.first or len(chat.messages) - len(read_turns(data, "completion", "assistant"))
    )
    return Judged(judged, str(data["label"]).lower() in ("true", "1"))


def is_label(value: Any) -> bool:
    """Whether a value says good or bad: true, false, 1, 0, also written as texts."""
    return value in (True, False) if isinstance(value, bool | int) else str(value).strip().lower() in _LABELS


_LABELS = ("true", "false", "1", "0")


def _read_preference(data: _Data) -> Preference:
    given = read_turns(data, "prompt", "user") if "prompt" in data else []
    answers = [_read_answer(data, name, spoken=not given) for name in ("chosen", "rejected")]
    if given and all(answer[: len(given)] == given and len(answer) > len(given) for answer in answers):
        answers = [answer[len(given) :] for answer in answers]
    shared = _shared_turns(*answers)
    prompt = [*_system_turn(data), *given, *answers[0][:shared]]
    chosen, rejected = (answer[shared:] for answer in answers)
    if chosen == rejected:
        raise RowFaultError(RowFault.SAME_ANSWERS, "`chosen` and `rejected` are the same")
    for answer in (chosen, rejected):
        _chat([*prompt, *answer])
        if not any(turn.role == "assistant" for turn in answer):
            raise RowFaultError(RowFault.NO_ANSWER, "an answer has no turn of the assistant")
    if not prompt:
        raise RowFaultError(RowFault.EMPTY_TURN, "there is no prompt, and the two answers share none")
    return Preference(tuple(prompt), tuple(chosen), tuple(rejected), _read_tools(data))


def _read_answer(data: _Data, name: str, *, spoken: bool) -> list[Message]:
    value = data[name]
    if isinstance(value, str) and spoken:
        turns = _split_spoken(value)
        if not turns:
            raise RowFaultError(RowFault.FIELD_TYPE, f"`{name}` is a text, and there is no `prompt` beside it")
        return turns
    return read_turns(data, name, "assistant")


# How dialogues are written in one text: a line that begins with who speaks.
_SPEAKER = re.compile(r"(?:^|\n\n)(Human|Assistant): ?")


def _split_spoken(text: str) -> list[Message]:
    before, *parts = _SPEAKER.split(text)
    if before.strip():
        return []
    pairs = zip(parts[::2], parts[1::2], strict=True)
    return [Message("user" if who == "Human" else "assistant", said.strip()) for who, said in pairs]


def _shared_turns(left: list[Message], right: list[Message]) -> int:
    """Turns that both answers begin with and that are the prompt; an answer keeps at least its last turn."""
    most = min(len(left), len(right)) - 1
    return next((place for place in range(most) if left[place] != right[place]), max(most, 0))


def read_turns(data: _Data, name: str, role: Role) -> list[Message]:
    """A field that is a text, the one turn of ``role``, or a list of turns."""
    value = data[name]
    if isinstance(value, str):
        return [Message(role, value)]
    if isinstance(value, dict):
        value = [value]
    if not isinstance(value, list):
        raise RowFaultError(RowFault.FIELD_TYPE, f"`{name}` is {name_type(value)}, not a text or a list of turns")
    return [_read_turn(turn, f"{name}[{place}]") for place, turn in enumerate(value)]


def _system_turn(data: _Data) -> list[Message]:
    system = _optional_text(data, "system")
    return [Message("system", system)] if system else []


def _pair_reader(asked: str, answered: str, *more: str) -> Callable[[_Data], Chat]:
    """A reader of rows with one question and one answer; ``more`` are fields that continue the question."""

    def read(data: _Data) -> Chat:
        question = "\n\n".join(filter(None, [_text(data, asked), *(_optional_text(data, name) for name in more)]))
        turns = [*_read_history(data), Message("user", question), Message("assistant", _text(data, answered))]
        return _chat([*_system_turn(data), *turns])

    return read


def _read_history(data: _Data) -> list[Message]:
    turns: list[Message] = []
    for place, pair in enumerate(_list(data, "history") if data.get("history") else []):
        if not isinstance(pair, list) or len(pair) != 2 or not all(isinstance(side, str) for side in pair):
            raise RowFaultError(RowFault.FIELD_TYPE, f"`history[{place}]` is not a pair of texts")
        turns += [Message("user", pair[0]), Message("assistant", pair[1])]
    return turns


def _read_text(data: _Data) -> Text:
    text = _text(data, "text")
    if not text.strip():
        raise RowFaultError(RowFault.EMPTY_TURN, "`text` is empty")
    return Text(text)


_FORMATS: Final[tuple[tuple[Wanted, tuple[str, ...], Callable[[_Data], Example]], ...]] = (
    ("sft", ("messages",), _read_messages),
    ("sft", ("conversations",), _read_conversations),
    ("sft", ("instruction", "output"), _pair_reader("instruction", "output", "input")),
    ("preference", ("chosen", "rejected"), _read_preference),
    ("kto", ("prompt", "completion", "label"), _read_judged),
    ("sft", ("prompt", "completion"), _read_completion),
    ("sft", ("question", "answer"), _pair_reader("question", "answer")),
    ("sft", ("instruction", "response"), _pair_reader("instruction", "response", "input", "context")),
    ("sft", ("text",), _read_text),
)
_METHODS: Final[Mapping[Wanted | None, str]] = {
    "sft": "sft",
    "preference": "dpo, orpo or simpo",
    "kto": "kto",
    None: "any",
}


def _read_turn(turn: Any, where: str) -> Message:
    if not isinstance(turn, dict):
        raise RowFaultError(RowFault.FIELD_TYPE, f"`{where}` is {name_type(turn)}, not an object with role and content")
    name = turn.get("from") if turn.get("role") is None else turn["role"]
    content = turn.get("value") if turn.get("content") is None else turn["content"]
    if name == "function_call":
        return Message("assistant", None, {"tool_calls": [_sharegpt_call(content, where)]})
    role = ROLES.get(name.strip().lower()) if isinstance(name, str) else None
    if role is None:
        raise RowFaultError(
            RowFault.ROLE_UNKNOWN, f"`{where}` has the role {_short(name)}; known are {', '.join(ROLES)}"
        )
    _refuse_unsupported(turn, where)
    fields = {key: value for key, value in turn.items() if key not in _CORE_FIELDS and value is not None}
    if turn.get("tool_calls"):
        fields["tool_calls"] = _read_calls(turn["tool_calls"], where)
    return Message(role, _join_content(content, where), fields)


def _refuse_unsupported(turn: _Data, where: str) -> None:
    if turn.get("function_call"):
        raise RowFaultError(
            RowFault.FIELD_UNSUPPORTED, f"`{where}.function_call` is the old form; name it in `tool_calls`"
        )
    weight = turn.get("weight")
    if weight is not None and weight != 1:
        reason = f"`{where}.weight` is {_short(weight)}; leaving single turns out of the loss is not possible yet"
        raise RowFaultError(RowFault.FIELD_UNSUPPORTED, reason)


def _join_content(content: Any, where: str) -> str | None:
    """A turn's text; a list of text parts is joined, and a picture or sound is refused."""
    if content is None or isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise RowFaultError(RowFault.FIELD_TYPE, f"the content of `{where}` is {name_type(content)}, not a text")
    texts = [
        part if isinstance(part, str) else part.get("text") if isinstance(part, dict) else None for part in content
    ]
    for place, text in enumerate(texts):
        if not isinstance(text, str):
            raise RowFaultError(RowFault.FIELD_UNSUPPORTED, f"part {place} of the content of `{where}` is not a text")
    return "".join(text for text in texts if text)


def _read_calls(calls: Any, where: str) -> list[dict[str, Any]]:
    if not isinstance(calls, list):
        raise RowFaultError(RowFault.TOOL_CALL_BROKEN, f"`{where}.tool_calls` is {name_type(calls)}, not a list")
    return [_read_call(call, f"{where}.tool_calls[{place}]") for place, call in enumerate(calls)]


def _read_call(call: Any, where: str) -> dict[str, Any]:
    function = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise RowFaultError(RowFault.TOOL_CALL_BROKEN, f"`{where}` names no function")
    # OpenAI writes the arguments as JSON in a text; templates write them as JSON themselves and want the object.
    arguments = _unpack(function.get("arguments") or {}, where)
    if not isinstance(arguments, dict):
        raise RowFaultError(
            RowFault.TOOL_CALL_BROKEN, f"the arguments of `{where}` are {name_type(arguments)}, not an object"
        )
    outer = call if function is not call else {}
    return {"type": "function", **outer, "function": {**function, "arguments": arguments}}


def _sharegpt_call(value: Any, where: str) -> dict[str, Any]:
    return _read_call(_unpack(value, where), where)


def _unpack(value: Any, where: str) -> Any:
    if not isinstance(value, str):
        return value
    try:
        return orjson.loads(value or "{}")
    except (orjson.JSONDecodeError, UnicodeEncodeError) as error:
        raise RowFaultError(RowFault.TOOL_CALL_BROKEN, f"`{where}` holds broken JSON: {error}") from error


def _read_tools(data: _Data) -> tuple[dict[str, Any], ...] | None:
    tools = _unpack(data.get("tools"), "tools")
    if not tools:
        return None
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise RowFaultError(RowFault.TOOL_CALL_BROKEN, "`tools` is not a list of objects")
    for place, tool in enumerate(tools):
        if not tool_name(tool):
            raise RowFaultError(RowFault.TOOL_CALL_BROKEN, f"`tools[{place}]` has no name")
    return tuple(tools)


def tool_name(tool: Mapping[str, Any]) -> str:
    """The name of a tool, or of a call, in OpenAI's shape or a bare one; empty where it has none."""
    function = tool.get("function", tool)
    name = function.get("name") if isinstance(function, dict) else None
    return name if isinstance(name, str) else ""


def _chat(turns: list[Message], tools: tuple[dict[str, Any], ...] | None = None) -> Chat:
    for place, turn in enumerate(turns, start=1):
        if turn.role in ("user", "assistant") and not turn.words and not turn.tool_calls:
            raise RowFaultError(RowFault.EMPTY_TURN, f"turn {place} ({turn.role}) is empty")
    if not any(turn.role == "assistant" for turn in turns):
        raise RowFaultError(RowFault.NO_ANSWER, "no turn is the assistant's")
    return Chat(tuple(turns), tools)


def _list(data: _Data, name: str) -> list[Any]:
    value = data[name]
    if not isinstance(value, list):
        raise RowFaultError(RowFault.FIELD_TYPE, f"`{name}` is {name_type(value)}, not a list")
    return value


def _text(data: _Data, name: str) -> str:
    value = data[name]
    if not isinstance(value, str):
        raise RowFaultError(RowFault.FIELD_TYPE, f"`{name}` is {name_type(value)}, not a text")
    return value


def _optional_text(data: _Data, name: str) -> str:
    return _text(data, name) if name in data else ""


def _short(value: Any) -> str:
    if not isinstance(value, str):
        return name_type(value)
    return repr(value) if len(value) <= 40 else f"{value[:37]!r}…"
