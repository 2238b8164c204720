"""Files as people have them: every encoding, separator, wrapper and column name gives the same rows, or a reason."""

import contextlib
import csv
import gzip
import io
import itertools
import json
import random
import zipfile
from pathlib import Path

import pytest

from bp_data import clean_file, convert_file, examine, fetch_dataset, parse_row, read_rows, split_file
from bp_data.columns import FieldLedger, ReadOptions, propose_columns
from bp_data.errors import DatasetColumnsLeftError, DatasetParseFailedError, DatasetPartUnknownError, RowFault
from bp_data.example import Chat, Judged, Message, Preference, Rejected, Row
from bp_data.folders import find_files
from bp_data.json_text import dump_json, load_json
from bp_data.read import locate_row
from bp_runs.errors import CodedError, InvalidSettingError

CASES = Path(__file__).parent / "cases"
ROWS = [
    {"instruction": "Nenne einen Vogel für Ölberg.", "input": "", "output": "Möwe; „Krähe“, 5 €"},
    {"instruction": "Zwei\nZeilen", "input": "a,b;c\td|e", "output": 'sagt "ja"'},
    {"instruction": "Noch einer", "input": "x", "output": "Fischadler"},
]


def as_csv(separator, line_end="\r\n", quoting=csv.QUOTE_MINIMAL, rows=ROWS):
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), delimiter=separator, lineterminator=line_end, quoting=quoting)
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


ENCODINGS = ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32", "cp1252"]


def encode(text, encoding):
    marks = {"utf-16-le": b"", "utf-16-be": b""}
    return marks.get(encoding, b"") + text.encode(encoding)


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("separator", [",", ";", "\t", "|"])
def test_tables_in_every_encoding_with_every_separator(tmp_path, encoding, separator):
    options = ReadOptions(encoding="cp1252")
    for ending, quoting, line_end in itertools.product(
        ("csv", "tsv"), (csv.QUOTE_MINIMAL, csv.QUOTE_ALL), ("\n", "\r\n", "\r")
    ):
        # A file without line feeds between rows, as for old Macs, has none in a cell.
        wanted = ROWS if line_end != "\r" else [ROWS[0], ROWS[2]]
        path = tmp_path / f"a.{ending}"
        path.write_bytes(encode(as_csv(separator, line_end, quoting, wanted), encoding))
        assert [row.data for row in read_rows(path, options)] == wanted, (ending, quoting, line_end)
        path.write_bytes(encode(f"sep={separator}{line_end}" + as_csv(separator, line_end, quoting, wanted), encoding))
        assert [row.data for row in read_rows(path, options)] == wanted, "Excel's first line"
    if encoding == "cp1252":
        first, *_ = read_rows(path)
        assert isinstance(first, Rejected)
        assert first.code is RowFault.NOT_UTF8


def wrappers():
    lines = [json.dumps(row, ensure_ascii=False) for row in ROWS]
    pretty = [json.dumps(row, ensure_ascii=False, indent=2) for row in ROWS]
    whole = json.dumps(ROWS, ensure_ascii=False, indent=2)
    return {
        "lines": "\n".join(lines),
        "crlf and blank lines": "\r\n\r\n".join(lines) + "\r\n",
        "a list with an item a line": "[" + ",\n".join(lines) + "]",
        "a list, brackets on their own lines": "[\n" + ",\n".join(lines) + "\n]\n",
        "a comma after each line": "".join(f"{line},\n" for line in lines),
        "a comma before each line": "\n, ".join(lines),
        "a list with a last comma": "[\n" + ",\n".join(lines) + ",\n]",
        "a compact list": json.dumps(ROWS, ensure_ascii=False),
        "a pretty list": whole,
        "a pretty list with a last comma": whole[:-2] + ",\n]",
        "a comma before each closing brace": "\n".join(line[:-1] + ",}" for line in lines),
        "pretty, commas before closing braces": "[" + ",".join(p[:-2] + ",\n}" for p in pretty) + "]",
        "objects over several lines": "\n".join(pretty),
        "objects over several lines, with commas": ",\n".join(pretty),
        "marks between joined files": "\ufeff" + "\n\ufeff".join(lines),
        "files joined without a line feed": "".join(lines),
        "record separators": "".join(f"\x1e{line}\n" for line in lines),
        "JSON twice": "\n".join(json.dumps(line) for line in lines),
        "data": json.dumps({"version": "1", "data": ROWS}, ensure_ascii=False),
        "data, pretty": json.dumps({"data": ROWS}, ensure_ascii=False, indent=1),
        "splits": json.dumps({"test": [{"text": "no"}], "train": ROWS}, ensure_ascii=False),
        "a list for each column": json.dumps({n: [row[n] for row in ROWS] for n in ROWS[0]}, ensure_ascii=False),
        "pandas' columns": json.dumps({n: {str(i): row[n] for i, row in enumerate(ROWS)} for n in ROWS[0]}),
    }


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-be", "cp1252"])
@pytest.mark.parametrize("layout", wrappers())
def test_json_in_every_layout(tmp_path, layout, encoding):
    if encoding == "cp1252" and ("mark" in layout or ("list" in layout and "column" in layout)):
        return
    for ending in ("jsonl", "json", "ndjson", "jsonl.gz"):
        path = tmp_path / f"a.{ending}"
        data = wrappers()[layout].encode(encoding)
        path.write_bytes(gzip.compress(data) if ending.endswith("gz") else data)
        rows = list(read_rows(path, ReadOptions(encoding="cp1252")))
        assert [row.data for row in rows] == ROWS, ending
        assert [row.number for row in rows] == sorted(row.number for row in rows)


