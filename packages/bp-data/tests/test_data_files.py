"""Every kind of file: packed, in folders, long, cut short; and the same rows whatever the file."""

import csv
import gzip
import json
import tracemalloc

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bp_data import PrepareRequest, prepare, read_rows
from bp_data import json_rows as reading
from bp_data.errors import (
    DatasetEmptyError,
    DatasetFormatUnsupportedError,
    DatasetParseFailedError,
    RowFault,
)
from bp_data.example import Rejected, Row
from bp_data.files import load_zstd
from bp_data.folders import sha256_data
from bp_data.json_text import BrokenListError, read_items

ROWS = [{"prompt": f"Q{i} 😀", "completion": f'A{i}\n"x"'} for i in range(50)]


def write(path, rows):
    kind = path.name.split(".", 1)[1].removesuffix(".gz").removesuffix(".zst")
    if kind == "parquet":
        pa = pytest.importorskip("pyarrow")
        from pyarrow import parquet

        parquet.write_table(pa.Table.from_pylist(rows), path)
        data = path.read_bytes()
    elif kind == "csv":
        import io

        text = io.StringIO()
        writer = csv.DictWriter(text, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
        data = text.getvalue().encode()
    else:
        data = json.dumps(rows).encode() if kind == "json" else "\n".join(map(json.dumps, rows)).encode()
    if path.suffix == ".gz":
        data = gzip.compress(data)
    elif path.suffix == ".zst":
        half = len(data) // 2  # two frames, as tools that append leave them
        data = load_zstd().compress(data[:half]) + load_zstd().compress(data[half:])
    path.write_bytes(data)
    return path


@pytest.mark.parametrize("packing", ["", ".gz", ".zst"])
@pytest.mark.parametrize("kind", ["jsonl", "json", "csv", "parquet"])
def test_the_same_rows_from_every_kind_of_file(tmp_path, kind, packing):
    path = write(tmp_path / f"data.{kind}{packing}", ROWS)
    rows = list(read_rows(path))
    assert [row.data for row in rows] == ROWS
    assert {row.source for row in rows} == {path.name}


@pytest.mark.parametrize("packing", ["", ".gz"])
@pytest.mark.parametrize("kind", ["txt", "md"])
def test_documents_are_rows(tmp_path, kind, packing):
    path = tmp_path / f"a.{kind}{packing}"
    data = "\ufeffOne\r\n\r\nTwo 😀\n".encode()
    path.write_bytes(gzip.compress(data) if packing else data)
    assert list(read_rows(path)) == [Row(1, {"text": "One\r\n\r\nTwo 😀\n"})]
    path.write_bytes(gzip.compress(b"a\n\xe9") if packing else b"a\n\xe9")
    (row,) = read_rows(path)
    assert (row.code, row.reason) == (RowFault.NOT_UTF8, "line 2: byte 0xe9 is not UTF-8")


def test_a_folder_is_read_file_by_file(tmp_path):
    (tmp_path / "b").mkdir()
    write(tmp_path / "b" / "2.jsonl.gz", ROWS[:2])
    write(tmp_path / "a.csv", ROWS[2:3])
    for left_aside in (".hidden.jsonl", "README.md", "_tmp.jsonl", "picture.png"):
        (tmp_path / left_aside).write_bytes(b"\x00")
    rows = list(read_rows(tmp_path))
    assert [(row.source, row.number) for row in rows] == [("a.csv", 2), ("b/2.jsonl.gz", 1), ("b/2.jsonl.gz", 2)]
    before = sha256_data(tmp_path)
    (tmp_path / "a.csv").rename(tmp_path / "c.csv")
    assert before != sha256_data(tmp_path)


def test_the_place_of_a_bad_row_in_a_folder_names_its_file(tmp_path, model):
    CHATML = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    write(tmp_path / "a.jsonl", ROWS[:1])
    (tmp_path / "b.jsonl").write_text('\n{"prompt": "a"\n')
    with pytest.raises(DatasetParseFailedError, match=r"b\.jsonl, line 2: broken JSON") as caught:
        prepare(PrepareRequest(tmp_path, model("chatml", CHATML), 64))
    assert caught.value.details["row_code"] == "ROW_JSON_BROKEN"


@pytest.mark.parametrize("packing", [".gz", ".zst"])
@pytest.mark.parametrize("kind", ["jsonl", "json", "csv", "txt", "parquet"])
def test_compressed_data_that_is_cut_short_is_told(tmp_path, kind, packing):
    path = tmp_path / f"data.{kind}{packing}"
    rows = [{"prompt": f"{i}" * 99, "completion": f"{i * 7919}" * 9} for i in range(3000)]
    write(path, rows)
    whole = path.read_bytes()
    for length in (len(whole) - 5, len(whole) // 3, 6):
        path.write_bytes(whole[:length])
        with pytest.raises(DatasetParseFailedError, match="cut short"):
            list(read_rows(path))


@pytest.mark.parametrize(
    ("name", "data"), [("a.jsonl.gz", b"{}"), ("a.jsonl.zst", b"{}"), ("a.jsonl.gz", gzip.compress(b"\x00", mtime=0))]
)
def test_files_that_are_not_what_their_ending_says(tmp_path, name, data):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(DatasetParseFailedError):
        list(read_rows(tmp_path / name))


def test_empty_packed_files(tmp_path):
    for name, data in (
        ("a.jsonl.gz", gzip.compress(b"")),
        ("a.jsonl.zst", load_zstd().compress(b"")),
        ("b.csv.gz", b""),
    ):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(DatasetEmptyError):
            list(read_rows(tmp_path / name))


def test_parquet_without_pyarrow_names_the_fix(tmp_path, monkeypatch):
    import sys

    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(DatasetFormatUnsupportedError) as caught:
        list(read_rows(tmp_path / "a.parquet"))
    assert "bp-data[parquet]" in caught.value.fix


def test_broken_parquet_is_coded(tmp_path):
    pytest.importorskip("pyarrow")
    path = write(tmp_path / "a.parquet", ROWS)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(DatasetParseFailedError, match="broken Parquet"):
        list(read_rows(path))


@pytest.mark.parametrize(
    ("line", "name"),
    [
        ('{"text": "a", "text": "b"}', "text"),
        ('{"messages": [{"role": "user", "role" : "x"}]}', "role"),
        ('{"t": "\\"x\\":", "t": 1}', "t"),
    ],
)
def test_a_field_named_twice_is_no_silent_loss(tmp_path, line, name):
    for ending, data in (("a.jsonl", line), ("b.json", f"[{line}]"), ("c.json", line)):
        (tmp_path / ending).write_text(data)
        (row,) = read_rows(tmp_path / ending)
        assert isinstance(row, Rejected)
        assert row.code is RowFault.DUPLICATE_KEYS
        assert f"{name!r} is named twice" in row.reason
        assert row.excerpt == line


def test_texts_that_look_like_keys_are_none(tmp_path):
    row = {"text": '"a": 1, "a": 2', "b\\": "x", 'c"': "\\", "d": {"text": '{"text":'}}
    (tmp_path / "a.jsonl").write_text(json.dumps(row))
    assert list(read_rows(tmp_path / "a.jsonl")) == [Row(1, row)]


def test_a_line_that_is_too_long_is_named_and_not_held(tmp_path, monkeypatch):
    monkeypatch.setattr(reading, "LONGEST_LINE", 1000)
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "a"}\n{"text": "' + b"x" * 5000 + b'"}\n{"text": "b"}\n' + b"y" * 1001)
    rows = list(read_rows(path))
    assert [(row.number, isinstance(row, Row)) for row in rows] == [(1, True), (2, False), (3, True), (4, False)]
    assert rows[1].code is RowFault.TOO_LONG
    assert "5,013 bytes" in rows[1].reason
    assert rows[1].excerpt.startswith('{"text": "xxx')
    (tmp_path / "b.txt").write_bytes(b"z" * 1001)
    (row,) = read_rows(tmp_path / "b.txt")
    assert row.code is RowFault.TOO_LONG


@pytest.mark.slow
def test_a_line_of_200_megabytes_takes_no_200_megabytes(tmp_path):
    path = tmp_path / "a.jsonl"
    with path.open("wb") as file:
        file.write(b'{"text": "')
        for _ in range(200):
            file.write(b"x" * 2**20)
        file.write(b'"}\n{"text": "b"}\n')
    tracemalloc.start()
    rows = list(read_rows(path))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert [type(row) for row in rows] == [Rejected, Row]
    assert peak < 180 * 2**20


def test_long_json_lists_are_streamed(tmp_path, monkeypatch):
    monkeypatch.setattr(reading, "_WHOLE", 64)
    path = tmp_path / "a.json"
    path.write_text(json.dumps(ROWS, indent=1))
    assert [row.data for row in read_rows(path)] == ROWS
    path.write_text("\n".join(map(json.dumps, ROWS)))
    assert [row.data for row in read_rows(path)] == ROWS
    path.write_text(json.dumps(ROWS, indent=1)[:-30])
    with pytest.raises(DatasetParseFailedError, match="broken JSON at line"):
        list(read_rows(path))
    path.write_text(" " * 100 + json.dumps({"a": ROWS}, indent=1))
    with pytest.raises(DatasetParseFailedError, match="neither a list nor lines"):
        list(read_rows(path))


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**9), 10**9)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=6),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=80, deadline=None)
@given(items=st.lists(JSON, max_size=5), indent=st.sampled_from([None, 0, 2]), block=st.integers(1, 40))
def test_a_list_in_pieces_is_the_list(items, indent, block):
    import io

    from bp_data import json_text

    before, json_text._BLOCK = json_text._BLOCK, block
    try:
        found = read_items(io.BytesIO(json.dumps(items, indent=indent).encode()), 10_000)
        assert [json.loads(item.text) for item in found] == items
    finally:
        json_text._BLOCK = before


