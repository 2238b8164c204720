"""Duplicates, contamination, reports, limits; files split, cleaned and converted with nothing lost."""

import json
import random
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bp_data import (
    Limits,
    build_report,
    check_limits,
    clean_file,
    convert_example,
    convert_file,
    find_contamination,
    find_duplicates,
    parse_row,
    read_rows,
    report_html,
    report_text,
    split_file,
)
from bp_data.convert import normal_form
from bp_data.dedupe import exact_key, reject_duplicates, row_text, shingles
from bp_data.errors import (
    DatasetFormatUnsupportedError,
    DatasetGateError,
    DatasetInvalidError,
    DatasetParseFailedError,
    RowFault,
    RowFaultError,
)
from bp_data.example import Chat, Judged, Message, Preference, Rejected, Row, Text
from bp_data.row_checks import find_odd_turns, find_personal
from bp_runs.errors import ContractError, OutputTakenError

CHATML = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
WORDS = [f"word{number}" for number in range(3000)]


def qa(q, a, **more):
    return {"prompt": q, "completion": a, **more}


def long_text(seed, length=150):
    return " ".join(random.Random(seed).choices(WORDS, k=length))


def changed(text, count, seed=0):
    words = text.split()
    for place in random.Random(seed).sample(range(len(words)), count):
        words[place] = "other"
    return " ".join(words)


def test_exact_and_near_duplicates_name_their_original():
    texts = [
        long_text(1),
        long_text(2),
        long_text(1) + " ",
        changed(long_text(2), 2),
        changed(long_text(1), 60),
    ]
    rows = [Row(number, {"text": text, "id": number}) for number, text in enumerate(texts, start=10)]
    rows.insert(1, Rejected(99, RowFault.NOT_OBJECT, "x"))
    found = list(find_duplicates(rows))
    assert [(d.number, d.of_number, d.kind, d.place) for d in found] == [(12, 10, "exact", 3), (13, 11, "near", 4)]
    assert [d.number for d in find_duplicates(rows, near=False)] == [12]


def test_near_duplicates_are_those_that_jaccard_finds():
    """Against the similarity itself, computed from the sets."""
    texts = [long_text(seed, 120) for seed in range(60)]
    chance = random.Random(5)
    rows = texts + [changed(text, chance.choice([1, 30, 60]), seed) for seed, text in enumerate(texts)]
    found = {d.place for d in find_duplicates(Row(n, {"text": t}) for n, t in enumerate(rows, 1))}
    for place, text in enumerate(rows[60:], start=60):
        a, b = set(shingles(text)), set(shingles(rows[place - 60]))
        alike = len(a & b) / len(a | b)
        if alike > 0.93:
            assert place in found
        if alike < 0.75:
            assert place not in found


def test_rejecting_duplicates_keeps_every_row():
    rows = [Row(1, qa("Q", "A")), Row(2, qa("Q", "A ")), Rejected(3, RowFault.NOT_OBJECT, "x"), Row(4, qa("Q", "B"))]
    out = list(reject_duplicates(lambda: rows, near=True))
    assert [type(row) for row in out] == [Row, Rejected, Rejected, Row]
    assert (out[1].code, out[1].reason) == (RowFault.DUPLICATE, "it is the same as row 1")


def test_the_words_of_a_row_leave_ids_aside():
    assert row_text(Row(1, {"id": "7", "messages": [{"role": "user", "content": "a"}], "n": 3})) == "user\na\n3"
    assert exact_key(Row(1, qa("A b", "c\n"))) == exact_key(Row(2, qa(" A b", "c")))
    for other in (qa("a b", "c"), qa("A  b", "c"), qa("A", "b c"), {"text": "A b\nc"}):
        assert exact_key(Row(1, qa("A b", "c"))) != exact_key(Row(2, other))
    assert shingles("one two") == ["one two"]
    assert shingles("!") == ["!"]


@settings(max_examples=100, deadline=None)
@given(
    st.recursive(
        st.none() | st.booleans() | st.floats() | st.text(max_size=5),
        lambda x: st.lists(x) | st.dictionaries(st.text(max_size=4), x),
        max_leaves=10,
    )
)
def test_any_row_has_words_and_shingles(value):
    row = Row(1, {"a": value})
    assert len(exact_key(row)) == 16
    assert shingles(row_text(row))


def test_contamination_between_two_files(write_lines):
    train = write_lines([qa("Q", long_text(1)), qa("Q", long_text(2)), qa("Q", long_text(3))], "train.jsonl")
    test = write_lines([qa("Q", long_text(2)), qa("Q", long_text(9)), qa("Q", changed(long_text(3), 2))], "test.jsonl")
    found = [(one.number, one.of_number, one.kind) for one in find_contamination(train, test)]
    assert found == [(1, 2, "exact"), (3, 3, "near")]
    report = build_report(train, against=test)
    assert report.contaminated.count == 2
    with pytest.raises(DatasetGateError, match="contaminated: 2 of 3"):
        check_limits(report, Limits(contaminated=0.0))