def test_a_bad_item_is_named_by_its_line_and_the_others_are_read(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('[{"text": "a"},\n{"text" "b"},\n\n{"text": "c"}\n]')
    rows = list(read_rows(path))
    assert [(type(row), row.number) for row in rows] == [(Row, 1), (Rejected, 2), (Row, 4)]
    assert locate_row(path, 2) == "line 2"
    path.write_text('[{"text":\n"a"}, 3]')
    assert [(type(row), row.number) for row in read_rows(path)] == [(Row, 1), (Rejected, 2)]
    assert locate_row(path, 2) == "row 2"
    path.write_text('{"text":\n "a",\n "b" "c"}')
    with pytest.raises(DatasetParseFailedError, match="line 3, column"):
        list(read_rows(path))
    path.write_text("{'text': 'a'}\n{'text': 'b'}")
    assert all("double quotes" in row.reason for row in read_rows(path))


def test_tables_with_blank_columns_repeated_headers_and_blank_records(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("question;answer;;\nq1;a1;;\n;;;\nquestion;answer;;\nq2;a2\nq3;a3;x\n")
    rows = list(read_rows(path))
    assert [row.data for row in rows if isinstance(row, Row)] == [
        {"question": "q1", "answer": "a1"},
        {"question": "q2", "answer": "a2"},
    ]
    assert [(row.number, row.code) for row in rows if isinstance(row, Rejected)] == [
        (4, RowFault.CSV_FIELDS),
        (6, RowFault.CSV_FIELDS),
    ]


def workbook(path, sheets):
    """A minimal .xlsx: one XML file a sheet."""
    with zipfile.ZipFile(path, "w") as book:
        kinds, links, names = "", "", ""
        for at, (name, rows) in enumerate(sheets.items(), start=1):
            cells = "".join(
                f'<row r="{r}">'
                + "".join(
                    f'<c r="{chr(64 + c)}{r}"><v>{v}</v></c>'
                    if isinstance(v, int | float)
                    else f'<c r="{chr(64 + c)}{r}" t="inlineStr"><is><t xml:space="preserve">{v}</t></is></c>'
                    for c, v in enumerate(row, start=1)
                )
                + "</row>"
                for r, row in enumerate(rows, start=1)
            )
            space = 'xmlns="http://schemas.openxmlformats.org/spreadsheetml/2006/main"'
            book.writestr(f"xl/worksheets/s{at}.xml", f"<worksheet {space}><sheetData>{cells}</sheetData></worksheet>")
            links += f'<Relationship Id="r{at}" Type="http://schemas.openxmlformats.org/officeDocument/2006/relationships/worksheet" Target="worksheets/s{at}.xml"/>'
            names += f'<sheet name="{name}" sheetId="{at}" r:id="r{at}"/>'
        relation = "http://schemas.openxmlformats.org/package/2006/relationships"
        book.writestr("xl/_rels/workbook.xml.rels", f'<Relationships xmlns="{relation}">{links}</Relationships>')
        office = "http://schemas.openxmlformats.org/officeDocument/2006/relationships"
        book.writestr("xl/workbook.xml", f'<workbook {space} xmlns:r="{office}"><sheets>{names}</sheets></workbook>')
        book.writestr(
            "_rels/.rels",
            f'<Relationships xmlns="{relation}"><Relationship Id="r1" Type="{office}/officeDocument" Target="xl/workbook.xml"/></Relationships>',
        )
        book.writestr("[Content_Types].xml", f"<Types>{kinds}</Types>")
    return path


def test_a_workbook_is_a_table(tmp_path, caplog):
    rows = [["question", "answer", ""], ["Möwe?", "ja", ""], ["", "", ""], ["2 + 2", 4, ""], ["half", 0.5]]
    path = workbook(tmp_path / "a.xlsx", {"empty": [], "Data": rows, "More": [["x"]]})
    assert list(read_rows(path)) == [
        Row(2, {"question": "Möwe?", "answer": "ja"}),
        Row(4, {"question": "2 + 2", "answer": "4"}),
        Row(5, {"question": "half", "answer": "0.5"}),
    ]
    assert locate_row(path, 4) == "row 4"
    assert [record.message for record in caplog.records] == [f"{path}: read: sheet Data; not read: More"]
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(DatasetParseFailedError, match="broken workbook"):
        list(read_rows(path))


def test_a_workbook_without_its_library_names_the_fix(tmp_path, monkeypatch):
    import sys

    from bp_data.errors import DatasetFormatUnsupportedError

    path = workbook(tmp_path / "a.xlsx", {"Data": [["text"], ["a"]]})
    monkeypatch.setitem(sys.modules, "python_calamine", None)
    with pytest.raises(DatasetFormatUnsupportedError) as caught:
        list(read_rows(path))
    assert "bp-data[excel]" in caught.value.fix


# --- Folders -------------------------------------------------------------------------------------------------------


def taken(folder):
    found = find_files(folder)
    return [file.relative_to(folder).as_posix() for file in found.taken], {
        file.relative_to(folder).as_posix(): why for file, why in found.left.items()
    }


def test_of_a_folder_the_files_that_belong_together_are_taken(tmp_path):
    row = '{"text": "a"}\n'
    for name in ("train.jsonl", "part-2.jsonl", "test.jsonl", "sub/validation-00000.jsonl", "sub/more.csv"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(row if name.endswith("jsonl") else "text\na\n")
    (tmp_path / "train.csv").write_text("text\na\n")
    (tmp_path / "train.jsonl.gz").write_bytes(gzip.compress(row.encode()))
    for name in ("notes.md", "requirements.txt", "README.md", "train.py", "clean.jsonl.rejected.jsonl"):
        (tmp_path / name).write_text("some words")
    (tmp_path / "settings.json").write_text('{\n"lr": 1\n}')
    (tmp_path / "extra.json").write_text(json.dumps([{"text": "b"}]))
    (tmp_path / "latest.jsonl").symlink_to("train.jsonl")
    (tmp_path / "self").symlink_to(tmp_path, target_is_directory=True)
    files, left = taken(tmp_path)
    assert files == ["extra.json", "part-2.jsonl", "sub/more.csv", "train.jsonl"]
    assert left == {
        "clean.jsonl.rejected.jsonl": "describes the data, or lists what was left out",
        "README.md": "describes the data, or lists what was left out",
        "requirements.txt": "describes the data, or lists what was left out",
        "latest.jsonl": "a link to train.jsonl",
        "notes.md": "a document among files of rows",
        "self": "a link to a folder",
        "settings.json": "one JSON object, like a file of settings",
        "sub/validation-00000.jsonl": "for tests or validation, by its name",
        "test.jsonl": "for tests or validation, by its name",
        "train.csv": "has the name of train.jsonl, in another form",
        "train.jsonl.gz": "has the name of train.jsonl, in another form",
        "train.py": "not a data file",
    }


def test_a_folder_of_tests_alone_of_documents_alone_or_of_links_is_taken_whole(tmp_path):
    for name in ("a/test.jsonl", "a/validation.jsonl", "b/one.md", "b/two.txt", "c/blobs/x1"):
        (tmp_path / name).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / name).write_text('{"text": "a"}\n')
    (tmp_path / "c/snap").mkdir()
    (tmp_path / "c/snap/data.jsonl").symlink_to("../blobs/x1")  # as the Hub's cache has it
    assert taken(tmp_path / "a")[0] == ["test.jsonl", "validation.jsonl"]
    assert taken(tmp_path / "b")[0] == ["one.md", "two.txt"]
    assert taken(tmp_path / "c/snap")[0] == ["data.jsonl"]


def test_a_saved_data_set_is_read_by_its_own_list(tmp_path):
    datasets = pytest.importorskip("datasets")
    data = datasets.Dataset.from_list(ROWS)
    data.save_to_disk(tmp_path / "one")
    (tmp_path / "one/cache-12.arrow").write_bytes(b"old")
    assert [row.data for row in read_rows(tmp_path / "one")] == ROWS
    assert list(find_files(tmp_path / "one").left.values()) == ["not in the saved data set"]
    datasets.DatasetDict({"test": data.select([0]), "train": data}).save_to_disk(tmp_path / "two")
    assert [row.data for row in read_rows(tmp_path / "two")] == ROWS
    datasets.DatasetDict({"de": data, "en": data}).save_to_disk(tmp_path / "three")
    with pytest.raises(DatasetPartUnknownError, match="de, en"):
        list(read_rows(tmp_path / "three"))
    chosen = fetch_dataset(tmp_path / "three", tmp_path / "store", split="en")
    assert [row.data for row in read_rows(chosen.path)] == ROWS


def test_the_files_of_a_split_are_all_read_whatever_their_names(tmp_path):
    pytest.importorskip("datasets")
    names = ["latest-test-run.jsonl", "notes.jsonl"]
    for name in names:
        (tmp_path / "in").mkdir(exist_ok=True)
        (tmp_path / "in" / name).write_text('{"text": "a"}\n')
    (tmp_path / "in/README.md").write_text("---\nconfigs:\n- config_name: default\n  data_files: '*.jsonl'\n---\n")
    found = fetch_dataset(tmp_path / "in", tmp_path / "store", split="train")
    assert {row.source for row in read_rows(found.path)} == set(names)


# --- Names ---------------------------------------------------------------------------------------------------------

QA = (Message("user", "Q"), Message("assistant", "A"))
PAIRS = [
    ("instruction", "output"), ("instruction", "response"), ("prompt", "completion"), ("prompt", "response"),
    ("question", "answer"), ("question", "response"), ("query", "response"), ("query", "answer"),
    ("problem", "solution"), ("problem", "answer"), ("input", "output"), ("user", "assistant"),
]  # fmt: skip


@pytest.mark.parametrize("style", [str, str.upper, str.capitalize, lambda name: f" {name} "])
@pytest.mark.parametrize(("asked", "answered"), PAIRS)
def test_names_of_questions_and_answers(asked, answered, style):
    data = {style(asked): "Q", style(answered): "A", "id": "17", "source": "web"}
    fields = FieldLedger()
    assert parse_row(Row(1, data), fields=fields) == Chat(QA)
    assert set(fields.left) == {"id", "source"}
    fields.check("d.jsonl")
    with_system = parse_row(Row(1, {**data, "System Prompt": "S"}))
    assert with_system == Chat((Message("system", "S"), *QA))
    if asked not in ("input", "user"):
        context = parse_row(Row(1, {**data, "context": "C", "input": "I", "choices": ["x", "y"]}))
        assert context.messages[0].content == "Q\n\nI\n\nC\n\nA. x\nB. y"
    for label, good in (
        ("true", 1),
        (" True", 1),
        ("1.0", 1),
        (1.0, 1),
        ("yes", 1),
        ("WAHR", 1),
        ("no", 0),
        (0, 0),
        (0.0, 0),
    ):
        judged = parse_row(Row(1, {**data, "label": label}))
        assert judged == Judged(Chat(QA, None, 1), bool(good)), label
        assert parse_row(Row(1, {**data, "label": label}), "sft").code is RowFault.WRONG_KIND
    assert parse_row(Row(1, {**data, "label": "physics"})) == Chat(QA)
    assert "a label is true or false" in parse_row(Row(1, {**data, "label": 0.7}), "kto").reason


@pytest.mark.parametrize("asked", ["prompt", "instruction", "question", "query", "problem", "input"])
def test_preferences_beside_every_question(asked):
    wanted = Preference(QA[:1], QA[1:], (Message("assistant", "B"),))
    for chosen, rejected in (("A", "B"), ({"role": "assistant", "content": "A"}, {"from": "gpt", "value": "B"})):
        assert parse_row(Row(1, {asked: "Q", "chosen": chosen, "rejected": rejected}), "preference") == wanted


def test_preferences_beside_a_conversation_and_with_doubled_prompts():
    user, good, bad = {"role": "user", "content": "Q"}, {"from": "gpt", "value": "A"}, {"from": "gpt", "value": "B"}
    system = {"role": "system", "content": "S"}
    plain = Preference(QA[:1], QA[1:], (Message("assistant", "B"),))
    for data in (
        {"conversations": [user], "chosen": good, "rejected": bad},
        {"messages": [user, good], "chosen": [user, good], "rejected": [user, bad]},
        {"prompt": "Q ", "chosen": [user, good], "rejected": [user, bad]},
        {"prompt": [user], "chosen": [user, good], "rejected": [user, bad]},
        {"chosen": [user, good], "rejected": [{"role": "user", "content": "Q\n"}, bad], "prompt": "Q"},
        {"prompt": "Q", "chosen": json.dumps([user, good]), "rejected": json.dumps([user, bad])},
    ):
        assert parse_row(Row(1, data), "preference") == plain, data
    doubled = {"prompt": "Q", "chosen": [system, user, good], "rejected": [system, user, bad]}
    prompt = (Message("system", "S"), *QA[:1])
    assert parse_row(Row(1, doubled)).prompt == prompt
    assert parse_row(Row(1, {**doubled, "system": "S"})).prompt == prompt
    assert parse_row(Row(1, {**doubled, "system": "T"})).code is RowFault.FIELD_UNSUPPORTED
    assert parse_row(Row(1, {**doubled, "prompt": "other"})).code is RowFault.FIELD_UNSUPPORTED
    one_side = {"prompt": "Q", "chosen": [user, good], "rejected": "B"}
    assert parse_row(Row(1, one_side)).code is RowFault.FIELD_UNSUPPORTED


@pytest.mark.parametrize("name", ["messages", "conversations", "conversation", "Dialogue"])
def test_conversations_in_every_shape(name):
    shapes = [
        [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}],
        [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}],
        [{"Role": "User", "Content": "Q"}, {"Role": "AI", "Content": "A"}],
        [{"speaker": "prompter", "text": "Q"}, {"speaker": "agent", "text": "A"}],
        [{"input": "Q", "output": "A"}],
        [{"human": "Q", "assistant": "A"}],
    ]
    for turns in shapes:
        for value in (turns, json.dumps(turns), repr(turns)):
            assert parse_row(Row(1, {name: value})) == Chat(QA), value
    for role in ("assistant", "gpt", "model", "chatgpt", "bot", "ai", "bing", "bard", "agent", "GPT"):
        assert parse_row(Row(1, {name: [{"from": "human", "value": "Q"}, {"from": role, "value": "A"}]})) == Chat(QA)
    odd = [{"from": "customer", "value": "Q"}, {"from": "claude", "value": "A"}]
    bad = parse_row(Row(1, {name: odd}))
    assert (bad.code, "data.columns=customer=user" in bad.fix) == (RowFault.ROLE_UNKNOWN, True)
    mapped = ReadOptions.parse(["customer=user", "claude=assistant"])
    assert parse_row(Row(1, {name: odd}), options=mapped) == Chat(QA)


