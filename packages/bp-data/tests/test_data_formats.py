"""Every known format, every way in which a row is none, and any JSON value anywhere."""

import pytest

from bp_data import parse_row
from bp_data.errors import RowFault
from bp_data.example import Chat, Judged, Message, Preference, Rejected, Row, Text


def read(**data):
    return parse_row(Row(7, data))


QA = (Message("user", "Q"), Message("assistant", "A"))


@pytest.mark.parametrize(
    ("data", "example"),
    [
        ({"messages": [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]}, Chat(QA)),
        ({"conversations": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}]}, Chat(QA)),
        ({"conversations": [{"role": "User", "content": "Q"}, {"from": "model", "value": "A"}]}, Chat(QA)),
        (
            {"system": "S", "conversations": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}]},
            Chat((Message("system", "S"), *QA)),
        ),
        ({"instruction": "Q", "input": "", "output": "A"}, Chat(QA)),
        (
            {"instruction": "Q", "input": "I", "output": "A", "system": "S"},
            Chat((Message("system", "S"), Message("user", "Q\n\nI"), Message("assistant", "A"))),
        ),
        ({"instruction": "Q", "output": "A", "history": [["Q", "A"]]}, Chat(QA + QA)),
        ({"prompt": "Q", "completion": "A", "id": 3}, Chat(QA)),
        ({"question": "Q", "answer": "A"}, Chat(QA)),
        (
            {"instruction": "Q", "context": "C", "response": "A"},
            Chat((Message("user", "Q\n\nC"), Message("assistant", "A"))),
        ),
        ({"text": "T"}, Text("T")),
        ({"messages": None, "text": "T", "conversations": None}, Text("T")),
        (
            {
                "messages": [
                    {"role": "developer", "content": "S"},
                    {"role": "user", "content": [{"type": "text", "text": "Q"}]},
                    {"role": "assistant", "content": "A"},
                ]
            },
            Chat((Message("system", "S"), *QA)),
        ),
    ],
)
def test_formats(data, example):
    assert read(**data) == example


def test_tool_calls_are_carried_with_their_arguments_as_objects():
    call = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}
    tools = [{"type": "function", "function": {"name": "f"}}]
    turns = [
        {"role": "user", "content": "Q"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "R", "tool_call_id": "c1", "name": "f"},
        {"role": "assistant", "content": "A"},
    ]
    chat = read(messages=turns, tools=tools)
    assert chat.tools == tuple(tools)
    assert chat.messages[1].to_dict() == {
        "role": "assistant",
        "content": None,
        "tool_calls": [{"id": "c1", "type": "function", "function": {"name": "f", "arguments": {"x": 1}}}],
    }
    assert chat.messages[2] == Message("tool", "R", {"tool_call_id": "c1", "name": "f"})


