"""What a row means: the format is found for each row by its columns, and nothing in it is dropped in silence.

    messages                              OpenAI: role, content, tool_calls; next to it tools, system
    conversations                         ShareGPT: from/value, or Capybara's input/output; next to it tools, system
    chosen, rejected [prompt]             preference: texts or lists of turns; the prompt may be in both answers
    a question, an answer, label          KTO: label is true or false, 1 or 0, yes or no
    a question, an answer                 texts; as prompt and completion also lists of turns, the prompt's only read
    query, answers, tools                 xLAM: the answers are tool calls
    text                                  raw text, learned whole

A question is one of `columns.QUESTIONS`, or several that continue each other, with `columns.CONTEXTS` after it; its
answer is the first of `columns.ANSWERS` that the row has. Next to it may be system and history. Names are known without
regard to capitals, and a user may map others (`ReadOptions`).

A column whose value is null counts as absent, so rows of a table that mixes formats are fine. The first format above
whose columns are all there is taken. Columns that no format reads are counted by `columns.FieldLedger`. Where a method
wants one kind of row, formats of that kind are looked for first, and a row of another kind is rejected.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Final, Literal, TypeAlias

from bp_data.columns import (
    ANSWERS,
    CONTEXTS,
    MEDIA,
    PLAIN,
    QUESTIONS,
    Columns,
    FieldLedger,
    ReadOptions,
    columns_ref,
    propose_columns,
)
from bp_data.errors import RowFault, RowFaultError
from bp_data.example import Chat, Example, Judged, Message, Preference, Rejected, Row, Text
from bp_data.json_text import name_type
from bp_data.turns import read_calls, read_side, read_tools, read_turns, shorten, unpack_json, unpack_list, unpack_turns
from bp_runs.wording import setting_ref

Wanted: TypeAlias = Literal["sft", "preference", "kto"]
"""What kind of row a method trains on."""

_METHODS: Final = {"sft": "sft", "preference": "dpo, orpo or simpo", "kto": "kto"}
_LABELS: Final[Mapping[str, bool]] = {
    **dict.fromkeys(("true", "1", "1.0", "yes", "y", "t", "good", "chosen", "desirable"), True),
    **dict.fromkeys(("false", "0", "0.0", "-1", "-1.0", "no", "n", "f", "bad", "rejected", "undesirable"), False),
    # Excel writes truth values in the language of its user.
    **dict.fromkeys(("wahr", "vrai", "verdadero", "vero", "verdadeiro", "waar", "prawda"), True),
    **dict.fromkeys(("falsch", "faux", "falso", "onwaar", "fałsz"), False),
}


def parse_row(
    row: Row, wanted: Wanted | None = None, options: ReadOptions = PLAIN, fields: FieldLedger | None = None
) -> Example | Rejected:
    """The row as an `Example`, or why it is none; whatever the fields hold, nothing else is raised.

    Args:
        row: A row as read.
        wanted: ``sft`` takes a `Chat` or `Text`, ``preference`` a `Preference`, ``kto`` a `Judged`; None takes all.
        options: Which columns and roles are mapped, and which columns are left aside on purpose.
        fields: Counts which columns were read and which were left aside.
    """
    data = Columns(row.data, options)
    try:
        example = _choose_format(data, wanted)(data)
    except RowFaultError as fault:
        return Rejected(row.number, fault.code, fault.reason, row.source, fix=fault.fix)
    if fields is not None:
        messages = _messages_of(example)
        texts = [example.text] if isinstance(example, Text) else [m.content for m in messages if m.content]
        fields.take(data, texts, [name for m in messages for name in m.fields])
    return example


def _messages_of(example: Example) -> Sequence[Message]:
    if isinstance(example, Preference):
        return (*example.prompt, *example.chosen, *example.rejected)
    return () if isinstance(example, Text) else (example.chat if isinstance(example, Judged) else example).messages


def _choose_format(data: Columns, wanted: Wanted | None) -> Callable[[Columns], Example]:
    if media := [name for name in MEDIA if data.get(name)]:
        name = data.names[media[0]]
        raise RowFaultError(
            RowFault.FIELD_UNSUPPORTED,
            f"the column {name!r} holds media, and only text is trained on",
            fix=f"Train on the text alone: {setting_ref('data.ignore_columns', name)}",
        )
    first: Wanted | None = None
    for kind, fits, read in _FORMATS:
        if not fits(data):
            continue
        if read is _read_text and first is None:
            _reject_lone_message(data)
        first = first or kind
        if wanted in (None, kind):
            return read
        # A judged answer is no example to follow: it may be a bad one.
        if wanted == "sft" and kind == "kto":
            break
    if first is None:
        _reject_lone_message(data)
        raise _unknown_columns(data)
    if wanted == "kto" and "label" in data and _find_pair(data):
        reason = f"`label` is {shorten(data['label'])}; a label is true or false, 1 or 0, yes or no"
        raise RowFaultError(RowFault.FIELD_TYPE, reason)
    found, needed = _METHODS[first], _METHODS[wanted or "sft"]
    raise RowFaultError(RowFault.WRONG_KIND, f"it is a row for {found}, and this run trains {needed}")


def _unknown_columns(data: Columns) -> RowFaultError:
    seen = sorted(data.names.values())
    reason = (
        f"columns seen: {', '.join(seen) or 'none'}; there is no question with an answer, and neither messages, "
        "conversations, chosen with rejected, nor text"
    )
    mapping = propose_columns(seen)
    fix = f"Say which column is which: {columns_ref(mapping or {'THEIRS': 'question'})}"
    return RowFaultError(RowFault.COLUMNS_UNKNOWN, reason, fix=fix)


def _reject_lone_message(data: Columns) -> None:
    """Reject a row that is one message of a conversation: learned as a document, the user's words would be a target."""
    role = next((name for name in ("role", "from", "speaker", "author") if name in data), None)
    said = next((name for name in ("text", "content", "value", "message") if name in data), None)
    if role and said and isinstance(data[role], str):
        raise RowFaultError(
            RowFault.FIELD_UNSUPPORTED,
            f"the row is one message (`{data.names[role]}` and `{data.names[said]}`), not a whole conversation",
            fix="Join the messages of each conversation into one row with `messages`; some data sets have such a copy.",
        )