def test_flags_of_turns_are_carried():
    for flag, off, on in (("weight", 0, 1), ("train", False, True), ("training", False, True), ("loss", False, True)):
        turns = [
            {"from": "human", "value": "a"},
            {"from": "gpt", "value": "bad", flag: off},
            {"from": "human", "value": "b", flag: off},
            {"from": "gpt", "value": "good", flag: on},
        ]
        chat = parse_row(Row(1, {"conversations": turns}))
        assert [turn.learn for turn in chat.messages] == [True, False, True, True], flag
        assert not any(turn.fields for turn in chat.messages)


def test_calls_as_xlam_writes_them():
    tools = [{"name": "f", "description": "d", "parameters": {"x": {"type": "int", "description": "e"}}}]
    answers = [{"name": "f", "arguments": {"x": 2**70}}, {"name": "f", "arguments": {"x": 2}}]
    chat = parse_row(
        Row(1, {"id": 1, "query": "Q", "answers": dump_json(answers).decode(), "tools": json.dumps(tools)})
    )
    assert [call["function"]["arguments"]["x"] for call in chat.messages[1].tool_calls] == [2**70, 2]
    assert chat.tools[0]["function"]["parameters"]["properties"] == tools[0]["parameters"]


def test_choices_and_a_number_that_chooses():
    row = {"question": "Q", "choices": ["red", "blue"], "answer": 1}
    assert parse_row(Row(1, row)) == Chat((Message("user", "Q\n\nA. red\nB. blue"), Message("assistant", "B. blue")))
    arc = {"question": "Q", "choices": {"text": ["red"], "label": ["1"]}, "answer": "1"}
    assert parse_row(Row(1, arc)).messages[0].content == "Q\n\n1. red"
    assert parse_row(Row(1, {**row, "answer": 2})).code is RowFault.FIELD_TYPE


