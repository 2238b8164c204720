"""Rows on disk, the cache, overflow policies, filters, and masks found the quick way."""

import importlib.util
import sys
from array import array
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bp_data import (
    PairRows,
    PrepareRequest,
    TokenRow,
    TraceBand,
    load_template,
    load_tokenizer,
    prepare,
    preview_file,
    split_rows,
)
from bp_data.errors import DatasetGateError, DatasetInvalidError, DatasetParseFailedError, RowFault, RowFaultError
from bp_data.example import Chat, Message, Rejected, Row
from bp_data.labels.encoder import Encoder
from bp_data.labels.masks import mask_chat
from bp_data.labels.shapes import SpanFinder
from bp_data.labels.spans import find_spans
from bp_data.token_rows import TOKENS_FILE, TokenWriter
from bp_runs.errors import ContractError

_spec = importlib.util.spec_from_file_location("bp_data_families", Path(__file__).with_name("conftest.py"))
families = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(families)


def qa(*pairs):
    turns = [({"role": "user", "content": q}, {"role": "assistant", "content": a}) for q, a in pairs]
    return {"messages": [turn for pair in turns for turn in pair]}


@pytest.fixture(scope="session")
def chatml(model):
    return model("chatml", families.CHATML)


ROWS = st.lists(
    st.tuples(st.lists(st.integers(0, 2**31 - 1), min_size=1, max_size=9), st.booleans(), st.booleans()), max_size=9
)


@settings(max_examples=40, deadline=None)
@given(ROWS, st.booleans())
def test_a_store_gives_back_what_it_took(tmp_path_factory, made, on_disk):
    rows = [
        TokenRow(place * 2**33, array("i", ids), bytes(i % 2 for i in ids), "text" if text else "chat", cut)
        for place, (ids, text, cut) in enumerate(made)
    ]
    folder = tmp_path_factory.mktemp("store") if on_disk else None
    writer = TokenWriter(folder)
    for row in rows:
        writer.append(row)
    found = writer.finish()
    if found is None:
        from bp_data import TokenRows

        found = TokenRows.open(folder, len(rows))
    assert found == rows
    assert list(found) == rows
    assert found[1:3] == rows[1:3]
    assert list(found.lengths()) == [len(row.ids) for row in rows]
    assert writer.tokens == sum(found.lengths())
    view = found.pick(range(len(rows) - 1, -1, -1))
    assert list(view) == rows[::-1]
    assert list(view.pick([0][: len(rows)])) == rows[::-1][:1]
    assert list(view.lengths()) == list(found.lengths())[::-1]
    with pytest.raises(IndexError):
        found[len(rows)]


def test_a_split_of_stored_rows_copies_nothing(chatml, write_lines):
    rows = prepare(PrepareRequest(write_lines([qa(("Q", f"A{i}")) for i in range(10)]), chatml, 64)).rows
    train, held = split_rows(rows, 0.2, seed=1)
    assert type(train) is type(held) is type(rows)
    assert sorted(row.number for row in [*train, *held]) == list(range(1, 11))


def test_a_curriculum_goes_from_short_to_long(chatml, tmp_path, write_lines):
    path = write_lines([qa(("Q", "A" * length)) for length in (9, 3, 7, 3)])
    for cache in (None, tmp_path / "c"):
        prepared = prepare(PrepareRequest(path, chatml, 64, curriculum="length", cache=cache))
        assert [row.number for row in prepared.rows] == [2, 4, 3, 1]
    assert not prepare(PrepareRequest(path, chatml, 63, cache=tmp_path / "c")).from_cache
    assert [row.number for row in prepare(PrepareRequest(path, chatml, 64, cache=tmp_path / "c")).rows] == [1, 2, 3, 4]


def test_the_second_start_comes_from_the_cache(chatml, tmp_path, write_lines):
    path = write_lines([qa(("Q", f"A{i}")) for i in range(5)] + [{"foo": 1}, qa(("Q", "word " * 99))])
    first, second = (
        prepare(PrepareRequest(path, chatml, 64, on_bad_row="skip", cache=tmp_path / "c")) for _ in range(2)
    )
    plain = prepare(PrepareRequest(path, chatml, 64, on_bad_row="skip"))
    assert (first.from_cache, second.from_cache, plain.from_cache) == (False, True, False)
    assert list(first.rows) == list(second.rows) == list(plain.rows)
    assert first.ledger == second.ledger == plain.ledger
    assert (second.tokens, second.trained_tokens) == (plain.tokens, plain.trained_tokens)