@pytest.mark.parametrize(
    ("turns", "odd"),
    [
        ("ua", []),
        ("sua", []),
        ("uua", ["same_role_twice"]),
        ("uaa", ["same_role_twice"]),
        ("aua", ["answer_first"]),
        ("usa", ["system_late"]),
        ("uau", ["no_last_answer"]),
        ("uta", ["tool_unasked"]),
    ],
)
def test_odd_turns(turns, odd):
    roles = {"u": "user", "a": "assistant", "s": "system", "t": "tool"}
    assert (
        find_odd_turns(Chat(tuple(Message(roles[turn], f"{turn}{place}") for place, turn in enumerate(turns)))) == odd
    )


def test_other_oddities():
    assert find_odd_turns(Chat((Message("user", "same"), Message("assistant", "same ")))) == ["answer_repeats_question"]
    assert find_odd_turns(Text("caf\ufffd")) == ["replacement_character"]
    pair = Preference((Message("user", "Q"),), (Message("assistant", "A"),), (Message("assistant", "B"),))
    assert find_odd_turns(pair) == []
    assert find_odd_turns(Judged(Chat((Message("assistant", "A"),)), label=True)) == ["answer_first"]


@pytest.mark.parametrize(
    ("text", "kinds"),
    [
        ("write to jane.doe@example.org", {"email"}),
        ("call +49 30 1234567 now", {"phone"}),
        ("host 192.168.1.77 is up", {"ip_address"}),
        ("card 4111 1111 1111 1111", {"card_number"}),
        ("token hf_abcdefghijklmnopqrstuv", {"secret"}),
        ("1234 5678 9012 3456 is no card, 1.2.3 no address, 3+4=7 no phone, a@b no mail", set()),
        ("0000 0000 0000 0000", set()),
    ],
)
def test_hints_of_personal_data(text, kinds):
    found = find_personal(text)
    assert set(found) == kinds
    assert all(value not in text.split() for value in found.values())


ROWS = [
    *(qa(f"Question {number}?", long_text(number, 20 + number)) for number in range(40)),
    qa("Question 3?", long_text(3, 23)),
    qa("Q", ""),
    {"foo": 1},
    qa("mail", "jane@example.org"),
    {
        "messages": [
            {"role": "user", "content": "a"},
            {"role": "user", "content": "b"},
            {"role": "assistant", "content": "c"},
        ]
    },
    qa("Q", "<script>alert(1)</script> " + long_text(77, 3000)),
]


def test_a_report_counts_everything(write_lines, model):
    path = write_lines(ROWS)
    report = build_report(path)
    assert (report.rows, report.usable) == (46, 44)
    assert {code: found.count for code, found in report.rejected.items()} == {
        "ROW_COLUMNS_UNKNOWN": 1,
        "ROW_EMPTY_TURN": 1,
    }
    assert (report.exact.count, report.exact.rows) == (1, (41,))
    assert report.oddities["same_role_twice"].rows == (45,)
    assert report.personal["email"].rows == (44,)
    assert report.outliers.rows == (46,)
    assert sum(count for _, _, count in report.lengths.bins) == report.usable
    assert report.turns == {2: 43, 3: 1}
    json.dumps(report.to_dict())
    in_tokens = build_report(path, model("chatml", CHATML), max_seq_length=500)
    assert in_tokens.lengths.unit == "tokens"
    assert in_tokens.overlong >= 1
    assert 0 < in_tokens.trained_tokens < in_tokens.lengths.total
    assert in_tokens.usable == 44


def test_a_report_as_text_and_as_a_page(write_lines, model):
    report = build_report(write_lines(ROWS), model("chatml", CHATML))
    text, page = report_text(report), report_html(report)
    assert "46 rows, 44 usable" in text
    assert "two turns of one role follow each other: 1 (rows 45)" in text
    assert "█" in text
    assert "jane@example.org" not in text + page
    assert "<script" not in page
    assert not re.search(r"(src|href)\s*=|url\(|@import|https?:", page)
    empty = build_report(write_lines([{"foo": 1}], "b.jsonl"))
    assert "0 usable" in report_text(empty)
    assert "ROW_COLUMNS_UNKNOWN" in report_html(empty)
    clean = build_report(write_lines([qa("Q", "A")], "c.jsonl"))
    assert "Nothing." in report_html(clean)