def test_what_is_no_text_or_no_conversation_is_rejected():
    row = {"messages": [{"role": "user", "content": "<image>Q"}, {"role": "assistant", "content": "A"}]}
    for name in ("image", "images", "Images", "video", "audio"):
        bad = parse_row(Row(1, {**row, name: ["x.png"]}))
        assert (bad.code, name in bad.reason) == (RowFault.FIELD_UNSUPPORTED, True)
        assert isinstance(parse_row(Row(1, {**row, name: []})), Chat)
        assert isinstance(parse_row(Row(1, {**row, name: ["x"]}), options=ReadOptions.parse(ignore=[name])), Chat)
    for role, said in (("role", "text"), ("from", "value"), ("role", "content"), ("author", "text")):
        bad = parse_row(Row(1, {role: "prompter", said: "the user's words", "message_id": "x"}))
        assert (bad.code, "one message" in bad.reason) == (RowFault.FIELD_UNSUPPORTED, True)


# --- The ledger of columns -----------------------------------------------------------------------------------------

PROSE = "the long background that the answer rests on and that a model would need"


def ledger_of(*rows, options=None):
    fields = FieldLedger()
    for number, row in enumerate(rows, start=1):
        assert not isinstance(parse_row(Row(number, row), options=options or ReadOptions(), fields=fields), Rejected)
    return fields