def test_sharegpt_function_calls_and_tools_as_texts():
    chat = read(
        tools='[{"name": "f"}]',
        conversations=[
            {"from": "human", "value": "Q"},
            {"from": "function_call", "value": '{"name": "f", "arguments": {"x": 1}}'},
            {"from": "observation", "value": "R"},
            {"from": "gpt", "value": "A"},
        ],
    )
    assert chat.tools == ({"name": "f"},)
    assert chat.messages[1].tool_calls == [{"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}]
    assert chat.messages[2].role == "tool"


def turns(*rest, asked="Q"):
    return [{"role": "user", "content": asked}, *rest]


ANSWER = {"role": "assistant", "content": "A"}


@pytest.mark.parametrize(
    ("data", "code", "words"),
    [
        ({"foo": 1, "bar": 2}, RowFault.COLUMNS_UNKNOWN, "columns seen: bar, foo"),
        ({}, RowFault.COLUMNS_UNKNOWN, "none"),
        ({"prompt": "p", "chosen": "a", "rejected": "a"}, RowFault.SAME_ANSWERS, "same"),
        ({"prompt": "p", "chosen": "a", "rejected": " "}, RowFault.EMPTY_TURN, "turn 2"),
        ({"prompt": "p", "chosen": "a", "rejected": 3}, RowFault.FIELD_TYPE, "`rejected` is a number"),
        ({"chosen": "a", "rejected": "b"}, RowFault.FIELD_TYPE, "no `prompt`"),
        ({"chosen": [ANSWER], "rejected": [{**ANSWER, "content": "B"}]}, RowFault.EMPTY_TURN, "no prompt"),
        ({"prompt": "p", "chosen": [], "rejected": "b"}, RowFault.NO_ANSWER, "assistant"),
        ({"messages": "hi"}, RowFault.FIELD_TYPE, "`messages` is a text"),
        ({"messages": []}, RowFault.NO_ANSWER, "assistant"),
        ({"messages": turns()}, RowFault.NO_ANSWER, "assistant"),
        ({"messages": ["hi"]}, RowFault.FIELD_TYPE, "`messages[0]`"),
        ({"messages": turns({"role": "narrator", "content": "x"})}, RowFault.ROLE_UNKNOWN, "'narrator'"),
        ({"messages": [{"content": "x"}]}, RowFault.ROLE_UNKNOWN, "null"),
        ({"messages": turns({"role": "assistant", "content": " \n"})}, RowFault.EMPTY_TURN, "turn 2 (assistant)"),
        ({"messages": turns(ANSWER, asked="")}, RowFault.EMPTY_TURN, "turn 1 (user)"),
        ({"messages": turns({"role": "assistant", "content": 3})}, RowFault.FIELD_TYPE, "a number"),
        ({"messages": turns({**ANSWER, "weight": 0})}, RowFault.NO_ANSWER, "flagged"),
        ({"messages": turns({**ANSWER, "weight": 0.5})}, RowFault.FIELD_UNSUPPORTED, "weight"),
        ({"messages": turns({**ANSWER, "loss": "no"})}, RowFault.FIELD_UNSUPPORTED, "loss"),
        (
            {"messages": [{"role": "user", "content": "Q", "train": True}, ANSWER]},
            RowFault.FIELD_UNSUPPORTED,
            "only the assistant's",
        ),
        ({"messages": turns({**ANSWER, "function_call": {"name": "f"}})}, RowFault.FIELD_UNSUPPORTED, "function_call"),
        ({"messages": turns(ANSWER), "functions": [{}]}, RowFault.FIELD_UNSUPPORTED, "functions"),
        (
            {"messages": turns({"role": "assistant", "content": [{"type": "image_url"}]})},
            RowFault.FIELD_UNSUPPORTED,
            "part 0",
        ),
        (
            {"messages": turns({"role": "assistant", "tool_calls": [{"id": 1}]})},
            RowFault.TOOL_CALL_BROKEN,
            "no function",
        ),
        ({"messages": turns({"role": "assistant", "tool_calls": "f()"})}, RowFault.TOOL_CALL_BROKEN, "not a list"),
        (
            {"messages": turns({"role": "assistant", "tool_calls": [{"name": "f", "arguments": "{x"}]})},
            RowFault.TOOL_CALL_BROKEN,
            "broken JSON",
        ),
        (
            {"messages": turns({"role": "assistant", "tool_calls": [{"name": "f", "arguments": [1]}]})},
            RowFault.TOOL_CALL_BROKEN,
            "a list",
        ),
        ({"messages": turns(ANSWER), "tools": "[x"}, RowFault.TOOL_CALL_BROKEN, "tools"),
        ({"messages": turns(ANSWER), "tools": [{}]}, RowFault.TOOL_CALL_BROKEN, "`tools[0]` has no name"),
        (
            {"system": "S", "conversations": [{"from": "system", "value": "Z"}, {"from": "gpt", "value": "A"}]},
            RowFault.FIELD_UNSUPPORTED,
            "two different",
        ),
        ({"instruction": "Q", "output": ""}, RowFault.EMPTY_TURN, "turn 2"),
        ({"instruction": "Q", "output": "A", "history": [["Q"]]}, RowFault.FIELD_TYPE, "history[0]"),
        ({"prompt": [{"role": "user"}], "completion": "A"}, RowFault.EMPTY_TURN, "turn 1"),
        ({"prompt": 3, "completion": "A"}, RowFault.FIELD_TYPE, "not a text or a list"),
        ({"text": " "}, RowFault.EMPTY_TURN, "text"),
        ({"text": 1.5}, RowFault.FIELD_TYPE, "a number"),
    ],
)
def test_rows_that_are_no_examples(data, code, words):
    rejected = read(**data)
    assert isinstance(rejected, Rejected)
    assert (rejected.number, rejected.code) == (7, code)
    assert words in rejected.reason


def test_every_fault_says_what_it_means():
    for fault in RowFault:
        assert fault.value == f"ROW_{fault.name}"
        assert fault.meaning.endswith(".")


USER = {"role": "user", "content": "Q"}
OTHER = {"role": "assistant", "content": "B"}
PAIR = Preference((Message("user", "Q"),), (Message("assistant", "A"),), (Message("assistant", "B"),))


@pytest.mark.parametrize(
    "data",
    [
        {"prompt": "Q", "chosen": "A", "rejected": "B"},
        {"prompt": [USER], "chosen": [ANSWER], "rejected": [OTHER]},
        {"prompt": "Q", "chosen": [USER, ANSWER], "rejected": [USER, OTHER], "messages": [USER, ANSWER]},
        {"chosen": [USER, ANSWER], "rejected": [USER, OTHER]},
        {"chosen": "\n\nHuman: Q\n\nAssistant: A", "rejected": "\n\nHuman: Q\n\nAssistant: B"},
        {"prompt": "Q", "chosen": ANSWER, "rejected": OTHER, "score": 3},
    ],
)
def test_preferences(data):
    assert parse_row(Row(7, data), "preference") == PAIR


def test_preferences_keep_system_tools_and_turns_that_both_share():
    found = parse_row(
        Row(1, {"system": "S", "chosen": [USER, ANSWER, USER, ANSWER], "rejected": [USER, ANSWER, USER, OTHER]})
    )
    assert [turn.content for turn in found.prompt] == ["S", "Q", "A", "Q"]
    assert ([t.content for t in found.chosen], [t.content for t in found.rejected]) == (["A"], ["B"])


@pytest.mark.parametrize(
    ("label", "good"), [(True, True), (False, False), (1, True), (0, False), ("True", True), ("0", False)]
)
def test_judged_answers(label, good):
    assert read(prompt="Q", completion="A", label=label) == Judged(Chat(QA, None, 1), good)
    assert read(prompt=[USER], completion=[ANSWER], label=label) == Judged(Chat(QA, None, 1), good)


def test_a_label_that_is_no_verdict_is_a_column_like_any_other():
    assert read(prompt="Q", completion="A", label="history") == Chat(QA)


def test_prompt_and_completion_as_lists_train_the_completion_only():
    chat = read(prompt=[USER, ANSWER, USER], completion=[OTHER])
    assert (len(chat.messages), chat.first) == (4, 3)
    assert read(prompt=[USER], completion="A") == Chat(QA, None, 1)


@pytest.mark.parametrize(
    ("wanted", "data"),
    [
        ("sft", {"prompt": "Q", "chosen": "A", "rejected": "B"}),
        ("sft", {"prompt": "Q", "completion": "A", "label": False}),
        ("preference", {"messages": [USER, ANSWER]}),
        ("kto", {"text": "T"}),
        ("kto", {"prompt": "Q", "completion": "A"}),
    ],
)
def test_rows_of_another_kind_are_refused(wanted, data):
    assert parse_row(Row(1, data), wanted).code is RowFault.WRONG_KIND


def test_deep_values_are_no_trouble():
    deep = []
    for _ in range(100_000):
        deep = [deep]
    assert isinstance(read(messages=[{"role": deep, "content": deep}]), Rejected)
    assert isinstance(read(text=deep), Rejected)
    while deep:  # taken apart by hand: freeing it at once would recurse as deep
        deep = deep.pop()