def test_whatever_changes_tokens_misses_the_cache(model, tmp_path, write_lines):
    cache, path, folder = tmp_path / "c", write_lines([qa(("Q", "A" * 30))]), model("chatml", families.CHATML)

    def hit(**more):
        given = {"path": path, "model": folder, "max_seq_length": 64, "cache": cache, **more}
        return prepare(PrepareRequest(**given)).from_cache

    assert not hit()
    assert hit()
    assert not hit(max_seq_length=63)
    assert not hit(samples=1)
    assert not hit(min_tokens=2)
    assert not hit(dedup="exact")
    assert not hit(on_overflow="drop")
    assert not hit(model=model("chatml", families.CHATML_MARKED))
    assert hit()
    path.write_text(path.read_text() + "\n")
    assert not hit()


def test_a_checkout_that_is_not_installed_has_a_cache(chatml, tmp_path, write_lines, monkeypatch):
    """Only on PYTHONPATH, as on machines without a network: packages have no version then."""
    monkeypatch.setattr(sys, "path", [p for p in sys.path if not list(Path(p).glob("bp_data-*.dist-info"))])
    with pytest.raises(PackageNotFoundError):
        version("bp-data")
    path = write_lines([qa(("Q", "A"))])
    assert [prepare(PrepareRequest(path, chatml, 64, cache=tmp_path / "c")).from_cache for _ in range(2)] == [
        False,
        True,
    ]


@pytest.mark.parametrize("damage", ["cut", "bit", "gone", "meta"])
def test_a_damaged_cache_is_made_again(chatml, tmp_path, write_lines, damage):
    path, cache = write_lines([qa(("Q", "A"))]), tmp_path / "c"
    wanted = list(prepare(PrepareRequest(path, chatml, 64, cache=cache)).rows)
    (entry,) = cache.iterdir()
    if damage == "cut":
        (entry / TOKENS_FILE).write_bytes((entry / TOKENS_FILE).read_bytes()[:-1])
    elif damage == "bit":
        raw = bytearray((entry / TOKENS_FILE).read_bytes())
        raw[0] ^= 1
        (entry / TOKENS_FILE).write_bytes(raw)
    elif damage == "gone":
        (entry / TOKENS_FILE).unlink()
    else:
        (entry / "meta.json").write_text("{")
    again = prepare(PrepareRequest(path, chatml, 64, cache=cache))
    assert not again.from_cache
    assert list(again.rows) == wanted
    assert prepare(PrepareRequest(path, chatml, 64, cache=cache)).from_cache


def test_a_failed_run_leaves_nothing_in_the_cache_and_old_entries_go(chatml, tmp_path, write_lines):
    cache = tmp_path / "c"
    with pytest.raises(DatasetInvalidError):
        prepare(PrepareRequest(write_lines([qa(("Q", ""))]), chatml, 64, cache=cache))
    assert list(cache.iterdir()) == []
    path = write_lines([qa(("Q", "A"))])
    for length in range(64, 76):
        prepare(PrepareRequest(path, chatml, length, cache=cache))
    assert len(list(cache.iterdir())) == 8


LONG = qa(("Q", "word " * 60))


@pytest.mark.parametrize(
    ("policy", "rows", "counts"),
    [
        ("truncate", [(1, 16), (2, 40)], (1, 1, 0)),
        ("drop", [(1, 16)], (1, 0, 1)),
    ],
)
def test_rows_that_are_too_long(chatml, write_lines, policy, rows, counts):
    prepared = prepare(
        PrepareRequest(write_lines([qa(("Hi", "Hello")), LONG]), chatml, 40, on_overflow=policy, on_bad_row="fail")
    )
    assert [row.number for row in prepared.rows] == [number for number, _ in rows]
    ledger = prepared.ledger
    assert (ledger.whole, ledger.truncated, ledger.dropped) == counts
    assert max(len(row.ids) for row in prepared.rows) <= 40


def test_overflow_fail_names_the_row_and_both_ways_out(chatml, write_lines):
    with pytest.raises(DatasetInvalidError, match="line 2: it has") as caught:
        prepare(
            PrepareRequest(write_lines([qa(("Hi", "Hello")), LONG]), chatml, 40, on_overflow="fail", on_bad_row="skip")
        )
    assert "model.max_seq_length=" in caught.value.fix
    assert caught.value.details["row_code"] == "ROW_OVERFLOW"


