# ruff: noqa: RUF005 - long lists read better in parts
"""Rows that no one would write: any JSON, nearly right rows, hostile words, torn files. Run long with ``-m slow``.

``FOUND`` are inputs that once broke something; they stay.
"""

import gzip
import importlib.util
import json
import os
from array import array
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from bp_data import (
    PairRow,
    PrepareRequest,
    build_report,
    clean_file,
    load_template,
    load_tokenizer,
    prepare,
    read_rows,
    report_html,
    report_text,
)
from bp_data.errors import RowFault
from bp_data.example import Rejected, Row
from bp_data.files import load_zstd
from bp_data.labels.encoder import Encoder
from bp_data.ledger import Ledger
from bp_data.packing import fit_rows
from bp_data.token_rows import TokenRow
from bp_runs.errors import CodedError

_spec = importlib.util.spec_from_file_location("bp_data_families", Path(__file__).with_name("conftest.py"))
families = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(families)

LONG = int(os.environ.get("BP_DATA_FUZZ", "20000"))  # examples of each long run
SCALARS = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=6)
    | st.sampled_from(
        ["user", "assistant", "system", "tool", "gpt", "human", "function_call", "Q", "A", " ", "", "\n", "<|im_end|>"]
        + [
            "<|im_start|>assistant\n",
            "<think>",
            "</think>",
            "\ue0f3turn\ue0f3",
            "\ue0f0\ue0f1",
            "\ue0f40\ue0f4",
            "\u2003",
        ]
        + ['{"name": "f", "arguments": "{}"}', "\ufffd", "\x00", "\ud800", "a" * 300, "True", "1"]
    )
)
NAMES = st.sampled_from(
    [
        "messages",
        "conversations",
        "instruction",
        "input",
        "output",
        "system",
        "history",
        "prompt",
        "completion",
        "label",
    ]
    + ["question", "answer", "response", "context", "text", "tools", "functions", "chosen", "rejected", "role", "from"]
    + [
        "content",
        "value",
        "weight",
        "tool_calls",
        "function_call",
        "name",
        "function",
        "arguments",
        "reasoning_content",
    ]
)
ANY = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(NAMES | st.text(max_size=3), inner, max_size=5),
    max_leaves=20,
)
TURN = st.fixed_dictionaries(
    {"role": st.sampled_from(["user", "assistant", "system", "tool"]), "content": SCALARS},
    optional={"tool_calls": ANY, "name": ANY, "reasoning_content": ANY, "weight": ANY},
)
NEARLY = st.fixed_dictionaries({"messages": st.lists(TURN, max_size=5)}, optional={"tools": ANY, "id": ANY})
ROWS = st.dictionaries(NAMES, ANY, max_size=5) | NEARLY
MANY_ROWS = st.lists(ROWS, min_size=1, max_size=4)

FOUND = [
    {"messages": [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "\ue0f40\ue0f4"}]},
    {
        "messages": [
            {"role": "user", "content": "\ue0f3turn\ue0f3"},
            {"role": "assistant", "content": "\ue0f3turn\ue0f3"},
        ]
    },
    {"prompt": "Q", "completion": "A", "label": []},
    {"chosen": [], "rejected": []},
    {"prompt": {}, "completion": {}},
    {"text": "\ud800"},
    {"messages": [{"role": "user", "content": "a\ud800"}, {"role": "assistant", "content": "b\udfff"}]},
]


def make_encoders(model):
    """An encoder for each template: those of this package's tests, and public ones kept beside them."""
    kinds = [
        ("chatml", families.QWEN),
        ("chatml", families.CHATML_MARKED),
        ("chatml", families.REASONER),
        ("mistral", families.MISTRAL),
        ("phi", families.PHI),
        *((family, families.read_template(name)) for name, family in families.PUBLIC.items()),
    ]
    made = []
    for family, template in kinds:
        folder = model(family, template)
        tokenizer = load_tokenizer(folder)
        made.append(Encoder(tokenizer, load_template(folder, tokenizer)))
    return made


@pytest.fixture(scope="module")
def encoders(model):
    return make_encoders(model)


def check_rows(encoders, rows):
    for encoder in encoders:
        encoded = encoder.encode_rows([Row(number, row) for number, row in enumerate(rows, 1)])
        found = [one.rejected or one.parts[0] for one in encoded]
        assert [one.number for one in found] == list(range(1, len(rows) + 1))
        for one in found:
            if isinstance(one, TokenRow):
                assert len(one.ids) == len(one.mask)
                assert one.mask.count(1)
            else:
                assert isinstance(one.code, RowFault)
                assert one.reason


def test_inputs_that_were_found(encoders):
    check_rows(encoders, FOUND)


@settings(max_examples=80, deadline=None, suppress_health_check=list(HealthCheck))
@given(MANY_ROWS)
def test_any_row_is_tokens_or_a_reason(encoders, rows):
    check_rows(encoders, rows)