def _find_pair(data: Columns) -> tuple[str, str] | None:
    """The columns of the question and of its answer."""
    for asked, answers in ANSWERS.items():
        if asked in data:
            answered = next((name for name in answers if name in data and name != asked), None)
            if answered is not None:
                return asked, answered
    return None


def _is_judged(data: Columns) -> bool:
    return "label" in data and _find_pair(data) is not None and to_label(data["label"]) is not None


def _is_calls(data: Columns) -> bool:
    return "answers" in data and "tools" in data and any(name in data for name in QUESTIONS)


def to_label(value: Any) -> bool | None:
    """Whether a value says good or bad: true, 1, yes, or false, 0, no, also as texts; None: neither."""
    return _LABELS.get(str(value).strip().lower()) if isinstance(value, bool | int | float | str) else None


def _read_messages(data: Columns) -> Chat:
    if data.get("functions"):
        raise RowFaultError(RowFault.FIELD_UNSUPPORTED, "`functions` is the old form; name them in `tools`")
    return _read_chat(data, "messages")


def _read_conversations(data: Columns) -> Chat:
    return _read_chat(data, "conversations")


def _read_chat(data: Columns, name: str) -> Chat:
    return _chat(_with_system(data, read_turns(data, name)), read_tools(data))


def _with_system(data: Columns, turns: list[Message]) -> list[Message]:
    """The turns, after the system prompt of the row's own column where it has one."""
    system = _optional_text(data, "system")
    if not system:
        return turns
    if turns and turns[0].role == "system":
        if turns[0].words != system.strip():
            reason = "`system` and the first turn are two different system prompts"
            raise RowFaultError(RowFault.FIELD_UNSUPPORTED, reason)
        return turns
    return [Message("system", system), *turns]


def _read_pair(data: Columns) -> Chat:
    asked, answered = _find_pair(data) or ("", "")
    question = _read_question(data, asked)
    answer = _read_answer(data, answered)
    is_text = isinstance(data[asked], str) and question == [Message("user", question[0].content)]
    turns = _with_system(data, [*_read_history(data), *question])
    chat = _chat([*turns, *answer], read_tools(data))
    return chat if is_text else replace(chat, first=len(turns))


def _read_judged(data: Columns) -> Judged:
    chat = _read_pair(data)
    answer = _read_answer(data, (_find_pair(data) or ("", ""))[1])
    return Judged(replace(chat, first=len(chat.messages) - len(answer)), bool(to_label(data["label"])))


