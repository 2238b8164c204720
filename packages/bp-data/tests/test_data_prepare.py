"""From a file to rows of tokens: the ledger's sum, bad rows, truncation, samples, the gate, the split, the preview."""

import importlib.util
import json
from array import array
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models

from bp_data import (
    IGNORED,
    ChatTemplate,
    Ledger,
    PrepareRequest,
    TokenRow,
    check_gate,
    load_template,
    load_tokenizer,
    prepare,
    preview_rows,
    split_rows,
)
from bp_data.errors import (
    DatasetFormatUnsupportedError,
    DatasetGateError,
    DatasetInvalidError,
    DatasetParseFailedError,
    RowFault,
    TemplateFailedError,
    TokenizerInvalidError,
)
from bp_data.example import Rejected
from bp_runs.errors import CodedError, ContractError

_spec = importlib.util.spec_from_file_location("bp_data_families", Path(__file__).with_name("conftest.py"))
families = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(families)


def qa(asked="Hi", said="Hello there"):
    return {"messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": said}]}


@pytest.fixture(scope="session")
def chatml(model):
    return model("chatml", families.CHATML)


def test_prepared_rows_and_facts(chatml, write_lines):
    path = write_lines([qa(), {"text": "Paris"}])
    prepared = prepare(PrepareRequest(path, chatml, 64))
    chat, text = prepared.rows
    assert (chat.number, chat.kind, text.number, text.kind) == (1, "chat", 2, "text")
    assert len(chat.ids) == len(chat.mask) == len(chat.labels())
    decode = prepared.tokenizer.decode
    assert decode([label for label in chat.labels() if label != IGNORED]) == "Hello there<|im_end|>"
    assert decode(text.ids) == "Paris<|im_end|>"
    assert prepared.facts.terminator_id == prepared.facts.eos_id == 2
    assert prepared.facts.pad_id == 0
    assert prepared.tokens == len(chat.ids) + len(text.ids)
    assert prepared.trained_tokens == chat.trained + text.trained
    assert (prepared.template.name, len(prepared.template.sha256), len(prepared.data_sha256)) == ("tokenizer", 64, 64)
    assert prepared.ledger.to_dict() == {
        "read": 2, "whole": 2, "truncated": 0, "truncated_tokens": 0, "dropped": 0, "dropped_by_code": {}, "unsampled": 0,
    }  # fmt: skip


def test_loaded_parts_may_be_given(chatml, write_lines):
    tokenizer = load_tokenizer(chatml)
    prepared = prepare(PrepareRequest(str(write_lines([qa()])), (tokenizer, load_template(chatml, tokenizer)), 64))
    assert prepared.tokenizer is tokenizer


@pytest.mark.parametrize(
    ("lines", "error", "words"),
    [
        ([json.dumps(qa()), "{broken"], DatasetParseFailedError, "data.jsonl, line 2: broken JSON at column 2"),
        ([json.dumps(qa()), "", '{"foo": 1}'], DatasetFormatUnsupportedError, "line 3: columns seen: foo"),
        ([json.dumps(qa(said=""))], DatasetInvalidError, "(line|row) 1: turn 2"),
        ([json.dumps(qa("x" * 100))], DatasetInvalidError, "(line|row) 1: of"),
    ],
)
def test_the_first_bad_row_ends_it_with_place_reason_and_fix(chatml, tmp_path, lines, error, words):
    path = tmp_path / "data.jsonl"
    path.write_text("\n".join(lines), encoding="utf-8")
    with pytest.raises(error, match=words) as caught:
        prepare(PrepareRequest(path, chatml, 32))
    assert isinstance(caught.value, CodedError)
    if error is not DatasetFormatUnsupportedError:
        assert 'data.on_bad_row="skip"' in caught.value.fix
    assert caught.value.details["row_code"].startswith("ROW_")


def test_skipped_rows_are_in_the_ledger_and_on_disk(chatml, tmp_path, write_lines):
    path = write_lines([qa(), {"foo": 1}, qa(said="word " * 40), qa("x" * 100), qa(said=" ")])
    prepared = prepare(PrepareRequest(path, chatml, 48, on_bad_row="skip"))
    ledger = prepared.ledger
    assert (ledger.read, ledger.whole, ledger.truncated, ledger.dropped) == (5, 1, 1, 3)
    assert ledger.dropped_by_code == {"ROW_COLUMNS_UNKNOWN": [2], "ROW_CUT_AWAY": [4], "ROW_EMPTY_TURN": [5]}
    assert ledger.truncated_rows == [3]
    assert [(row.number, len(row.ids) <= 48, row.truncated) for row in prepared.rows] == [
        (1, True, False),
        (3, True, True),
    ]
    out = tmp_path / "rejected.jsonl"
    ledger.write_rejected(out)
    written = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    assert [(entry["row"], entry["code"]) for entry in written] == [
        (2, "ROW_COLUMNS_UNKNOWN"),
        (4, "ROW_CUT_AWAY"),
        (5, "ROW_EMPTY_TURN"),
    ]
    assert all(set(entry) == {"file", "row", "code", "reason", "excerpt"} for entry in written)
    assert (written[0]["file"], written[0]["excerpt"]) == ("data.jsonl", '{"foo":1}')
    assert [name.name for name in tmp_path.iterdir() if "partial" in name.name] == []