def test_text_that_no_format_reads_stops_and_can_be_left_out_or_used():
    row = {"question": "Where?", "answer": "Off Moss.", "background": PROSE, "id": 7, "url": "a.example/b"}
    fields = ledger_of(row, row)
    assert fields.describe() == ["left aside in all 2 rows: background, id, url"]
    assert fields.describe_used() == ["columns trained on: answer", "columns only read: question"]
    assert fields.to_dict()["lost"] == ["background"]
    with pytest.raises(DatasetColumnsLeftError, match="left out: background") as caught:
        fields.check("d.jsonl")
    assert 'data.ignore_columns="background"' in caught.value.fix
    ledger_of(row, options=ReadOptions.parse(ignore=["background"])).check("d.jsonl")
    used = ReadOptions.parse(["background=context"])
    ledger_of(row, options=used).check("d.jsonl")
    assert PROSE in parse_row(Row(1, row), options=used).messages[0].content


def test_text_that_is_elsewhere_in_the_row_is_not_lost():
    alpaca = {"instruction": "Name a bird of the sea.", "input": "", "output": "A gull."}
    rendered = "Below is an instruction.\n\n### Instruction:\nName a bird of the sea.\n\n### Response:\nA gull."
    ledger_of({**alpaca, "text": rendered}).check("alpaca")
    turns = [{"role": "user", "content": PROSE}, {"role": "assistant", "content": "Yes."}]
    ledger_of({"messages": turns, "prompt": PROSE, "prompt_id": "ab12"}).check("ultrachat")
    pair = {"prompt": PROSE, "chosen": turns, "rejected": [turns[0], {"role": "assistant", "content": "No."}]}
    ledger_of({**pair, "messages": turns, "score_chosen": 1.5}).check("ultrafeedback")
    assert ledger_of({**alpaca, "text": rendered}).left["text"].rows == 1


