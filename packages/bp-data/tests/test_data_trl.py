"""Masks against TRL's: the public template without marks here, TRL's own patched one with marks there.

The templates are read from the installed TRL (Apache-2.0), which ships the models' originals beside its patched ones.
"""

import importlib.util
from pathlib import Path

import pytest

from bp_data import load_template, load_tokenizer
from bp_data.example import Chat, Message, Row
from bp_data.labels.encoder import Encoder
from bp_data.labels.masks import mask_chat

transformers = pytest.importorskip("transformers")
_found = importlib.util.find_spec("trl")
if _found is None:
    pytest.skip("trl is not installed", allow_module_level=True)
TEMPLATES = Path(_found.submodule_search_locations[0]) / "chat_templates"

_spec = importlib.util.spec_from_file_location("bp_data_families", Path(__file__).with_name("conftest.py"))
families = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(families)

CHATS = {
    "one": [("user", "Hi"), ("assistant", "Hello there")],
    "two": [("user", "Hi <b>"), ("assistant", "Hello 😀\n"), ("user", "And now?"), ("assistant", "Paris.")],
    "system": [("system", "Be kind."), ("user", "Hi"), ("assistant", "Hello"), ("user", "Why"), ("assistant", "So")],
    # No answer begins with a line feed: it would share a token with the prompt's last one, and such rows are encoded in
    # pieces here, as the model will meet them, while TRL encodes over the border.
    "odd": [("user", " Hi "), ("assistant", "assistant\n"), ("user", "x"), ("assistant", "A\n\n")],
}
MODELS = [
    ("qwen2_5", "chatml"),
    ("qwen3", "chatml"),
    ("qwen3_instruct_2507", "chatml"),
    ("llama3", "llama"),
    ("phi3", "phi3"),
    ("phi3_5", "phi3"),
]


def turns_of(chat):
    return [{"role": role, "content": content} for role, content in chat]


def ours(folder, chat):
    tokenizer = load_tokenizer(folder)
    template = load_template(folder, tokenizer)
    ids, mask = mask_chat(Chat(tuple(Message(role, content) for role, content in chat)), tokenizer, template)
    (encoded,) = Encoder(tokenizer, template).encode_rows([Row(1, {"messages": turns_of(chat)})])
    (row,) = encoded.parts
    assert (list(row.ids), list(row.mask)) == (ids, list(mask)), "one by one and in a batch"
    return tokenizer, ids, list(mask)


def theirs(folder, chat, template):
    tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(folder)
    found = tokenizer.apply_chat_template(
        turns_of(chat), chat_template=template, return_dict=True, return_assistant_tokens_mask=True
    )
    return found["input_ids"], found["assistant_masks"]


def read(name):
    return (TEMPLATES / f"{name}.jinja").read_text(encoding="utf-8")


def hold_to_marks(tokenizer, ids, mask, theirs):
    """Our mask within that of the template's own marks, but for blanks, end tokens and the line that opens a turn."""
    their_ids, their_mask = theirs
    assert ids == their_ids
    assert all(theirs >= ours for ours, theirs in zip(mask, their_mask, strict=True))
    extra = [token for token, a, b in zip(ids, mask, their_mask, strict=True) if a != b]
    words = tokenizer.decode(extra)
    for token in ("<|im_start|>assistant", *tokenizer.added):
        words = words.replace(token, "")
    assert not words.strip()


@pytest.mark.parametrize("chat", CHATS)
@pytest.mark.parametrize(("name", "family"), MODELS)
def test_what_trl_trains_on_is_trained_on_but_for_blanks(model, name, family, chat):
    """TRL's marks take in the line feeds around an answer, which a model that answers never has to write."""
    marked = read(f"{name}_training")
    folder = model(family, marked)
    tokenizer, ids, mask = ours(folder, CHATS[chat])
    hold_to_marks(tokenizer, ids, mask, theirs(folder, CHATS[chat], marked))