def test_no_rows_left_is_refused_with_the_reasons(chatml, write_lines):
    with pytest.raises(DatasetGateError, match="no row is left") as caught:
        prepare(PrepareRequest(write_lines([{"foo": 1}, qa(said="")]), chatml, 64, on_bad_row="skip"))
    assert caught.value.cause == "2 read, 2 dropped: 1 × ROW_COLUMNS_UNKNOWN, 1 × ROW_EMPTY_TURN"
    assert caught.value.exit_status == 65


def test_chats_that_all_lose_their_end_are_refused(chatml, write_lines):
    with pytest.raises(DatasetGateError, match="never stop"):
        prepare(PrepareRequest(write_lines([qa(said="word " * 40)] * 2), chatml, 48))


def test_a_template_without_an_end_token_is_refused(model, write_lines):
    folder = model("chatml", "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}")
    with pytest.raises(DatasetGateError, match="never stop"):
        prepare(PrepareRequest(write_lines([qa()]), folder, 64))


def test_samples_are_counted_repeatable_and_in_order(chatml, write_lines):
    path = write_lines([qa(said=f"number {i}") for i in range(30)] + [{"foo": 1}])
    first, again, other = (
        prepare(PrepareRequest(path, chatml, 64, samples=8, seed=seed, on_bad_row="skip")) for seed in (1, 1, 2)
    )
    numbers = [row.number for row in first.rows]
    assert numbers == sorted(numbers) == [row.number for row in again.rows] != [row.number for row in other.rows]
    assert first.ledger.read + first.ledger.unsampled == 31
    assert prepare(PrepareRequest(path, chatml, 64, samples=100, on_bad_row="skip")).ledger.unsampled == 0


def test_arguments_out_of_range_are_the_callers_fault(chatml, write_lines):
    path = write_lines([qa()])
    for wrong in ({"max_seq_length": 1}, {"max_seq_length": 8, "samples": 0}):
        with pytest.raises(ContractError):
            prepare(PrepareRequest(path, chatml, **wrong))


ROWS = st.sampled_from(
    [
        qa(),
        qa(said="word " * 60),
        qa("long " * 60),
        qa(said=""),
        {"text": "T" * 90},
        {"text": "Paris"},
        {"foo": 1},
        {"text": 3},
        [1],
    ]
)


@settings(max_examples=40, deadline=None)
@given(rows=st.lists(ROWS, min_size=1, max_size=8), length=st.integers(2, 120), samples=st.none() | st.integers(1, 5))
def test_read_is_trained_and_truncated_and_dropped(chatml, tmp_path_factory, rows, length, samples):
    path = tmp_path_factory.getbasetemp() / "ledger.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    try:
        prepared = prepare(PrepareRequest(path, chatml, length, on_bad_row="skip", samples=samples))
    except DatasetGateError:
        return
    ledger = prepared.ledger
    assert ledger.read == ledger.whole + ledger.truncated + ledger.dropped
    assert ledger.read + ledger.unsampled == len(rows)
    assert len(prepared.rows) == ledger.whole + ledger.truncated
    seen = {row.number for row in prepared.rows} | {drop.number for drop in ledger.drops}
    assert len(seen) == ledger.read
    for row in prepared.rows:
        assert len(row.ids) == len(row.mask) <= length
        assert row.trained > 0


def test_the_ledger_notices_a_lost_row():
    ledger = Ledger()
    ledger.take_whole()
    ledger.take_dropped(Rejected(2, RowFault.NO_ANSWER, "x"))
    ledger.check()
    ledger.read += 1
    with pytest.raises(ContractError, match="3 read"):
        ledger.check()


def test_the_gate_finds_labels_formed_by_comparison_with_pad(model, write_lines):
    prepared = prepare(PrepareRequest(write_lines([qa()]), model("chatml", families.CHATML), 64))
    facts = replace(prepared.facts, pad_id=prepared.facts.eos_id)

    def by_pad(row):
        return [IGNORED if token == facts.pad_id else label for token, label in zip(row.ids, row.labels(), strict=True)]

    check_gate(prepared.rows, facts, prepared.ledger)
    with pytest.raises(DatasetGateError, match="should be trained on") as caught:
        check_gate(prepared.rows, facts, prepared.ledger, by_pad)
    assert "pad" in caught.value.cause


def test_the_gate_looks_at_every_row(chatml, write_lines):
    prepared = prepare(PrepareRequest(write_lines([qa()]), chatml, 64))
    nothing = TokenRow(9, array("i", [5, 2]), b"\x01\x00")
    with pytest.raises(DatasetGateError, match="row 9 has no token to learn"):
        check_gate([*prepared.rows, nothing], prepared.facts, prepared.ledger)
    endless = TokenRow(8, array("i", [5, 6]), b"\x00\x01")
    with pytest.raises(DatasetGateError, match="row 8"):
        check_gate([*prepared.rows, endless], prepared.facts, prepared.ledger)
    with pytest.raises(DatasetGateError, match="no row"):
        check_gate([], prepared.facts, Ledger())