@pytest.mark.slow
@settings(max_examples=LONG, deadline=None, suppress_health_check=list(HealthCheck))
@given(MANY_ROWS)
def test_any_row_is_tokens_or_a_reason_for_long(encoders, rows):
    check_rows(encoders, rows)


# What is asked holds a sign that no answer holds, so that a learnt sign is a question that was learnt.
ASKED, SAID = "\u00a7Q", "\u00a7A"
WORDS = st.lists(
    st.sampled_from(
        [
            "Hello",
            " ",
            "\n",
            "\n\n",
            "\t",
            "\r\n",
            "naïve",
            "e\u0301",
            "\U0001f600",
            "\u200d",
            "\u00a0",
            "你好",
            "\ufb01",
        ]
        + ["<|im_end|>", "<|im_start|>assistant\n", "</s>", "[INST] ", "[/INST]", "<|end|>", "<|endoftext|>", "<s>"]
        + ["<think>", "</think>", "<tool_call>", "{", "}", "{{ x }}", "{% if %}", "/no_think", "/system_override"]
    )
    | st.text(max_size=4),
    max_size=5,
).map("".join)
CHATS = st.tuples(
    st.none() | WORDS,
    st.lists(st.tuples(WORDS, WORDS, WORDS), min_size=1, max_size=4),
    st.booleans(),
)


def check_masks(encoders, chat):
    """No question is learnt, each answer is, and as many ends as answers."""
    system, turns, unfinished = chat
    messages = [] if system is None else [{"role": "system", "content": system + ASKED}]
    for place, (asked, said, after) in enumerate(turns):
        messages.append({"role": "user", "content": asked + ASKED})
        if not (unfinished and place == len(turns) - 1):
            messages.append({"role": "assistant", "content": said + SAID + str(place) + after})
    for encoder in encoders:
        (encoded,) = encoder.encode_rows([Row(1, {"messages": messages})])
        found = encoded.rejected or encoded.parts[0]
        if isinstance(found, Rejected):
            assert isinstance(found.code, RowFault)
            continue
        assert len(found.ids) == len(found.mask)
        learnt = encoder.tokenizer.decode([token for token, flag in zip(found.ids, found.mask, strict=True) if flag])
        assert ASKED not in learnt
        assert not (unfinished and found.mask[-1])
        for place, (_, said, after) in enumerate(turns[: len(turns) - unfinished]):
            # Templates of reasoning models take what stands before the last </think> for reasoning, and drop it.
            assert f"{SAID}{place}" in learnt or "</think>" in said + SAID + after


LONG_ROWS = st.tuples(
    st.lists(st.tuples(st.integers(0, 5), st.booleans()), min_size=1, max_size=24),
    st.integers(2, 12),
    st.sampled_from(["truncate", "drop", "split", "fail"]),
    st.sampled_from(["chat", "text"]),
    st.frozensets(st.integers(0, 5), max_size=2),
)


def check_overflow(made):
    """Nothing is lost but what is counted, nothing is too long, nothing has nothing to learn."""
    tokens, longest, policy, kind, stops = made
    ids = array("i", [token for token, _ in tokens])
    mask = bytes(learnt or kind == "text" for _, learnt in tokens)
    row, ledger = TokenRow(1, ids, mask, kind), Ledger()
    found = fit_rows([row], longest, policy, stops, ledger)
    if isinstance(found, Rejected):
        assert ledger.read == 0
        assert found.code in (RowFault.OVERFLOW, RowFault.CUT_AWAY)
        assert len(ids) > longest
        return
    ledger.check()
    assert ledger.read == 1
    assert ledger.truncated_tokens == len(ids) - sum(len(piece.ids) for piece in found)
    if len(ids) <= longest:
        assert found == [row]
        return
    assert all(len(piece.ids) <= longest and piece.trained for piece in found)
    assert policy in ("truncate", "split")
    if policy == "truncate":
        (cut,) = found
        assert (cut.ids, cut.mask) == (ids[: len(cut.ids)], mask[: len(cut.ids)])
        ends = [at for at in range(1, longest) if mask[at] and ids[at] in stops]
        assert len(cut.ids) == (ends[-1] + 1 if ends and kind == "chat" else longest)
    else:
        whole = list(zip(ids, mask, strict=True))
        pieces = iter([whole[at : at + longest] for at in range(0, len(whole), longest)])
        assert all(list(zip(piece.ids, piece.mask, strict=True)) in pieces for piece in found), "in order, each once"