def _read_question(data: Columns, asked: str) -> list[Message]:
    """The question's turns; one that is a text is continued by the columns of its context."""
    turns = read_side(data, asked, "user")
    more = [_read_context(data, name) for name in CONTEXTS if name in data and name != asked]
    if len(turns) == 1 and isinstance(data[asked], str) and (more := [text for text in more if text.strip()]):
        return [replace(turns[0], content="\n\n".join([turns[0].content or "", *more]))]
    return turns


def _read_context(data: Columns, name: str) -> str:
    value = data[name]
    if name == "choices":
        return "\n".join(f"{letter}. {text}" for letter, text in _list_choices(value))
    if isinstance(value, list) and all(isinstance(part, str) for part in value):
        return "\n\n".join(value)
    return _text(data, name)


def _list_choices(value: Any) -> list[tuple[str, str]]:
    """Letters and texts of choices: a list, or lists of ``label`` and ``text``; in CSV as JSON or Python text."""
    if isinstance(value, str):
        value = unpack_list(value) or value.splitlines()
    letters, texts = [chr(ord("A") + place) for place in range(26)], value
    if isinstance(value, dict) and isinstance(value.get("text"), list):
        letters, texts = value.get("label") or letters, value["text"]
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts) or len(texts) > len(letters):
        raise RowFaultError(RowFault.FIELD_TYPE, "`choices` is neither a list of texts nor has it `label` and `text`")
    return list(zip(map(str, letters), texts, strict=False))


def _read_answer(data: Columns, name: str) -> list[Message]:
    value = data[name]
    if type(value) is int and "choices" in data:  # which of the choices, from 0, as in MMLU
        choices = _list_choices(data["choices"])
        if not 0 <= value < len(choices):
            raise RowFaultError(RowFault.FIELD_TYPE, f"`{name}` is {value}, and there are {len(choices)} choices")
        return [Message("assistant", ". ".join(choices[value]))]
    return read_side(data, name, "assistant")


def _read_history(data: Columns) -> list[Message]:
    turns: list[Message] = []
    for place, pair in enumerate(_list(data, "history") if data.get("history") else []):
        if not isinstance(pair, list) or len(pair) != 2 or not all(isinstance(side, str) for side in pair):
            raise RowFaultError(RowFault.FIELD_TYPE, f"`history[{place}]` is not a pair of texts")
        turns += [Message("user", pair[0]), Message("assistant", pair[1])]
    return turns


def _read_calls_row(data: Columns) -> Chat:
    """xLAM: a question whose answer is a list of calls; its tools describe parameters without JSON Schema's frame."""
    asked = next(name for name in QUESTIONS if name in data)
    calls = read_calls(unpack_json(data["answers"], "answers"), "answers")
    tools = tuple(_to_schema(tool) for tool in read_tools(data) or ())
    answer = Message("assistant", None, {"tool_calls": calls})
    return _chat(_with_system(data, [*_read_question(data, asked), answer]), tools)


def _to_schema(tool: Mapping[str, Any]) -> Mapping[str, Any]:
    if "function" in tool or {"type", "properties"} & {*(tool.get("parameters") or {})} == {"type", "properties"}:
        return tool
    parameters = {"type": "object", "properties": tool.get("parameters") or {}}
    return {"type": "function", "function": {**tool, "parameters": parameters}}


def _read_text(data: Columns) -> Text:
    text = _text(data, "text")
    if not text.strip():
        raise RowFaultError(RowFault.EMPTY_TURN, "`text` is empty")
    return Text(text)


# --- Preferences ---------------------------------------------------------------------------------------------------


def _read_preference(data: Columns) -> Preference:
    given = _read_given(data)
    answers = [_read_spoken(data, name, spoken=not given) for name in ("chosen", "rejected")]
    shared = answers[0][: _shared_turns(*answers)]
    if any(turn.role == "user" for turn in shared):
        # The answers begin with the prompt; the prompt's own column, which may lack the system turn, repeats it.
        said = [(turn.role, turn.words) for turn in shared]
        if any((turn.role, turn.words) not in said for turn in given):
            raise RowFaultError(RowFault.FIELD_UNSUPPORTED, "the prompt is not the one that both answers begin with")
        given = []
    prompt = _with_system(data, [*given, *shared])
    chosen, rejected = (tuple(answer[len(shared) :]) for answer in answers)
    if chosen == rejected:
        raise RowFaultError(RowFault.SAME_ANSWERS, "`chosen` and `rejected` are the same")
    for answer in (chosen, rejected):
        _chat([*prompt, *answer])
        if not any(turn.role == "assistant" for turn in answer):
            raise RowFaultError(RowFault.NO_ANSWER, "an answer has no turn of the assistant")
        if given and (answer[0].role == "user" or any(turn.role == "system" for turn in answer)):
            raise RowFaultError(RowFault.FIELD_UNSUPPORTED, "an answer begins with another prompt than the row's")
    if not prompt:
        raise RowFaultError(RowFault.EMPTY_TURN, "there is no prompt, and the two answers share none")
    return Preference(tuple(prompt), chosen, rejected, read_tools(data))