def test_preferences_and_judged_answers_are_measured_too(write_lines, model):
    rows = [{"prompt": "Q", "chosen": "A", "rejected": "B"}, {"prompt": "Q", "completion": "A", "label": True}]
    report = build_report(write_lines(rows), model("chatml", CHATML))
    assert report.formats == {"judged": 1, "preference": 1}
    assert (report.usable, report.rejected) == (2, {})


@pytest.mark.parametrize(
    ("limits", "words"),
    [
        (Limits(rejected=0.01), "rejected: 2 of 46"),
        (Limits(duplicates=0.0), "duplicates: 1"),
        (Limits(personal=0.0), "personal: 1"),
        (Limits(oddities=0.0), "oddities: 1"),
        (Limits(min_rows=100), "usable rows: 44"),
    ],
)
def test_limits_are_a_gate(write_lines, limits, words):
    report = build_report(write_lines(ROWS))
    check_limits(report, Limits(rejected=0.5, min_rows=44))
    with pytest.raises(DatasetGateError, match=words) as caught:
        check_limits(report, limits)
    assert caught.value.exit_status == 65


def data_of(path):
    return [row.data for row in read_rows(path)]


def test_a_split_loses_nothing_and_keeps_copies_together(tmp_path, write_lines):
    rows = [qa(f"Q{n % 30}", f"A{n % 30}", id=n) for n in range(60)]
    path = write_lines(rows)
    train, held = tmp_path / "out" / "train.jsonl", tmp_path / "out" / "held.jsonl"
    done = split_file(path, train, held, share=0.2, seed=1)
    assert done.written == {str(train): 48, str(held): 12}
    assert done.rejected is None
    assert sorted(row["id"] for row in data_of(train) + data_of(held)) == list(range(60))
    assert not {row["prompt"] for row in data_of(train)} & {row["prompt"] for row in data_of(held)}
    before = held.read_bytes()
    split_file(path, train, held, share=0.2, seed=1)
    assert held.read_bytes() == before
    with pytest.raises(ContractError):
        split_file(path, train, train)


def test_a_split_of_broken_rows(tmp_path, write_lines):
    path = write_lines([qa("Q", str(n)) for n in range(9)])
    path.write_text(path.read_text() + "{broken\n")
    train, held = tmp_path / "t.jsonl", tmp_path / "h.jsonl"
    with pytest.raises(DatasetParseFailedError, match="line 10"):
        split_file(path, train, held)
    assert not train.exists()
    assert [p.name for p in tmp_path.iterdir()] == ["data.jsonl"]
    done = split_file(path, train, held, on_bad_row="skip")
    assert (done.read, sum(done.written.values()), done.to_dict()["dropped_by_code"]) == (10, 9, {"ROW_JSON_BROKEN": 1})
    assert json.loads(done.rejected.read_text())["excerpt"] == "{broken"


def test_cleaning_writes_rows_as_they_were(tmp_path, write_lines):
    path = write_lines(ROWS)
    done = clean_file(path, tmp_path / "clean.jsonl")
    assert done.to_dict() == {
        "read": 46,
        "written": {str(tmp_path / "clean.jsonl"): 43},
        "dropped": 3,
        "dropped_by_code": {"ROW_COLUMNS_UNKNOWN": 1, "ROW_DUPLICATE": 1, "ROW_EMPTY_TURN": 1},
        "rejected": str(tmp_path / "clean.jsonl.rejected.jsonl"),
        "left_aside": {},
    }
    kept = data_of(tmp_path / "clean.jsonl")
    assert all(row in ROWS for row in kept)
    assert build_report(tmp_path / "clean.jsonl").exact.count == 0
    without = clean_file(path, tmp_path / "more.jsonl", personal=True, dedup="none")
    assert without.to_dict()["dropped_by_code"]["ROW_PERSONAL"] == 1


WORD = st.text("ab \n😀", min_size=1, max_size=5).filter(str.strip)
CALL = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
TURN = st.builds(Message, st.sampled_from(["user", "assistant", "tool"]), WORD) | st.just(
    Message("assistant", None, {"tool_calls": [CALL]})
)
CHATS = st.builds(
    lambda system, turns, tools: Chat((*system, *turns), tools),
    st.lists(st.builds(Message, st.just("system"), WORD), max_size=1),
    st.lists(TURN, min_size=1, max_size=5).filter(lambda turns: any(turn.role == "assistant" for turn in turns)),
    st.sampled_from([None, ({"type": "function", "function": {"name": "f"}},)]),
)
PLAIN = st.builds(
    lambda system, pairs: Chat(
        (*system, *(Message(r, t) for pair in pairs for r, t in zip(("user", "assistant"), pair, strict=True)))
    ),
    st.lists(st.builds(Message, st.just("system"), WORD), max_size=1),
    st.lists(st.tuples(WORD, WORD), min_size=1, max_size=3),
)
FORMATS = ["messages", "conversations", "alpaca", "prompt-completion", "text", "preference", "kto"]