def test_columns_can_be_mapped_and_proposals_can_be_used():
    row = {"Frage": "Q", "Antwort": "A"}
    bad = parse_row(Row(1, row))
    mapping = propose_columns(list(row))
    assert mapping == {"Frage": "prompt", "Antwort": "completion"}
    assert "data.columns=Frage=prompt,Antwort=completion" in bad.fix
    entries = [f"{theirs}={ours}" for theirs, ours in mapping.items()]
    assert parse_row(Row(1, row), options=ReadOptions.parse(entries)) == Chat(QA)
    assert parse_row(
        Row(1, {"question": "Q", "completion": "A"}), options=ReadOptions.parse(["question=prompt"])
    ) == Chat(QA)
    both = ledger_of(
        {"question": "Q", "prompt": PROSE, "completion": "A"}, options=ReadOptions.parse(["question=prompt"])
    )
    assert both.to_dict()["lost"] == ["prompt"], "what a mapped column displaces is not lost in silence"
    for names, mapping in (
        (["user_input", "bot_reply"], {"user_input": "prompt", "bot_reply": "completion"}),
        (["content", "url"], {"content": "text"}),
        (["article", "summary"], {"article": "text"}),
        (["foo", "bar"], {}),
    ):
        assert propose_columns(names) == mapping, names
    with pytest.raises(InvalidSettingError, match="maps 'qestion', and no row"):
        ledger_of({"question": "Q", "answer": "A"}).check("d.jsonl", ReadOptions.parse(["qestion=prompt"]))
    assert parse_row(Row(1, {"question": "Q", "answer": "A", "turns": 3, "dialog": "id-7"})) == Chat(QA)
    for wrong in (["question"], ["question=qustion"], ["=prompt"]):
        with pytest.raises(InvalidSettingError, match=r"data\.columns"):
            ReadOptions.parse(wrong)
    with pytest.raises(InvalidSettingError, match="Python does not know"):
        ReadOptions.parse(encoding="klingon")