def test_a_split_row_loses_no_token(chatml, write_lines):
    path = write_lines([{"text": "word " * 99}, qa(("question " * 20, "A"))])
    whole = prepare(PrepareRequest(path, chatml, 4096))
    prepared = prepare(PrepareRequest(path, chatml, 32, on_overflow="split"))
    text = [row for row in prepared.rows if row.kind == "text"]
    assert [token for row in text for token in row.ids] == list(whole.rows[0].ids)
    assert [row.truncated for row in text] == [True] * (len(text) - 1) + [False]
    (chat,) = (row for row in prepared.rows if row.kind == "chat")
    assert chat.trained == whole.rows[1].trained
    ledger = prepared.ledger
    assert (ledger.read, ledger.whole, ledger.truncated, ledger.pieces) == (2, 1, 1, len(text) - 1)
    assert ledger.truncated_tokens == len(whole.rows[1].ids) - len(chat.ids)
    assert ledger.to_dict()["pieces"] == len(text) - 1


def test_a_document_is_split_unless_told_otherwise(chatml, tmp_path):
    (tmp_path / "a.md").write_text("word " * 200)
    assert len(prepare(PrepareRequest(tmp_path / "a.md", chatml, 32)).rows) > 3
    assert len(prepare(PrepareRequest(tmp_path / "a.md", chatml, 32, on_overflow="truncate")).rows) == 1


def test_a_cut_keeps_the_terminator_where_it_can(chatml, write_lines):
    prepared = prepare(PrepareRequest(write_lines([qa(("Hi", "Hello"), ("And?", "word " * 60))]), chatml, 60))
    (row,) = prepared.rows
    assert row.truncated
    assert row.ids[-1] == prepared.facts.terminator_id
    assert row.mask[-1] == 1
    assert "Hello" in prepared.tokenizer.decode(row.ids)
    assert "word" not in prepared.tokenizer.decode(row.ids)


def test_filters_drop_with_a_code_and_end_no_run(chatml, write_lines):
    path = write_lines(
        [qa(("Q", "The same words here")), qa(("Q ", "The same words here")), qa(("Q", "another answer"))]
    )
    prepared = prepare(PrepareRequest(path, chatml, 64, dedup="exact", min_tokens=4))
    assert prepared.ledger.dropped_by_code == {"ROW_DUPLICATE": [2]}
    assert prepared.ledger.drops[0].reason == "it is the same as row 1"
    assert prepare(
        PrepareRequest(path, chatml, 64, min_tokens=20, on_bad_row="skip")
    ).ledger.dropped_by_code.keys() <= {"ROW_TOO_SHORT"}


def trace(reasoning, said="Paris", **more):
    turn = {"role": "assistant", "content": f"{reasoning}{said}", **more}
    return {"messages": [{"role": "user", "content": "Q"}, turn]}


@pytest.mark.parametrize(
    ("row", "code"),
    [
        (trace("<think>The capital of France is asked.</think>\n"), None),
        (trace("", reasoning_content="The capital of France is asked."), None),
        (trace("<think>The capital of France is asked. \n"), "ROW_TRACE_UNBALANCED"),
        (trace("The capital of France is asked.</think>"), "ROW_TRACE_UNBALANCED"),
        (trace("<think>a</think><think>The capital of France</think>"), "ROW_TRACE_UNBALANCED"),
        (trace("words <think>The capital of France is asked.</think>"), "ROW_TRACE_UNBALANCED"),
        (trace("<think> </think>"), "ROW_TRACE_MISSING"),
        (trace(""), "ROW_TRACE_MISSING"),
        (trace("<think>The capital of France is asked.</think>", ""), "ROW_TRACE_MISSING"),
        (trace("<think>x</think>"), "ROW_TRACE_LENGTH"),
        (trace("<think>" + "long " * 99 + "</think>"), "ROW_TRACE_LENGTH"),
    ],
)
def test_reasoning_traces(chatml, write_lines, row, code):
    good = trace("<think>\nWe are asked for a capital.\n</think>\n\n")
    prepared = prepare(PrepareRequest(write_lines([good, row]), chatml, 2048, trace=TraceBand(4, 64)))
    if code:
        assert prepared.ledger.dropped_by_code == {code: [2]}
        return
    learnt = prepared.tokenizer.decode(
        [t for t, m in zip(prepared.rows[1].ids, prepared.rows[1].mask, strict=True) if m]
    )
    assert learnt.startswith("<think>")
    assert "The capital of France is asked." in learnt
    assert learnt.endswith("Paris<|im_end|>")


