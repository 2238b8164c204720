"""The same text, tokens and masks as transformers' apply_chat_template, template by template."""

import importlib.util
from pathlib import Path

import pytest

from bp_data import load_template, load_tokenizer
from bp_data.example import Chat, Message
from bp_data.labels.masks import mask_chat

transformers = pytest.importorskip("transformers")

_spec = importlib.util.spec_from_file_location("bp_data_families", Path(__file__).with_name("conftest.py"))
families = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(families)

TURNS = [
    {"role": "user", "content": "Hi <b>&'\""},
    {"role": "assistant", "content": "Hello 😀"},
    {"role": "user", "content": "And\nnow?"},
    {"role": "assistant", "content": "Paris."},
]
CALLS = [
    {"role": "user", "content": "Weather?"},
    {
        "role": "assistant",
        "content": None,
        "tool_calls": [
            {"type": "function", "function": {"name": "weather", "arguments": {"city": "<Zürich>", "days": 2}}}
        ],
    },
    {"role": "tool", "content": "12"},
    {"role": "assistant", "content": "Cool."},
]
TOOLS = [
    {
        "type": "function",
        "function": {"name": "weather", "description": "Tells <it>.", "parameters": {"type": "object"}},
    }
]
# Loop controls, namespaces, whitespace control, tojson's options and the special tokens as variables.
ODD = (
    "{% set ns = namespace(count=0) %}\n{%- for m in messages %}\n    {% if loop.index > 3 %}{% break %}{% endif %}\n"
    "    {% set ns.count = ns.count + 1 %}\n{{ ns.count }}{{ m | tojson(indent=2) }}{{ eos_token }}\n"
    "{% endfor %}\n{{ dict(a=1) | tojson }}{{ bos_token is defined }}{{ tools is none }}{{ documents is none }}"
)


def reference(folder):
    return transformers.PreTrainedTokenizerFast.from_pretrained(folder)


@pytest.mark.parametrize(
    ("family", "template", "turns", "tools"),
    [
        ("chatml", families.CHATML, TURNS, None),
        ("chatml", families.CHATML_MARKED, TURNS, None),
        ("chatml", families.QWEN, TURNS, None),
        ("chatml", families.QWEN, CALLS, TOOLS),
        ("chatml", families.REASONER, TURNS, None),
        ("chatml", ODD, TURNS, None),
        ("llama", families.LLAMA3, TURNS, None),
        ("llama", ODD, TURNS, None),
        ("mistral", families.MISTRAL, TURNS, None),
        ("phi", families.PHI, TURNS, None),
    ],
)
def test_text_and_tokens_are_those_of_transformers(model, family, template, turns, tools):
    folder = model(family, template)
    theirs, tokenizer = reference(folder), load_tokenizer(folder)
    ours = load_template(folder, tokenizer)
    for prompt in (False, True):
        text = theirs.apply_chat_template(turns, tools=tools, tokenize=False, add_generation_prompt=prompt)
        assert ours.render(turns, tools, add_generation_prompt=prompt) == text
    ids = theirs.apply_chat_template(turns, tools=tools, tokenize=True, return_dict=True)["input_ids"]
    assert tokenizer.encode(ours.render(turns, tools)).ids == ids
    assert tokenizer.decode(ids) == theirs.decode(ids)


def test_masks_of_marked_templates_are_those_of_transformers(model):
    folder = model("chatml", families.CHATML_MARKED)
    found = reference(folder).apply_chat_template(
        TURNS, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    tokenizer = load_tokenizer(folder)
    chat = Chat(tuple(Message(turn["role"], turn["content"]) for turn in TURNS))
    ids, mask = mask_chat(chat, tokenizer, load_template(folder, tokenizer))
    assert (ids, list(mask)) == (found["input_ids"], found["assistant_masks"])


def test_reasoning_reaches_the_template_under_the_same_names(model):
    template = "{% for m in messages %}{{ m.reasoning_content }}/{{ m.thinking }}/{{ m.reasoning }};{% endfor %}"
    folder = model("chatml", template)
    for name in ("reasoning_content", "thinking", "reasoning"):
        turn = {"role": "assistant", "content": "x", name: "because"}
        ours = load_template(folder, load_tokenizer(folder)).render(
            [Message("assistant", "x", {name: "because"}).to_dict()]
        )
        assert ours == reference(folder).apply_chat_template([turn], tokenize=False)


def test_special_tokens_are_those_of_transformers(model):
    for family in families.SPECIALS:
        theirs, ours = reference(model(family)), load_tokenizer(model(family))
        assert (ours.bos_id, ours.eos_id, ours.pad_id) == (
            theirs.bos_token_id,
            theirs.eos_token_id,
            theirs.pad_token_id,
        )
