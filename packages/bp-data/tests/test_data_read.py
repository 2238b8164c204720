"""Files as they come: whole, broken, empty, binary, with marks and odd line ends."""

import os

import pytest

from bp_data import read_rows
from bp_data.errors import (
    DatasetEmptyError,
    DatasetFormatUnsupportedError,
    DatasetNotFoundError,
    DatasetParseFailedError,
    DatasetUnreadableError,
    RowFault,
)
from bp_data.example import Rejected, Row
from bp_runs.errors import CodedError


@pytest.fixture
def put(tmp_path):
    def write(data, name="data.jsonl"):
        path = tmp_path / name
        path.write_bytes(data)
        return path

    return write


def test_line_numbers_survive_marks_crlf_and_blank_lines(put):
    path = put(b'\xef\xbb\xbf{"text": "a"}\r\n\r\n   \n{"text": "b\xe2\x80\xa8c"}\n\n{"text": "d"}')
    assert list(read_rows(path)) == [Row(1, {"text": "a"}), Row(4, {"text": "b\u2028c"}), Row(6, {"text": "d"})]


@pytest.mark.parametrize(
    ("line", "code", "words"),
    [
        (b'{"text": "a"', RowFault.JSON_BROKEN, "column 13"),
        (b"{'text': 'a'}", RowFault.JSON_BROKEN, "column 2"),
        (b'{"text": NaN}', RowFault.JSON_BROKEN, "column 10"),
        (b"[", RowFault.JSON_BROKEN, "belongs into a .json file"),
        (b'{"text": "\\ud800"}', RowFault.JSON_BROKEN, "column"),
        (b'{"text": "a\x00b"}', RowFault.JSON_BROKEN, "column"),
        (b"[" * 5000, RowFault.JSON_BROKEN, "column"),
        (b'{"text": "\xc3\xa9caf\xe9"}', RowFault.NOT_UTF8, "column 15: byte 0xe9"),
        (b"[1, 2]", RowFault.NOT_OBJECT, "a list"),
        (b"null", RowFault.NOT_OBJECT, "null"),
        (b'"a"', RowFault.NOT_OBJECT, "a text"),
        (b"3", RowFault.NOT_OBJECT, "a number"),
        (b"true", RowFault.NOT_OBJECT, "a truth value"),
    ],
)
def test_a_broken_line_is_named_and_the_others_are_read(put, line, code, words):
    # Far into the file, where a zero byte no longer makes it binary.
    filler = b'{"text": "' + b"x" * 70_000 + b'"}\n'
    rows = list(read_rows(put(filler + line + b'\n{"text": "c"}\n')))
    assert [row.number for row in rows] == [1, 2, 3]
    assert isinstance(rows[1], Rejected)
    assert rows[1].code is code
    assert words in rows[1].reason


def test_json_lists_objects_and_lines(put):
    assert list(read_rows(put(b'\xef\xbb\xbf[{"text": "a"}, 3]', "a.json"))) == [
        Row(1, {"text": "a"}),
        Rejected(2, RowFault.NOT_OBJECT, "the row is a number, not an object with named fields"),
    ]
    assert list(read_rows(put(b'{\n"text": "a"\n}', "b.json"))) == [Row(1, {"text": "a"})]
    lines = list(read_rows(put(b'{"text": "a"}\n{"text": \n{"text": "c"}', "c.JSON")))
    assert [type(row) for row in lines] == [Row, Rejected, Row]
    good, bad = read_rows(put(b'[{"text": "a"},\n{"text" "b"}]', "d.json"))
    assert (type(good), bad.number, bad.code) == (Row, 2, RowFault.JSON_BROKEN)
    with pytest.raises(DatasetParseFailedError, match="line 4, column"):
        list(read_rows(put(b'[{"text":\n"a"},\n{\n"text" "b"}]', "e.json")))


def test_a_long_field_of_a_table_is_read(put):
    (row,) = read_rows(put(b"a\n" + b"x" * 200_000, "a.csv"))
    assert len(row.data["a"]) == 200_000


def test_csv_keeps_line_numbers_and_quoted_line_feeds(put):
    path = put(b'\xef\xbb\xbfquestion, answer\r\n"a\nb",c\r\n\r\nd\r\n"e","f, ""g"""\r\n', "a.csv")
    assert list(read_rows(path)) == [
        Row(2, {"question": "a\nb", "answer": "c"}),
        Rejected(5, RowFault.CSV_FIELDS, "1 fields, and the header has 2"),
        Row(6, {"question": "e", "answer": 'f, "g"'}),
    ]
    for data in (b"a,a\n1,2\n", b'a\n"b\n', b'a\n"b"c\n', b"\xe9\na\n"):
        with pytest.raises(DatasetParseFailedError):
            list(read_rows(put(data, "b.csv")))


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv"])
@pytest.mark.parametrize("data", [b"", b"\n\n", b"\xef\xbb\xbf", b" \r\n"])
def test_empty_files(put, name, data):
    with pytest.raises(DatasetEmptyError):
        list(read_rows(put(data, name)))


def test_an_empty_list_and_a_lone_header_are_empty(put):
    for data, name in ((b"[]", "a.json"), (b"question,answer\n", "a.csv")):
        with pytest.raises(DatasetEmptyError):
            list(read_rows(put(data, name)))


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b'{"text": "a\x00"}', "zero byte at offset 11"),
        (b"\x1f\x8b\x08\x00", "gzip"),
        (b"PK\x03\x04", "zip"),
        (b"PAR1xx", "Parquet"),
        (b"\x28\xb5\x2f\xfd", "Zstandard"),
    ],
)
def test_binary_files_are_named_for_what_they_are(put, data, words):
    with pytest.raises(DatasetParseFailedError, match=words):
        list(read_rows(put(data)))


def test_missing_folder_and_other_endings(tmp_path, put):
    with pytest.raises(DatasetNotFoundError, match="nowhere"):
        list(read_rows(tmp_path / "nowhere.jsonl"))
    with pytest.raises(DatasetFormatUnsupportedError, match="folder"):
        list(read_rows(tmp_path))
    for name in ("a.docx", "a.jsonl.zip", ".jsonl", "a", "a.gz"):
        with pytest.raises(DatasetFormatUnsupportedError, match=r"\.jsonl, \.ndjson, \.json, \.csv"):
            list(read_rows(put(b"x", name)))
    with pytest.raises(CodedError):
        list(read_rows("a\x00b.jsonl"))
    with pytest.raises(CodedError):
        list(read_rows(tmp_path / ("x" * 300 + ".jsonl")))


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="permissions do not bind here")
def test_a_file_that_may_not_be_read(put):
    path = put(b"{}")
    path.chmod(0)
    with pytest.raises(DatasetUnreadableError):
        list(read_rows(path))


def test_rows_are_streamed(put):
    rows = read_rows(put(b'{"text": "a"}\n' * 3))
    assert next(rows) == Row(1, {"text": "a"})