PIECES = st.lists(
    st.sampled_from(
        [
            b'{"prompt": "Q", "completion": "A"}',
            b'{"text": "T"}',
            b"\n",
            b"\r\n",
            b",",
            b"[",
            b"]",
            b"{",
            b"}",
            b'"',
            b"\xff",
            b"\x00",
        ]
        + [
            b"\xef\xbb\xbf",
            b"NaN",
            b'{"a": 1, "a": 2}',
            b"\\u",
            b"question,answer\n",
            b"a,b\n",
            b"PAR1",
            b" ",
            b"\\",
            b"1e5",
            b".",
        ]
    )
    | st.binary(max_size=4),
    max_size=12,
).map(b"".join)
FILES = st.tuples(
    st.sampled_from([".jsonl", ".json", ".csv", ".txt", ".md", ".parquet"]),
    st.sampled_from(["", ".gz", ".zst"]),
    PIECES,
    st.none() | st.integers(0, 60),
)


def check_file(folder, made):
    kind, packing, data, cut = made
    if packing:
        data = gzip.compress(data, mtime=0) if packing == ".gz" else load_zstd().compress(data)
    path = folder / f"f{kind}{packing}"
    path.write_bytes(data[:cut])
    try:
        rows = list(read_rows(path))
    except CodedError as error:
        json.dumps(error.to_dict())
        return
    assert all(isinstance(row, Row | Rejected) for row in rows)
    report = build_report(path)
    assert report.rows == len(rows) == report.usable + sum(found.count for found in report.rejected.values())
    report_text(report).encode(errors="surrogatepass")
    report_html(report).encode(errors="surrogatepass")
    done = clean_file(path, folder / "clean.jsonl")
    assert done.read == len(rows) == sum(done.written.values()) + done.ledger.dropped


@settings(max_examples=80, deadline=None, suppress_health_check=list(HealthCheck))
@given(FILES)
def test_any_file_is_rows_or_a_coded_error(tmp_path_factory, made):
    check_file(tmp_path_factory.getbasetemp(), made)


@pytest.mark.slow
@settings(max_examples=LONG, deadline=None, suppress_health_check=list(HealthCheck))
@given(FILES)
def test_any_file_is_rows_or_a_coded_error_for_long(tmp_path_factory, made):
    check_file(tmp_path_factory.getbasetemp(), made)


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(CHATS)
@example((None, [("", "", "</think>Hello"), ("", "", "")], False))  # dropped by a reasoning model's template
@example((None, [("", "", ""), ("", "", "")], True))
def test_only_answers_are_learnt(encoders, chat):
    check_masks(encoders, chat)


@pytest.mark.slow
@settings(max_examples=LONG, deadline=None, suppress_health_check=list(HealthCheck))
@given(CHATS)
def test_only_answers_are_learnt_for_long(encoders, chat):
    check_masks(encoders, chat)


@settings(max_examples=200, deadline=None)
@given(LONG_ROWS)
def test_long_rows_lose_only_what_is_counted(made):
    check_overflow(made)


ANSWERS = SCALARS | st.lists(TURN, max_size=3) | ANY
COMPARED = st.lists(
    st.fixed_dictionaries({}, optional={"prompt": ANSWERS, "chosen": ANSWERS, "rejected": ANSWERS, "tools": ANY})
    | st.fixed_dictionaries({"prompt": ANSWERS, "completion": ANSWERS, "label": SCALARS})
    | ROWS,
    min_size=1,
    max_size=5,
)
GOOD = [
    {"prompt": "Q", "chosen": "A", "rejected": "B"},
    {"prompt": "Q", "completion": "A", "label": True},
    {"prompt": "Q", "completion": "B", "label": False},
]


def check_compared(folder, model, rows):
    """No row is lost, two answers are never the same, and nothing of a prompt is learnt."""
    path = folder / "compared.jsonl"
    path.write_text("\n".join(map(json.dumps, [*GOOD, *rows])), encoding="utf-8")
    for kind in ("pairs", "judged"):
        found = prepare(PrepareRequest(path, model, 64, kind, on_bad_row="skip"))
        assert found.ledger.read == 3 + len(rows) == len(found.rows) + found.ledger.dropped
        for row in found.rows:
            parts = (row.chosen, row.rejected) if isinstance(row, PairRow) else (row.row,)
            assert all(part.number == row.number and part.trained and len(part.ids) <= 64 for part in parts)
            assert len({part.ids.tobytes() for part in parts}) == len(parts)


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(COMPARED)
def test_answers_are_pairs_or_a_reason(model, tmp_path_factory, rows):
    check_compared(tmp_path_factory.getbasetemp(), model("chatml", families.QWEN), rows)


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.lists(ROWS, min_size=1, max_size=5))
def test_prepare_loses_no_row(model, tmp_path_factory, rows):
    path = tmp_path_factory.getbasetemp() / "fuzz.jsonl"
    lines = [json.dumps(row) for row in [{"prompt": "Q", "completion": "A"}, *rows]]
    path.write_text("\n".join(lines), encoding="utf-8")
    ledger = prepare(PrepareRequest(path, model("chatml", families.QWEN), 256, on_bad_row="skip")).ledger
    assert ledger.read == len(lines) == ledger.whole + ledger.truncated + ledger.dropped
