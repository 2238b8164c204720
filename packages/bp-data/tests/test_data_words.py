"""Ids put together from words, against those of the whole text."""

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, models, normalizers, pre_tokenizers

from bp_data import words
from bp_data.tokens import Tokenizer, load_tokenizer
from bp_data.words import WordEncoder, can_part

LEVEL = pre_tokenizers.ByteLevel(add_prefix_space=False)
BARE = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)


def split(pattern):
    return pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(pattern), "isolated"), BARE])


KINDS = {
    "gpt2": LEVEL,
    "digits": pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), LEVEL]),
    "llama3": split(words._PATTERNS[0]),
    "qwen": split(words._PATTERNS[1]),
}
PIECES = (
    *(
        "the answer",
        "the",
        "of a",
        " ",
        "  ",
        "\n",
        "\t",
        "\r\n",
        "\u00a0",
        "\u2003",
        "'s",
        "'S t",
        "I'll be",
        "don't x",
        "12",
        " 3",
        ".",
    ),
    *(
        "é",
        "e\u0301",
        "a \u0301b",
        "\u0301",
        "\u200d",
        "😀",
        "中文",
        "<|im_end|>",
        "x<|im_end|> y",
        "Ġ",
        "K",
        "ſ",
        "_",
        "-a b-",
        "\x00",
        "\x1c",
    ),
)
TEXTS = st.lists(st.one_of(st.sampled_from(PIECES), st.text(max_size=4)), max_size=12).map("".join)


@pytest.mark.parametrize("normalizer", [None, normalizers.NFC()], ids=["plain", "nfc"])
@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(texts=st.lists(TEXTS, min_size=1, max_size=4))
def test_words_make_the_text(model, kind, normalizer, texts):
    tokenizer = load_tokenizer(model("chatml"))
    tokenizer._core.pre_tokenizer = KINDS[kind]
    if normalizer is not None:
        tokenizer._core.normalizer = normalizer
    assert can_part(tokenizer)
    encoder = WordEncoder(tokenizer)
    for _ in range(2):  # the second time from what is kept
        assert encoder.encode_ids(texts) == [tokenizer.encode(text).ids for text in texts]


def test_no_more_is_kept_than_allowed(model, monkeypatch):
    monkeypatch.setattr(words, "_MOST", 3)
    tokenizer = load_tokenizer(model("chatml"))
    encoder = WordEncoder(tokenizer)
    text = "one two three four five six " + "long" * 20
    assert encoder.encode_ids([text]) == encoder.encode_ids([text]) == [tokenizer.encode(text).ids]
    assert len(encoder._known) == 3


@pytest.mark.parametrize(
    "splitting",
    [
        pre_tokenizers.ByteLevel(add_prefix_space=True),
        BARE,
        pre_tokenizers.Metaspace(),
        pre_tokenizers.Sequence([LEVEL, pre_tokenizers.Digits()]),
        split(r"\p{L}+ \p{L}+"),
        pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(words._PATTERNS[0]), "removed"), BARE]),
    ],
)
def test_other_pre_tokenizers_are_not_cut(model, splitting):
    tokenizer = load_tokenizer(model("chatml"))
    tokenizer._core.pre_tokenizer = splitting
    assert not can_part(tokenizer)


def test_nor_are_other_models_and_added_tokens(model):
    def changed(change):
        core = load_tokenizer(model("chatml"))._core
        change(core)
        return can_part(Tokenizer(core, {}))

    assert changed(lambda core: None)
    assert changed(lambda core: core.add_tokens(["   ", " word"]))
    assert not changed(lambda core: core.add_tokens(["two words"]))
    assert not changed(lambda core: core.add_tokens(["word "]))
    assert not changed(lambda core: core.add_tokens([AddedToken("word", single_word=True)]))
    assert not changed(lambda core: core.add_tokens([AddedToken("word", lstrip=True)]))
    assert not changed(lambda core: setattr(core, "normalizer", normalizers.Lowercase()))
    assert not changed(lambda core: setattr(core, "model", models.WordLevel({"a": 0}, "a")))
    assert not changed(lambda core: setattr(core.model, "dropout", 0.5))