def test_the_split_is_small_disjoint_and_repeatable():
    rows = list(range(100))
    train, held = split_rows(rows, 0.05, seed=3)
    assert (len(train), len(held), sorted(train + held)) == (95, 5, rows)
    assert (train, held) == split_rows(rows, 0.05, seed=3)
    assert held != split_rows(rows, 0.05, seed=4)[1]
    assert train == sorted(train)
    assert held == sorted(held)
    assert [len(split_rows(rows, heldout, 0)[1]) for heldout in (0, 0.0, 7, 0.001, 1000)] == [0, 0, 7, 1, 99]
    assert split_rows([1], 0.5, 0) == ([1], [])
    assert split_rows([], 5, 0) == ([], [])
    for wrong in (-1, 1.0, -0.1):
        with pytest.raises(ContractError):
            split_rows(rows, wrong, 0)


def test_the_preview_joins_to_the_text_and_never_parts_a_character(chatml, write_lines):
    prepared = prepare(PrepareRequest(write_lines([qa("你好 😀", "naïve 😃\n")]), chatml, 128))
    (pieces,) = preview_rows(prepared, 5)
    assert "".join(piece.text for piece in pieces) == prepared.tokenizer.decode(prepared.rows[0].ids)
    assert "".join(piece.text for piece in pieces if piece.trained) == "naïve 😃\n<|im_end|>"
    assert "\ufffd" not in "".join(piece.text for piece in pieces)
    assert {piece.text for piece in pieces if piece.special} == {"<|im_start|>", "<|im_end|>"}


def test_a_model_without_a_template_gets_chatml_by_name(model, tmp_path):
    for family, name, end in (
        ("chatml", "chatml", "<|im_end|>"),
        ("llama", "chatml-eos", "<|eot_id|>"),
        ("mistral", "chatml-eos", "</s>"),
    ):
        tokenizer = load_tokenizer(model(family))
        template = load_template(model(family), tokenizer)
        assert (template.source, template.name, template.terminator) == ("default", name, end)
    Tokenizer(models.BPE(vocab={"a": 0}, merges=[])).save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(TemplateFailedError, match="no token that ends"):
        load_template(tmp_path, load_tokenizer(tmp_path))


def test_templates_in_the_configuration(tmp_path):
    listed = [{"name": "default", "template": families.CHATML}, {"name": "tool_use", "template": families.QWEN}]
    folder = families.write_model(tmp_path / "m", "chatml", chat_template=listed)
    tokenizer = load_tokenizer(folder)
    template = load_template(folder, tokenizer)
    assert (template.source, set(template.texts)) == ("tokenizer_config.json", {"default", "tool_use"})
    (folder / "chat_template.jinja").write_text(families.CHATML_MARKED, encoding="utf-8")
    assert load_template(folder, tokenizer).text == families.CHATML_MARKED
    assert load_template(folder, tokenizer).sha256 == ChatTemplate(families.CHATML_MARKED, tokenizer).sha256
    (folder / "chat_template.jinja").write_bytes(b"\xff")
    with pytest.raises(TemplateFailedError):
        load_template(folder, tokenizer)
    folder = families.write_model(tmp_path / "n", "chatml", chat_template=[{"name": "default"}])
    with pytest.raises(TemplateFailedError, match="neither"):
        load_template(folder, tokenizer)


@pytest.mark.parametrize("raw", [b"", b"{", b"[]", b"{}", b'{"model": {"type": "BPE"}}', b"\xff"])
def test_damaged_tokenizers_are_coded(tmp_path, raw):
    with pytest.raises(TokenizerInvalidError, match=r"tokenizer\.json"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_bytes(raw)
    with pytest.raises(TokenizerInvalidError):
        load_tokenizer(tmp_path)


def test_damaged_files_beside_the_tokenizer_are_coded(tmp_path):
    for name in ("tokenizer_config.json", "special_tokens_map.json", "generation_config.json"):
        folder = families.write_model(tmp_path / name, "chatml")
        (folder / name).write_bytes(b"[1]")
        with pytest.raises(TokenizerInvalidError, match=name):
            load_tokenizer(folder)


def test_saved_truncation_and_padding_are_off_and_stops_are_read(tmp_path):
    folder = families.write_model(tmp_path / "m", "llama")
    core = Tokenizer.from_file(str(folder / "tokenizer.json"))
    core.enable_truncation(8)
    core.enable_padding(length=8)
    core.save(str(folder / "tokenizer.json"))
    (folder / "generation_config.json").write_text('{"eos_token_id": [1, 4, 9999]}', encoding="utf-8")
    tokenizer = load_tokenizer(folder)
    assert len(tokenizer.encode("Hello " * 30).ids) > 30
    assert len(tokenizer.encode("a").ids) == 1
    assert tokenizer.stop_ids == (4, 1)
    assert tokenizer.encode(" \n ").offsets[0] != (0, 0), "blanks keep their characters"