@settings(max_examples=200, deadline=None)
@given(CHATS | PLAIN | st.builds(Text, WORD), st.sampled_from(FORMATS))
def test_what_is_converted_reads_back_the_same(example, to):
    try:
        row = convert_example(example, to)
    except RowFaultError:
        return
    found = parse_row(Row(1, json.loads(json.dumps(row))))
    assert normal_form(found) == normal_form(example)


@settings(max_examples=50, deadline=None)
@given(PLAIN, st.booleans())
def test_each_format_holds_what_it_is_for(chat, label):
    for to in ("messages", "conversations", "alpaca"):
        assert parse_row(Row(1, convert_example(chat, to))) == chat
    judged = Judged(Chat(chat.messages, None, len(chat.messages) - 1), label)
    assert parse_row(Row(1, convert_example(judged, "kto"))) == judged
    pair = Preference(chat.messages[:-1], chat.messages[-1:], (Message("assistant", "another one"),))
    assert parse_row(Row(1, convert_example(pair, "preference"))) == pair


def test_converting_a_file(tmp_path, write_lines):
    path = write_lines([qa("Q", "A"), {"text": "T"}])
    with pytest.raises(DatasetInvalidError, match="line 2: a text row cannot be written as alpaca"):
        convert_file(path, tmp_path / "out.jsonl", "alpaca")
    done = convert_file(path, tmp_path / "out.jsonl", "alpaca", on_bad_row="skip")
    assert data_of(tmp_path / "out.jsonl") == [{"instruction": "Q", "input": "", "output": "A"}]
    assert done.ledger.dropped_by_code == {"ROW_WRONG_KIND": [2]}


def test_a_histogram_passes_over_long_gaps(write_lines):
    rows = [{"prompt": "Q", "completion": "A" * n} for n in (1, 2, 3, 900)]
    lines = report_text(build_report(write_lines(rows))).splitlines()
    assert sum("⋮" in line for line in lines) == 1
    assert len([line for line in lines if " to " in line and "a row" not in line and "nine" not in line]) == 2


def test_new_files_are_json_lines_and_never_the_file_that_is_read(write_lines, tmp_path):
    path = write_lines([{"prompt": "Q", "completion": "A"}])
    with pytest.raises(DatasetFormatUnsupportedError, match="JSON lines") as caught:
        clean_file(path, tmp_path / "x.csv")
    assert "x.jsonl" in caught.value.fix
    with pytest.raises(OutputTakenError):
        clean_file(path, tmp_path / "." / path.name)
    assert path.read_text() == '{"prompt": "Q", "completion": "A"}\n'


def test_what_json_cannot_hold_is_left_out_and_an_old_list_goes(tmp_path):
    pa = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    table = pa.table({"prompt": ["Q", "R"], "completion": ["A", "B"], "extra": [b"\xff", None]})
    parquet.write_table(table, tmp_path / "a.parquet")
    done = clean_file(tmp_path / "a.parquet", tmp_path / "c.jsonl")
    assert done.ledger.dropped_by_code == {"ROW_FIELD_TYPE": [1]}
    assert done.rejected == tmp_path / "c.jsonl.rejected.jsonl"
    again = clean_file(tmp_path / "c.jsonl", tmp_path / "d.jsonl")
    assert (again.read, again.rejected) == (1, None)
    (tmp_path / "d.jsonl.rejected.jsonl").write_text("old")
    clean_file(tmp_path / "c.jsonl", tmp_path / "d.jsonl")
    assert not (tmp_path / "d.jsonl.rejected.jsonl").exists()


def test_rows_of_a_folder_are_named_with_their_files(tmp_path):
    for name, answer in (("a", "one"), ("b", "one"), ("c", "  ")):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({"prompt": "Q", "completion": answer}) + "\n")
    report = build_report(tmp_path, near=False)
    assert (report.files, report.exact.rows, report.exact.files) == (3, (1,), ("b.jsonl",))
    text = report_text(report)
    assert "exact duplicates: 1 (rows b.jsonl:1)" in text
    assert "row 1 repeats row 1 of a.jsonl" in text
    assert "ROW_EMPTY_TURN: 1 (rows c.jsonl:1)" in text
    assert "c.jsonl:1" in report_html(report)
    rejected = [row for row in reject_duplicates(lambda: read_rows(tmp_path), near=False) if isinstance(row, Rejected)]
    assert rejected[0].reason == "it is the same as row 1 of a.jsonl"
    (tmp_path / "other.jsonl").write_text("")
    (found,) = find_contamination(tmp_path / "a.jsonl", tmp_path / "b.jsonl")
    assert (found.source, found.of_source, found.kind) == ("b.jsonl", "a.jsonl", "exact")
