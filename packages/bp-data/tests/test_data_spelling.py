"""Masks from what tokens spell, against masks from the tokenizer's own offsets."""

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import normalizers

from bp_data.example import Row
from bp_data.labels.encoder import Encoder
from bp_data.labels.spans import Marked, Span
from bp_data.labels.spelling import Spelling
from bp_data.templates.reader import load_template
from bp_data.tokens import Tokenizer, load_tokenizer

PIECES = (
    "the answer",
    " ",
    "\n",
    "é",
    "e\u0301",
    "😀",
    "👩\u200d🚀",
    "中",
    "<|im_end|>",
    "<|im_start|>assistant\n",
    "Ġ",
    "\x00",
)
WORDS = st.lists(st.sampled_from(PIECES), min_size=1, max_size=5).map("".join)


def encode_both(tokenizer, template, rows):
    """The rows' tokens, once as always and once without the short way."""
    short, long = Encoder(tokenizer, template), Encoder(tokenizer, template)
    assert short._spelling is not None
    long._spelling = None
    return list(short.encode_rows(rows)), list(long.encode_rows(rows))


def chats(pairs):
    return [
        Row(number, {"messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": told}]})
        for number, (asked, told) in enumerate(pairs, 1)
    ]


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(WORDS, WORDS), min_size=1, max_size=3))
@pytest.mark.parametrize("family", ["chatml", "llama", "mistral"])
def test_both_ways_give_the_same(model, family, pairs):
    folder = model(family)
    tokenizer = load_tokenizer(folder)
    short, long = encode_both(tokenizer, load_template(folder, tokenizer), chats(pairs))
    assert short == long


def test_texts_that_the_normalizer_changes_go_the_long_way(model):
    tokenizer = load_tokenizer(model("chatml"))
    tokenizer._core.normalizer = normalizers.NFC()
    template = load_template(model("chatml"), tokenizer)
    short, long = encode_both(tokenizer, template, chats([("Q", "plain"), ("Q", "cafe\u0301"), ("Q", "café")]))
    assert short == long
    assert all(row.mask.count(1) for row in short)


def test_tokens_that_spell_something_else_prove_nothing(model):
    tokenizer = load_tokenizer(model("chatml"))
    spelling = Spelling(tokenizer)
    text = "Hi 😀 there"
    ids = tokenizer.encode(text).ids
    whole = [Span(0, len(text))]
    assert spelling.mask(ids, Marked(text, whole)) == bytearray(b"\x01" * len(ids))
    assert spelling.mask(ids[:-1], Marked(text, whole)) is None
    assert spelling.mask(ids, Marked("Hi 😁 there", whole)) is None


def test_a_border_inside_a_token_is_not_passed_over(model):
    tokenizer = load_tokenizer(model("chatml"))
    end = [tokenizer.token_id("<|im_end|>")]
    spelling = Spelling(tokenizer)
    assert spelling.mask(end, Marked("<|im_end|>", [Span(0, 10)])) == bytearray(b"\x01")
    assert spelling.mask(end, Marked("<|im_end|>", [Span(1, 10)])) is None
    assert spelling.mask(end, Marked("<|im_end|>", [Span(0, 9)])) is None
    assert spelling.mask(end, Marked("<|im_end|>", [Span(3, 3)])) is None


def test_without_a_byte_decoder_there_is_no_short_way(model):
    tokenizer = load_tokenizer(model("chatml"))
    core = tokenizer._core
    core.decoder = None
    assert not Tokenizer(core, {}).spells_bytes
    assert not load_tokenizer(model("phi")).spells_bytes