# --- Numbers and names that most readers lose ----------------------------------------------------------------------


@pytest.mark.parametrize("number", [2**63, -(2**63) - 1, 2**64, 123456789012345678901234567890, 10**400])
def test_integers_of_any_size_stay(tmp_path, number):
    row = {"text": "a", "n": [{"id": number}], "float": 0.1}
    assert load_json(dump_json(row)) == row
    for name, text in (
        ("a.jsonl", dump_json(row).decode()),
        ("b.json", f"[{dump_json(row).decode()}]"),
        ("c.json", json.dumps([row], indent=1)),
    ):
        (tmp_path / name).write_text(text)
        assert [found.data for found in read_rows(tmp_path / name)] == [row]


def test_a_number_of_ten_thousand_digits_is_a_bad_row(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"n": ' + "7" * 10_000 + "}")
    (row,) = read_rows(tmp_path / "a.jsonl")
    assert (row.code, "too long" in row.reason) == (RowFault.JSON_BROKEN, True)


def test_clean_convert_and_split_keep_integers_and_flags(tmp_path):
    call = {"type": "function", "function": {"name": "f", "arguments": {"id": 2**80}}}
    turns = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "bad", "loss": False},
        {"role": "user", "content": "b"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
    ]
    path = tmp_path / "a.jsonl"
    path.write_bytes(
        dump_json({"messages": turns, "id": 2**70}) + b"\n" + dump_json({"text": "t", "id": 2**70}) + b"\n"
    )
    first, second = (row.data for row in read_rows(path))
    clean_file(path, tmp_path / "clean.jsonl")
    assert [row.data for row in read_rows(tmp_path / "clean.jsonl")] == [first, second]
    split_file(path, tmp_path / "b.jsonl", tmp_path / "c.jsonl", share=0.5)
    parts = [row.data["id"] for name in "bc" for row in read_rows(tmp_path / f"{name}.jsonl")]
    assert parts == [2**70, 2**70]
    for to in ("messages", "conversations"):
        done = convert_file(path, tmp_path / f"{to}.jsonl", to, on_bad_row="skip")
        assert done.left_aside == {"id": 2}
        (row,) = read_rows(tmp_path / f"{to}.jsonl")
        chat = parse_row(row)
        assert [turn.learn for turn in chat.messages] == [True, False, True, True]
        assert chat.messages[3].tool_calls[0]["function"]["arguments"]["id"] == 2**80