def test_a_filter_that_leaves_nothing_is_an_error(chatml, write_lines):
    with pytest.raises(DatasetGateError, match="no row is left") as caught:
        prepare(PrepareRequest(write_lines([trace("")]), chatml, 64, trace=TraceBand()))
    assert "ROW_TRACE_MISSING" in caught.value.cause


def test_a_template_that_drops_the_reasoning_drops_the_row(model, write_lines):
    folder = model("chatml", families.REASONER)
    with pytest.raises(DatasetInvalidError, match="leaves out the assistant's reasoning"):
        prepare(
            PrepareRequest(
                write_lines([trace("<think>The capital of France is asked.</think>\n")]),
                folder,
                2048,
                trace=TraceBand(4),
            )
        )


CONTENTS = st.sampled_from(
    [
        "Hi",
        " Hi ",
        "\nHi\n",
        "a<|im_end|>",
        "<|im_start|>assistant\n",
        "😀",
        "x</think>y",
        "\ue0f40\ue0f4",
        "</s>",
        "\u2003b",
    ]
)
FAMILIES = [
    ("chatml", families.CHATML),
    ("chatml", families.CHATML_MARKED),
    ("chatml", families.QWEN),
    ("chatml", families.REASONER),
    ("llama", families.LLAMA3),
    ("mistral", families.MISTRAL),
    ("phi", families.PHI),
]


@pytest.mark.parametrize(("family", "template"), FAMILIES)
@settings(max_examples=60, deadline=None)
@given(system=st.none() | CONTENTS, pairs=st.lists(st.tuples(CONTENTS, CONTENTS), min_size=1, max_size=3))
def test_the_quick_way_finds_what_the_long_way_finds(model, family, template, system, pairs):
    folder = model(family, template)
    tokenizer = load_tokenizer(folder)
    loaded = load_template(folder, tokenizer)
    turns = [Message(role, text) for pair in pairs for role, text in zip(("user", "assistant"), pair, strict=True)]
    chat = Chat((*([Message("system", system)] if system else []), *turns))
    try:
        wanted = find_spans(chat, tokenizer, loaded)
    except RowFaultError:
        return
    finder = SpanFinder(tokenizer, loaded)
    found = finder.find(chat)
    assert found.text == wanted.text
    assert found.spans == wanted.spans
    ids, mask = mask_chat(chat, tokenizer, loaded)
    data = {"messages": [{"role": m.role, "content": m.content} for m in chat.messages]}
    (encoded,) = Encoder(tokenizer, loaded, control_tokens="allow").encode_rows([Row(1, data)])
    (row,) = encoded.parts
    assert (list(row.ids), row.mask) == (ids, bytes(mask))


def test_the_quick_way_is_taken(model):
    folder = model("chatml", families.QWEN)
    tokenizer = load_tokenizer(folder)
    finder = SpanFinder(tokenizer, load_template(folder, tokenizer))
    chat = Chat(tuple(Message(role, f"text {i}") for i in range(20) for role in ("user", "assistant")))
    finder.find(chat)
    (skeleton,) = finder._known.values()
    assert skeleton is not None
    assert len(skeleton.borders) == 40


def test_bad_rows_pass_in_order_through_batches(chatml):
    tokenizer = load_tokenizer(chatml)
    rows = [
        Rejected(n, RowFault.NOT_OBJECT, "x")
        if n % 7 == 0
        else Row(n, qa(("Q", f"A{n}")) if n % 5 else {"text": f"T{n}"})
        for n in range(1, 700)
    ]
    found = list(Encoder(tokenizer, load_template(chatml, tokenizer)).encode_rows(rows))
    assert [row.number for row in found] == [row.number for row in rows]
    assert sum(row.rejected is not None for row in found) == 99


PAIR = {"prompt": "Q", "chosen": "good answer", "rejected": "bad"}


def test_pairs_learn_their_answers_only(chatml, write_lines):
    prepared = prepare(
        PrepareRequest(
            write_lines([PAIR, {**PAIR, "rejected": "good answer"}, qa(("Q", "A"))]),
            chatml,
            64,
            on_bad_row="skip",
            learns_from="pairs",
        )
    )
    (row,) = prepared.rows
    decode = prepared.tokenizer.decode

    def learnt(part):
        return decode([token for token, mask in zip(part.ids, part.mask, strict=True) if mask])

    assert (learnt(row.chosen), learnt(row.rejected)) == ("good answer<|im_end|>", "bad<|im_end|>")
    assert row.chosen.ids[: row.prompt] == row.rejected.ids[: row.prompt]
    assert prepared.ledger.dropped_by_code == {"ROW_SAME_ANSWERS": [2], "ROW_WRONG_KIND": [3]}


