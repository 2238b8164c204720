"""The turns of a conversation in the shapes of all formats, with their tool calls, and the tools of a row."""

from __future__ import annotations

import ast
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final, TypeAlias

from bp_data.columns import ANSWERS, Columns, fold
from bp_data.errors import RowFault, RowFaultError
from bp_data.example import Message, Role
from bp_data.json_text import JsonFaultError, load_json, name_type
from bp_runs.wording import setting_ref

_Data: TypeAlias = Mapping[str, Any]

ROLES: Final[Mapping[str, Role]] = {
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(("user", "human", "prompter"), "user"),
    **dict.fromkeys(("assistant", "gpt", "model", "chatgpt", "bot", "ai", "bing", "bard", "agent"), "assistant"),
    **dict.fromkeys(("tool", "function", "observation", "function_response", "tool_response", "ipython"), "tool"),
}
"""Names that data sets give to the four roles; ShareGPT's ``function_call`` is an assistant's turn as well."""


_ROLE_KEYS: Final = ("role", "from", "speaker", "author")
_CONTENT_KEYS: Final = ("content", "value", "text", "message")
# Whether a turn is learned: OpenAI's weight, Axolotl's train and training, ms-swift's loss.
_FLAGS: Final = ("weight", "train", "training", "loss")
# Fields of a turn that become its role, content and flag; the others reach the template as they are.
_CORE_FIELDS = frozenset({*_ROLE_KEYS[:2], *_CONTENT_KEYS[:2], *_FLAGS, "function_call", "tool_calls"})
_EXCHANGES: Final = (*ANSWERS.items(), ("human", ("assistant", "gpt", "bot")))


def read_turns(data: Columns, name: str) -> list[Message]:
    """A column that is a list of turns, or JSON text of one."""
    value = data[name]
    if isinstance(value, str):
        value = unpack_list(value) or value
    if not isinstance(value, list):
        raise RowFaultError(RowFault.FIELD_TYPE, f"`{name}` is {name_type(value)}, not a list")
    return _read_all(data, value, name)


def read_side(data: Columns, name: str, role: Role) -> list[Message]:
    """A column that is a text, the one turn of ``role``, or a list of turns."""
    value = data[name]
    if isinstance(value, str):
        value = unpack_turns(value) or value
    if isinstance(value, str):
        return [Message(role, value)]
    if isinstance(value, dict):
        value = [value]
    if not isinstance(value, list):
        raise RowFaultError(RowFault.FIELD_TYPE, f"`{name}` is {name_type(value)}, not a text or a list of turns")
    return _read_all(data, value, name)


def unpack_turns(text: str) -> list[Any] | None:
    """The turns that a text holds as JSON, or as Python prints a list; None where it is any other text."""
    found = unpack_list(text) if text.lstrip()[:2] in ("[{", "[ ", "[\n") else None
    if found and all(isinstance(turn, dict) and any(key in turn for key in _ROLE_KEYS) for turn in found):
        return found
    return None


def unpack_list(text: str) -> list[Any] | None:
    """The list that a text holds as JSON, or as Python prints it; None where it is any other text."""
    try:
        found = load_json(text)
    except JsonFaultError as fault:
        if fault.code is RowFault.DUPLICATE_KEYS:
            raise RowFaultError(fault.code, fault.reason) from fault
        try:
            found = ast.literal_eval(text.strip())
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            return None
    return found if isinstance(found, list) else None


def _read_all(data: Columns, turns: Iterable[Any], name: str) -> list[Message]:
    found: list[Message] = []
    mapped = data.options.columns
    for place, turn in enumerate(turns):
        if plain := _read_plain(turn, mapped):
            found.append(plain)
        else:
            found += _read_turn(turn, f"{name}[{place}]", mapped)
    return found


def _read_plain(turn: Any, mapped: Mapping[str, str]) -> Message | None:
    """A turn with a role and a text alone, as nearly all are; None for any other, which `_read_turn` reads."""
    if type(turn) is dict and len(turn) == 2:
        role, content = turn.get("role") or turn.get("from"), turn.get("content") or turn.get("value")
        if type(role) is str and type(content) is str and role not in mapped and role in ROLES:
            return Message(ROLES[role], content)
    return None


def _read_turn(turn: Any, where: str, mapped: Mapping[str, str]) -> list[Message]:
    """The messages of a turn: one, or a question and its answer."""
    if not isinstance(turn, dict):
        raise RowFaultError(RowFault.FIELD_TYPE, f"`{where}` is {name_type(turn)}, not an object")
    if not any(key in turn for key in _ROLE_KEYS):
        turn = {str(name).lower(): value for name, value in turn.items()}
    if not any(key in turn for key in _ROLE_KEYS) and (exchange := _read_exchange(turn)):
        return exchange
    role_key, content_key = _first_key(turn, _ROLE_KEYS), _first_key(turn, _CONTENT_KEYS)
    name, content = turn.get(role_key), turn.get(content_key)
    if isinstance(name, str) and fold(name) in ("function_call", "tool_call"):
        return [Message("assistant", None, {"tool_calls": [_read_call(unpack_json(content, where), where)]})]
    role = _find_role(name, mapped)
    if role is None:
        raise RowFaultError(
            RowFault.ROLE_UNKNOWN,
            f"`{where}` has the role {shorten(name)}; known are system, user, assistant, tool and their usual names",
            fix=_role_fix(name),
        )
    if turn.get("function_call"):
        reason = f"`{where}.function_call` is the old form; name it in `tool_calls`"
        raise RowFaultError(RowFault.FIELD_UNSUPPORTED, reason)
    used = {*_CORE_FIELDS, role_key, content_key}
    fields = {key: value for key, value in turn.items() if key not in used and value is not None}
    if turn.get("tool_calls"):
        fields["tool_calls"] = read_calls(turn["tool_calls"], where)
    return [Message(role, _join_content(content, where), fields, learn=_read_flag(turn, where, role))]