def _read_given(data: Columns) -> list[Message]:
    """The prompt of a preference in a column of its own."""
    asked = next((name for name in (*QUESTIONS, "input") if name in data), None)
    if asked is not None:
        return [*_read_history(data), *_read_question(data, asked)]
    name = next((name for name in ("conversations", "messages") if name in data), None)
    turns = read_turns(data, name) if name else []
    while turns and turns[-1].role == "assistant":  # some hold the better answer too
        turns.pop()
    return turns


def _read_spoken(data: Columns, name: str, *, spoken: bool) -> list[Message]:
    """One of two answers; without a prompt in a column of its own, a text may be a whole dialogue."""
    value = data[name]
    if isinstance(value, str) and spoken and unpack_turns(value) is None:
        turns = _split_spoken(value)
        if not turns:
            raise RowFaultError(RowFault.FIELD_TYPE, f"`{name}` is a text, and there is no `prompt` next to it")
        return turns
    return read_side(data, name, "assistant")


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
    return next((place for place in range(most) if not _says_same(left[place], right[place])), max(most, 0))


def _says_same(one: Message, other: Message) -> bool:
    """Whether two turns differ at most in the blanks around their texts."""
    return (one.role, one.words, one.fields) == (other.role, other.words, other.fields)


def _chat(turns: list[Message], tools: tuple[Mapping[str, Any], ...] | None = None) -> Chat:
    for place, turn in enumerate(turns, start=1):
        if turn.role in ("user", "assistant") and not turn.words and not turn.tool_calls:
            raise RowFaultError(RowFault.EMPTY_TURN, f"turn {place} ({turn.role}) is empty")
    if not any(turn.role == "assistant" for turn in turns):
        raise RowFaultError(RowFault.NO_ANSWER, "no turn is the assistant's")
    if not any(turn.role == "assistant" and turn.learn for turn in turns):
        raise RowFaultError(RowFault.NO_ANSWER, "every turn of the assistant is flagged as not to be learned")
    return Chat(tuple(turns), tools)


def _list(data: Columns, name: str) -> list[Any]:
    value = data[name]
    if isinstance(value, str):
        value = unpack_list(value) or value
    if not isinstance(value, list):
        raise RowFaultError(RowFault.FIELD_TYPE, f"`{name}` is {name_type(value)}, not a list")
    return value


def _text(data: Columns, name: str) -> str:
    value = data[name]
    if not isinstance(value, str):
        raise RowFaultError(RowFault.FIELD_TYPE, f"`{name}` is {name_type(value)}, not a text")
    return value


def _optional_text(data: Columns, name: str) -> str:
    return _text(data, name) if name in data else ""


def _holds_turns(data: Columns, name: str) -> bool:
    """Whether a column may hold turns; a number of turns, or an id of a conversation, doesn't."""
    value = data.peek(name)
    return isinstance(value, list) or (isinstance(value, str) and value.lstrip().startswith("["))


_Reader: TypeAlias = Callable[[Columns], Example]
_FORMATS: Final[tuple[tuple[Wanted, Callable[[Columns], bool], _Reader], ...]] = (
    ("preference", lambda data: "chosen" in data and "rejected" in data, _read_preference),
    ("sft", lambda data: _holds_turns(data, "messages"), _read_messages),
    ("sft", lambda data: _holds_turns(data, "conversations"), _read_conversations),
    ("kto", _is_judged, _read_judged),
    ("sft", _is_calls, _read_calls_row),
    ("sft", lambda data: _find_pair(data) is not None, _read_pair),
    ("sft", lambda data: "messages" in data, _read_messages),
    ("sft", lambda data: "conversations" in data, _read_conversations),
    ("sft", lambda data: "text" in data, _read_text),
)
"""The formats, the first that fits first: the kind of its rows, whether a row fits, and its reader."""