def test_answers_in_a_prompt_are_not_learnt(model, write_lines):
    turns = [
        {"role": "user", "content": "Q"},
        {"role": "assistant", "content": "first"},
        {"role": "user", "content": "R"},
    ]
    path = write_lines([{"prompt": turns, "completion": [{"role": "assistant", "content": "second"}]}])
    for family, template in (
        ("chatml", families.CHATML),
        ("chatml", families.CHATML_MARKED),
        ("mistral", families.MISTRAL),
    ):
        prepared = prepare(PrepareRequest(path, model(family, template), 96))
        (row,) = prepared.rows
        learnt = prepared.tokenizer.decode([t for t, m in zip(row.ids, row.mask, strict=True) if m])
        assert learnt.strip() in ("second<|im_end|>", "second</s>")


def test_pairs_that_are_too_long_or_bad(chatml, write_lines):
    long = {**PAIR, "chosen": "word " * 60}
    prepared = prepare(PrepareRequest(write_lines([long, PAIR]), chatml, 40, learns_from="pairs"))
    assert prepared.ledger.truncated_rows == [1]
    assert prepare(
        PrepareRequest(write_lines([long, PAIR]), chatml, 40, on_overflow="drop", learns_from="pairs")
    ).ledger.dropped_by_code == {"ROW_OVERFLOW": [1]}
    with pytest.raises(DatasetInvalidError, match="line 1"):
        prepare(PrepareRequest(write_lines([long, PAIR]), chatml, 40, on_overflow="fail", learns_from="pairs"))
    with pytest.raises(DatasetInvalidError, match="this run trains") as caught:
        prepare(PrepareRequest(write_lines([qa(("Q", "A"))]), chatml, 40, learns_from="pairs"))
    assert "training.method" in caught.value.fix
    with pytest.raises(DatasetInvalidError, match="the same"):
        prepare(PrepareRequest(write_lines([{**PAIR, "chosen": "bad"}]), chatml, 40, learns_from="pairs"))
    with pytest.raises(DatasetGateError, match="no row"):
        prepare(
            PrepareRequest(write_lines([{**PAIR, "chosen": "bad"}]), chatml, 40, on_bad_row="skip", learns_from="pairs")
        )
    for wrong in ({"max_seq_length": 1}, {"max_seq_length": 8, "on_overflow": "split"}):
        with pytest.raises(ContractError):
            prepare(PrepareRequest(write_lines([PAIR]), chatml, **wrong, learns_from="pairs"))


def test_answers_lie_on_disk_and_are_sorted_and_held_out_without_copies(chatml, write_lines):
    rows = [{**PAIR, "chosen": "word " * n, "rejected": f"bad {n}"} for n in range(30, 0, -1)]
    prepared = prepare(PrepareRequest(write_lines(rows), chatml, 256, curriculum="length", learns_from="pairs"))
    assert [row.number for row in prepared.rows] == list(range(30, 0, -1))
    assert list(prepared.rows.lengths()) == [len(r.chosen.ids) + len(r.rejected.ids) for r in prepared.rows]
    assert prepared.tokens == sum(prepared.rows.lengths())
    assert prepared.trained_tokens == sum(r.chosen.trained + r.rejected.trained for r in prepared.rows)
    kept, heldout = split_rows(prepared.rows, 0.2, 3)
    assert isinstance(heldout, PairRows)
    assert (len(kept), len(heldout)) == (24, 6)
    assert sorted(row.number for part in (kept, heldout) for row in part) == list(range(1, 31))
    assert [row.number for row in prepared.rows[1:3]] == [29, 28]
    assert prepared.rows[-1].number == 1
    with pytest.raises(IndexError):
        prepared.rows[30]


def test_each_pair_is_that_of_its_own_row_through_batches(chatml, write_lines):
    rows = [
        {"foo": 1}
        if n % 7 == 0
        else qa(("Q", "A"))
        if n % 11 == 0
        else {**PAIR, "chosen": f"+{n}", "rejected": f"-{n}"}
        for n in range(1, 900)
    ]
    prepared = prepare(PrepareRequest(write_lines(rows), chatml, 64, on_bad_row="skip", learns_from="pairs"))
    decode = prepared.tokenizer.decode
    for row in prepared.rows:
        assert f"+{row.number}<" in decode(row.chosen.ids)
        assert f"-{row.number}<" in decode(row.rejected.ids)
    assert prepared.ledger.read == 899 == len(prepared.rows) + prepared.ledger.dropped
    drops = [drop.number for drop in prepared.ledger.drops]
    assert drops == [n for n in range(1, 900) if n % 7 == 0 or n % 11 == 0]