@pytest.mark.parametrize("text", ["[1 2]", "[1,", "[", "[1] 2", "[{]", '["a]', "{}", "[" * 5000, '["\udcff"]'])
def test_broken_lists_are_named(text):
    import io

    with pytest.raises(BrokenListError, match="line 1, column"):
        list(read_items(io.BytesIO(text.encode(errors="surrogateescape")), 10_000))
    with pytest.raises(BrokenListError, match="more than"):
        list(read_items(io.BytesIO(b'["' + b"x" * 3_000_000), 1000))


def test_a_csv_in_latin_1_loses_only_the_rows_that_cannot_be_read(tmp_path):
    path = tmp_path / "a.csv"
    path.write_bytes("question,answer\nWho?,René\nWhy?,So\n".encode("latin-1"))
    bad, good = read_rows(path)
    assert (bad.number, bad.code, bad.reason) == (2, RowFault.NOT_UTF8, "column 'answer': byte 0xe9 is not UTF-8")
    assert bad.excerpt == "Who?,Ren\ufffd"
    assert good.data == {"question": "Why?", "answer": "So"}
    path.write_bytes("qué,answer\na,b\n".encode("latin-1"))
    with pytest.raises(DatasetParseFailedError, match="0xe9") as caught:
        list(read_rows(path))
    assert "data.encoding=" in caught.value.fix


def test_a_table_gives_no_call_the_arguments_of_another(tmp_path):
    def call(name, **arguments):
        return {"type": "function", "function": {"name": name, "arguments": arguments}}

    turns = [{"role": "user", "content": "Q"}, {"role": "assistant", "tool_calls": [call("a", x=1), call("b", y="2")]}]
    (row,) = read_rows(write(tmp_path / "a.parquet", [{"messages": turns}]))
    assert row.data["messages"] == turns
    assert "content" not in row.data["messages"][1]