# Words in the names of roles that ask.
_ASKING: Final = ("question", "instruct", "query", "prompt", "input", "customer", "client", "caller", "student")


def _role_fix(name: Any) -> str | None:
    if not isinstance(name, str) or not name.strip():
        return None
    role = "user" if any(word in name.lower() for word in _ASKING) else "assistant"
    return f"Say which role it is: {setting_ref('data.columns', f'{name}={role}')}"


def _find_role(name: Any, mapped: Mapping[str, str]) -> Role | None:
    return ROLES.get(mapped.get(name) or name.strip().lower()) if isinstance(name, str) else None


def _read_exchange(turn: _Data) -> list[Message]:
    """A question and its answer in one object, as Capybara's ``input`` and ``output``."""
    for asked, answers in _EXCHANGES:
        answered = next((name for name in answers if isinstance(turn.get(name), str)), None)
        if answered and isinstance(turn.get(asked), str):
            return [Message("user", turn[asked]), Message("assistant", turn[answered])]
    return []


def _first_key(turn: _Data, keys: Sequence[str]) -> str:
    return next((key for key in keys if turn.get(key) is not None), "")


def _read_flag(turn: _Data, where: str, role: Role) -> bool:
    """Whether a turn is to be learned, by its own flag; only the assistant's turns can be."""
    learn = True
    for name in _FLAGS:
        value = turn.get(name)
        if value is None:
            continue
        if value not in (0, 1):
            reason = f"`{where}.{name}` is {shorten(value)}; a turn is learned whole (1, true) or not at all (0, false)"
            raise RowFaultError(RowFault.FIELD_UNSUPPORTED, reason)
        if value and role != "assistant" and name != "weight":
            reason = f"`{where}.{name}` wants the words of the {role} to be learned; only the assistant's are"
            raise RowFaultError(RowFault.FIELD_UNSUPPORTED, reason)
        learn = learn and bool(value)
    return learn or role != "assistant"


def _join_content(content: Any, where: str) -> str | None:
    """A turn's text; a list of text parts is joined, and a picture or sound is rejected."""
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


def read_calls(calls: Any, where: str) -> list[dict[str, Any]]:
    """Tool calls in OpenAI's shape, with ``arguments`` as an object."""
    if not isinstance(calls, list):
        raise RowFaultError(RowFault.TOOL_CALL_BROKEN, f"`{where}.tool_calls` is {name_type(calls)}, not a list")
    return [_read_call(call, f"{where}.tool_calls[{place}]") for place, call in enumerate(calls)]


def _read_call(call: Any, where: str) -> dict[str, Any]:
    function = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise RowFaultError(RowFault.TOOL_CALL_BROKEN, f"`{where}` names no function")
    # OpenAI writes the arguments as JSON in a text; templates write them as JSON themselves and want the object.
    arguments = unpack_json(function.get("arguments") or {}, where)
    if not isinstance(arguments, dict):
        raise RowFaultError(
            RowFault.TOOL_CALL_BROKEN, f"the arguments of `{where}` are {name_type(arguments)}, not an object"
        )
    # Fields keep the row's own order: some templates write a whole call as JSON.
    outer: dict[str, Any] = dict(call) if function is not call else {}
    return {**({} if "type" in outer else {"type": "function"}), **outer} | {
        "function": {**function, "arguments": arguments}
    }


def unpack_json(value: Any, where: str) -> Any:
    """A value, or what its text holds as JSON."""
    if not isinstance(value, str):
        return value
    try:
        return load_json(value or "{}")
    except JsonFaultError as fault:
        code = fault.code if fault.code is RowFault.DUPLICATE_KEYS else RowFault.TOOL_CALL_BROKEN
        raise RowFaultError(code, f"`{where}`: {fault.reason}") from fault


def read_tools(data: Columns) -> tuple[dict[str, Any], ...] | None:
    """The row's tools, as they are; None where there are none."""
    tools = unpack_json(data.get("tools"), "tools")
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


def shorten(value: Any) -> str:
    """A value as it is named in a reason."""
    if isinstance(value, bool | int | float):
        return str(value).lower()
    if not isinstance(value, str):
        return name_type(value)
    return repr(value) if len(value) <= 40 else f"{value[:37]!r}…"