def test_judged_answers(chatml, write_lines):
    rows = [{"prompt": "Q", "completion": "A", "label": True}, {"prompt": "Q", "completion": "B", "label": False}]
    prepared = prepare(PrepareRequest(write_lines(rows), chatml, 64, learns_from="judged"))
    assert [(row.number, row.label) for row in prepared.rows] == [(1, True), (2, False)]
    with pytest.raises(DatasetGateError, match="one label"):
        prepare(PrepareRequest(write_lines(rows[:1]), chatml, 64, learns_from="judged"))
    with pytest.raises(DatasetParseFailedError):
        path = write_lines(rows)
        path.write_text(path.read_text() + "{")
        prepare(PrepareRequest(path, chatml, 64, learns_from="judged"))


def test_formats_may_be_mixed_in_one_file(chatml, write_lines):
    rows = [
        qa(("Q", "A")),
        {"conversations": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}]},
        {"instruction": "Q", "output": "A"},
        {"question": "Q", "answer": "A"},
        {"instruction": "Q", "response": "A"},
        {"prompt": "Q", "completion": "A", "messages": None},
    ]
    prepared = prepare(PrepareRequest(write_lines(rows), chatml, 64))
    assert len({bytes(row.ids) for row in prepared.rows}) == 1
    assert prepared.ledger.whole == 6


def test_two_answers_in_a_row_are_both_learnt(model, write_lines):
    turns = [("user", "Q"), ("assistant", "one"), ("assistant", "two")]
    path = write_lines([{"messages": [{"role": role, "content": content} for role, content in turns]}])
    for family, template, end in (("chatml", families.CHATML, "<|im_end|>"), ("llama", families.LLAMA3, "<|eot_id|>")):
        prepared = prepare(PrepareRequest(path, model(family, template), 96))
        (row,) = prepared.rows
        learnt = prepared.tokenizer.decode([t for t, m in zip(row.ids, row.mask, strict=True) if m])
        assert learnt == f"one{end}two{end}"
    with pytest.raises(DatasetInvalidError, match="roles must alternate"):
        prepare(PrepareRequest(path, model("mistral", families.MISTRAL), 96))


def test_a_preview_shows_each_answer_of_rows_that_compare_or_judge(chatml, write_lines):
    judged = {"prompt": "Q", "completion": "A", "label": False}
    shown = preview_file(write_lines([PAIR, judged, {**PAIR, "chosen": "bad"}]), chatml, 40)
    assert [(row.number, row.answer) for row in shown] == [(1, "chosen"), (1, "rejected"), (2, "bad"), (3, "")]
    trained = ["".join(piece.text for piece in row.pieces if piece.trained) for row in shown]
    assert trained == ["good answer<|im_end|>", "bad<|im_end|>", "A<|im_end|>", ""]
    assert shown[-1].rejected.code is RowFault.SAME_ANSWERS


def test_a_preview_of_a_file_shows_what_is_cut_and_what_is_refused(chatml, write_lines):
    path = write_lines([qa(("Hi", "Hello")), {"foo": 1}, LONG, qa(("x" * 90, "A"))])
    first, bad, long, lost = preview_file(path, chatml, 40, rows=9)
    assert "".join(piece.text for piece in first.pieces if piece.trained) == "Hello<|im_end|>"
    assert (bad.pieces, bad.rejected.code) == ((), RowFault.COLUMNS_UNKNOWN)
    assert (long.tokens, long.rejected) == (40, None)
    assert long.cut == [piece.truncated for piece in long.pieces].count(True) > 0
    assert [piece.truncated for piece in long.pieces].count(False) == 40
    assert not any(piece.trained and piece.truncated for piece in long.pieces)
    assert lost.rejected.code is RowFault.CUT_AWAY
    assert all(piece.truncated for piece in lost.pieces)
    assert [row.number for row in preview_file(path, chatml, 40, rows=1, skip=2)] == [3]
    assert preview_file(path, chatml, 40, skip=2, rows=1, on_overflow="split")[0].tokens > 40
    assert preview_file(path, chatml, 40, skip=2, rows=1, on_overflow="drop")[0].rejected.code is RowFault.OVERFLOW