def damage(data, draw):
    """Bytes changed, taken away, put in, cut off or in another encoding."""
    found = bytearray(data)
    for _ in range(draw.choice([1, 1, 2, 6])):
        at = draw.randrange(len(found) + 1)
        kind = draw.randrange(5)
        if kind == 0:
            found[at : at + 1] = bytes([draw.randrange(256)])
        elif kind == 1:
            del found[at : at + draw.randrange(1, 20)]
        elif kind == 2:
            signs = [b"\n", b"\r", b"\xef\xbb\xbf", b",", b"[", b"}", b'"', b"\x00", b"\\", b";", b"1e999", b"9" * 30]
            found[at:at] = draw.choice(signs)
        elif kind == 3:
            del found[at:]
        else:
            found = bytearray(found.decode(errors="replace").encode(draw.choice(["utf-16", "utf-32"]), "replace"))
    return bytes(found)


@pytest.mark.parametrize("seed", range(4))
def test_damaged_files_end_in_coded_errors_or_rejected_rows(tmp_path, seed):
    draw = random.Random(seed)
    endings = [".jsonl", ".json", ".csv", ".tsv", ".txt", ".parquet", ".arrow", ".xlsx", ".jsonl.gz"]
    sources = sorted(CASES.iterdir())
    for turn in range(60):
        source = draw.choice(sources)
        data = damage(source.read_bytes(), draw)
        path = tmp_path / f"a{draw.choice([source.suffix, *endings])}"
        path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
        options = draw.choice([ReadOptions(), ReadOptions.parse(["claude=assistant"], ["images"], "cp1252")])
        with contextlib.suppress(CodedError):
            for row in read_rows(path, options):
                if isinstance(row, Row):
                    parse_row(row, draw.choice([None, "sft", "preference", "kto"]), options, FieldLedger())
        if not turn % 10:
            assert examine(path, options=options).findings


# --- The cases found from outside ----------------------------------------------------------------------------------

EXPECTED = {
    "alpaca-context-dropped.jsonl": ["chat"],
    "array-in-jsonl.jsonl": ["chat"] * 3,
    "big-integers.jsonl": ["chat", RowFault.DUPLICATE_KEYS],
    "excel-semicolon.csv": ["chat"] * 2,
    "images-column-ignored.jsonl": ["chat", RowFault.FIELD_UNSUPPORTED, RowFault.FIELD_UNSUPPORTED, "chat"],
    "kto-space-label.csv": ["judged"] * 3,
    "messages-as-json-string.csv": ["chat"],
    "oasst-rows-as-text.parquet": [RowFault.FIELD_UNSUPPORTED] * 2,
    "pref-prompt-doubled-system.jsonl": ["preference"],
    "qa-context-dropped.jsonl": ["chat"],
    "roles.jsonl": ["chat"] * 10 + [RowFault.ROLE_UNKNOWN] * 2 + ["chat", RowFault.ROLE_UNKNOWN]
    + [RowFault.TOOL_CALL_BROKEN] + ["chat"] * 3 + [RowFault.ROLE_UNKNOWN] * 3,
    "weight0-on-human.jsonl": ["chat"],
}  # fmt: skip


@pytest.mark.parametrize("name", EXPECTED)
def test_cases_found_from_outside(name):
    if name.endswith("parquet"):
        pytest.importorskip("pyarrow")
    rows = [row if isinstance(row, Rejected) else parse_row(row) for row in read_rows(CASES / name)]
    found = [row.code if isinstance(row, Rejected) else type(row).__name__.lower() for row in rows]
    assert found == EXPECTED[name]
    if name == "kto-space-label.csv":
        assert [row.label for row in rows] == [True, True, False]
    if name == "big-integers.jsonl":
        assert rows[0].messages[1].tool_calls[0]["function"]["arguments"]["id"] == 123456789012345678901234567890
    if "context" in name:
        assert "Moss" in rows[0].messages[0].content
