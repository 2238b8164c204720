"""Every strategy for masks against the reference, which encodes one by one: this is where their equality is asserted."""

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import normalizers

from bp_data.example import Chat, Message
from bp_data.labels.masks import BySpelling, Masked, OneByOne, build_strategies, mask_chats
from bp_data.labels.proof import Marked, Span
from bp_data.labels.shapes import SpanFinder
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
WORDS = st.lists(st.sampled_from(PIECES), min_size=1, max_size=5).map("".join).filter(str.strip)


def marked_chats(tokenizer, template, pairs):
    finder = SpanFinder(tokenizer, template)
    return [finder.find(Chat((Message("user", asked), Message("assistant", told)))) for asked, told in pairs]


def as_lists(result):
    return (list(result.ids), bytes(result.mask)) if isinstance(result, Masked) else (result.code, result.reason)


def hold_to_reference(tokenizer, chats):
    """Each fast strategy gives what the reference gives, or leaves the chat to a slower one."""
    *fast, reference = build_strategies(tokenizer)
    assert isinstance(reference, OneByOne)
    wanted = list(map(as_lists, reference.mask(chats)))
    for strategy in fast:
        for found, expected in zip(strategy.mask(chats), wanted, strict=True):
            assert found is None or as_lists(found) == expected
    assert list(map(as_lists, mask_chats(chats, build_strategies(tokenizer)))) == wanted


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(WORDS, WORDS), min_size=1, max_size=3))
@pytest.mark.parametrize("family", ["chatml", "llama", "mistral", "phi"])
def test_every_strategy_equals_the_reference(model, family, pairs):
    folder = model(family)
    tokenizer = load_tokenizer(folder)
    hold_to_reference(tokenizer, marked_chats(tokenizer, load_template(folder, tokenizer), pairs))


def test_texts_that_the_normalizer_changes_are_left_to_a_slower_strategy(model):
    tokenizer = load_tokenizer(model("chatml"))
    tokenizer._core.normalizer = normalizers.NFC()
    template = load_template(model("chatml"), tokenizer)
    chats = marked_chats(tokenizer, template, [("Q", "plain"), ("Q", "cafe\u0301"), ("Q", "café")])
    hold_to_reference(tokenizer, chats)
    assert BySpelling(tokenizer).mask(chats)[1] is None


def test_tokens_that_spell_something_else_prove_nothing(model):
    tokenizer = load_tokenizer(model("chatml"))
    spelling = BySpelling(tokenizer)
    text = "Hi 😀 there"
    ids = tokenizer.encode(text).ids
    whole = [Span(0, len(text))]
    assert spelling.place(ids, Marked(text, whole)).mask == bytearray(b"\x01" * len(ids))
    assert spelling.place(ids[:-1], Marked(text, whole)) is None
    assert spelling.place(ids, Marked("Hi 😁 there", whole)) is None


@pytest.mark.parametrize(("span", "found"), [((0, 10), b"\x01"), ((1, 10), None), ((0, 9), None), ((3, 3), None)])
def test_a_border_inside_a_token_is_not_passed_over(model, span, found):
    tokenizer = load_tokenizer(model("chatml"))
    end = [tokenizer.token_id("<|im_end|>")]
    placed = BySpelling(tokenizer).place(end, Marked("<|im_end|>", [Span(*span)]))
    assert (placed and bytes(placed.mask)) == found


def test_which_strategies_serve_a_tokenizer(model):
    tokenizer = load_tokenizer(model("chatml"))
    core = tokenizer._core
    core.decoder = None
    assert [type(one).__name__ for one in build_strategies(Tokenizer(core, {}))] == ["ByOffsets", "OneByOne"]
    assert [type(one).__name__ for one in build_strategies(load_tokenizer(model("phi")))] == ["OneByOne"]