@pytest.mark.parametrize("chat", CHATS)
def test_published_marks_are_kept_but_for_the_line_that_opens_a_turn(model, chat):
    """SmolLM3's original has marks itself, so TRL trains with it as it is."""
    original = families.read_template("smollm3-3b")
    folder = model("chatml", original)
    tokenizer, ids, mask = ours(folder, CHATS[chat])
    hold_to_marks(tokenizer, ids, mask, theirs(folder, CHATS[chat], original))


# Mistral's leaves a system prompt out, and the row is refused.
RENDERED = [(name, chat) for name in families.PUBLIC for chat in CHATS if (name[:7], chat) != ("mistral", "system")]


@pytest.mark.parametrize(("name", "chat"), RENDERED)
def test_originals_are_rendered_as_transformers_does(model, name, chat):
    original = families.read_template(name)
    folder = model(families.PUBLIC[name], original)
    _, ids, _ = ours(folder, CHATS[chat])
    tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(folder)
    assert ids == tokenizer.apply_chat_template(turns_of(CHATS[chat]), return_dict=True)["input_ids"]


EXPECTED = {
    "qwen2_5": ["Hello 😀\n<|im_end|>", "Paris.<|im_end|>"],
    "qwen3": ["Hello 😀\n<|im_end|>", "<think>\n\n</think>\n\nParis.<|im_end|>"],
    "qwen3_instruct_2507": ["Hello 😀\n<|im_end|>", "Paris.<|im_end|>"],
    "llama3": ["Hello 😀<|eot_id|>", "Paris.<|eot_id|>"],
    "llama3_1": ["Hello 😀<|eot_id|>", "Paris.<|eot_id|>"],
    "llama3_2": ["Hello 😀<|eot_id|>", "Paris.<|eot_id|>"],
    "phi3": ["Hello 😀\n<|end|>", "Paris.<|end|>"],
    "phi3_5": ["Hello 😀\n<|end|>", "Paris.<|end|>"],
    "lfm2": ["Hello 😀\n<|im_end|>", "Paris.<|im_end|>"],
}


@pytest.mark.parametrize(
    ("name", "family"), [*MODELS, ("llama3_1", "llama"), ("llama3_2", "llama"), ("lfm2", "chatml")]
)
def test_what_the_models_own_templates_learn(model, name, family):
    tokenizer, ids, mask = ours(model(family, read(name)), CHATS["two"])
    runs, run = [], []
    for token, learnt in [*zip(ids, mask, strict=True), (0, 0)]:
        if learnt:
            run.append(token)
        elif run:
            runs.append(tokenizer.decode(run))
            run = []
    assert runs == EXPECTED[name]


def test_tool_calls_are_learnt_in_qwen_and_llama(model):
    call = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Rome"}}}
    tools = [
        {"type": "function", "function": {"name": "weather", "description": "d", "parameters": {"type": "object"}}}
    ]
    turns = [
        {"role": "user", "content": "Weather?"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "12"},
        {"role": "assistant", "content": "Cool."},
    ]
    for name, family, end in (
        ("qwen2_5", "chatml", "<|im_end|>"),
        ("qwen3", "chatml", "<|im_end|>"),
        ("llama3_2", "llama", "<|eot_id|>"),
    ):
        folder = model(family, read(name))
        tokenizer = load_tokenizer(folder)
        (encoded,) = Encoder(tokenizer, load_template(folder, tokenizer)).encode_rows(
            [Row(1, {"messages": turns, "tools": tools})]
        )
        (row,) = encoded.parts
        learnt = tokenizer.decode([token for token, mask in zip(row.ids, row.mask, strict=True) if mask])
        assert '"name": "weather"' in learnt
        assert '{"city": "Rome"}' in learnt
        assert learnt.count(end) == 2
        assert "Cool." in learnt
        assert "12" not in learnt
