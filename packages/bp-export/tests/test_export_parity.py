"""The gate on files that are right, and on files that are wrong in each of the ways that it looks for."""

import json

import numpy as np
import pytest
from export_pico import export_adapter, skip_without_llama_cpp, write_base, write_lora

from bp_data.templates.conversations import CONVERSATIONS, TOOLS
from bp_data.templates.engine import ChatTemplate
from bp_data.templates.reader import SpecialTokens
from bp_export.cli.app import main
from bp_export.errors import ParityFailedError
from bp_export.gguf.plan import build_plan
from bp_export.gguf.writer import write_gguf
from bp_export.quant.types import QUANTIZATIONS
from bp_export.verify.parity import verify_gguf
from bp_export.verify.probe import Place, compute_divergence
from bp_export.verify.report import BOUNDS
from bp_merge import FoldedModel, TensorReader, load_adapter, read_model_index

skip_without_llama_cpp()

# ChatML with tools in the system's turn, calls as JSON and answers in the user's.
TOOL_TEMPLATE = (
    "{%- if tools %}{{- '<|im_start|>system\n' }}{%- if messages[0].role == 'system' %}{{- messages[0].content }}{%- else %}{{- 'You help.' }}{%- endif %}"
    '{{- "\n\n# Tools\n<tools>" }}{%- for tool in tools %}{{- "\n" }}{{- tool | tojson }}{%- endfor %}{{- "\n</tools><|im_end|>\n" }}'
    "{%- else %}{%- if messages[0].role == 'system' %}{{- '<|im_start|>system\n' + messages[0].content + '<|im_end|>\n' }}{%- endif %}{%- endif %}"
    "{%- for message in messages %}{%- if message.role == 'user' or (message.role == 'system' and not loop.first) or (message.role == 'assistant' and not message.tool_calls) %}"
    "{{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}"
    "{%- elif message.role == 'assistant' %}{{- '<|im_start|>' + message.role }}{%- if message.content %}{{- '\n' + message.content }}{%- endif %}"
    "{%- for tool_call in message.tool_calls %}{%- if tool_call.function is defined %}{%- set tool_call = tool_call.function %}{%- endif %}"
    "{{- '\n<tool_call>\n{\"name\": \"' }}{{- tool_call.name }}{{- '\", \"arguments\": ' }}{{- tool_call.arguments | tojson }}{{- '}\n</tool_call>' }}{%- endfor %}{{- '<|im_end|>\n' }}"
    "{%- elif message.role == 'tool' %}{%- if loop.index0 == 0 or messages[loop.index0 - 1].role != 'tool' %}{{- '<|im_start|>user' }}{%- endif %}"
    "{{- '\n<tool_response>\n' }}{{- message.content }}{{- '\n</tool_response>' }}{%- if loop.last or messages[loop.index0 + 1].role != 'tool' %}{{- '<|im_end|>\n' }}{%- endif %}{%- endif %}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("parity")
    write_base(folder / "base", hidden=256, inner=512, tied=False)
    write_lora(folder / "lora", folder / "base", alpha=64)
    return folder


@pytest.mark.parametrize("quantization", ["f16", "q8_0", "q4_k_m"])
def test_a_right_file_passes_and_nothing_is_left(folder, quantization):
    before = set(folder.iterdir())
    outcome = export_adapter(
        folder / "lora", quantization=quantization, output=folder / f"right-{quantization}.gguf", verify=True
    )
    assert set(folder.iterdir()) - before <= {outcome.path}
    report = outcome.parity
    found = {check.name: check for check in report.checks}
    assert list(found) == ["training", "template", "greedy", "divergence", "stop", "effect"]
    assert {check.result for check in report.checks[1:]} == {"passed"}
    assert (found["training"].result, found["training"].note[:10]) == ("skipped", "not tested")
    assert found["template"].note == "10 conversations"
    assert 0 <= found["divergence"].value <= BOUNDS[quantization].divergence
    assert found["effect"].value > 0.5
    assert report.reference == "f32"
    assert json.loads(json.dumps(report.to_dict()))["passed"] is True


def test_a_model_without_an_adapter_has_no_effect_to_show(folder):
    report = export_adapter(folder / "base", quantization="q8_0", output=folder / "b.gguf", verify=True).parity
    assert {check.name: check.result for check in report.checks}["effect"] == "skipped"


def test_tools_and_calls_give_the_same_ids(tmp_path):
    base = write_base(tmp_path / "base", kind="qwen2")
    (base / "chat_template.jinja").write_text(TOOL_TEMPLATE)
    text = ChatTemplate(TOOL_TEMPLATE, SpecialTokens({})).render(CONVERSATIONS[-1], TOOLS, add_generation_prompt=True)
    assert '"arguments": {"city": "Paris"}}' in text
    report = export_adapter(base, quantization="q8_0", verify=True).parity
    assert report.checks[1].note == "10 conversations"


def test_a_conversation_that_the_template_refuses_is_left_out(tmp_path):
    base = write_base(tmp_path / "base")
    refusal = (
        "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system') }}{% endif %}{% endfor %}"
    )
    template = (base / "chat_template.jinja").read_text()
    (base / "chat_template.jinja").write_text(refusal + template)
    report = export_adapter(base, quantization="q8_0", verify=True).parity
    assert report.checks[1].note == "8 conversations, 2 that the template refuses"


def test_another_splitting_rule_is_noticed(tmp_path, capsys):
    folder = tmp_path
    write_base(folder / "base", family="llama-bpe")
    arguments = [str(folder / "base"), "--pre", "smollm", "--quantization", "q8_0", "--verify"]
    assert main([*arguments, "--output", str(folder / "pre.gguf"), "--json"]) == 3
    error = json.loads(capsys.readouterr().out)
    assert error["code"] == "PARTIAL_EXPORT_PARITY_FAILED"
    table = {check["name"]: check for check in error["details"]["checks"]}
    assert table["template"]["result"] == "failed"
    assert "conversation 4" in table["template"]["note"]
    assert (folder / "pre.gguf").is_file()


def verify_written(folder, name, *, write_adapter=True, damage=None):
    """Write a file that is wrong, then look at it as if it were right."""
    base, path = folder / "base", folder / name
    asked = QUANTIZATIONS["q8_0"]
    with FoldedModel(TensorReader(read_model_index(base)), load_adapter(folder / "lora")) as model:
        plan = build_plan(model, base, quantization=asked, tokenizer=base, name="x")
        if write_adapter:
            write_gguf(plan, model, path)
        else:
            with FoldedModel(TensorReader(read_model_index(base))) as plain:
                write_gguf(plan, plain, path)
        if damage:
            damage(path)
        plan = build_plan(model, base, quantization=asked, tokenizer=base, name="x")
        return verify_gguf(path, plan, model, base=base, tokenizer=base, quantization=asked)


def test_damaged_weights_are_noticed(folder):
    def damage(path):
        raw = bytearray(path.read_bytes())
        half = len(raw) // 2
        raw[half:] = np.roll(np.frombuffer(raw[half:], np.uint8), 34 * 5).tobytes()
        path.write_bytes(raw)

    with pytest.raises(ParityFailedError, match="divergence") as caught:
        verify_written(folder, "damaged.gguf", damage=damage)
    assert caught.value.exit_status == 3


def test_a_lost_adapter_is_noticed(folder):
    assert verify_written(folder, "right.gguf").has_passed
    with pytest.raises(ParityFailedError, match="effect"):
        verify_written(folder, "lost.gguf", write_adapter=False)


def test_divergence_is_what_the_formula_says():
    places = [Place({i: float(np.log(p)) for i, p in enumerate(ps)}) for ps in ((0.5, 0.3, 0.2), (0.25, 0.25, 0.5))]
    expected = 0.5 * np.log(2) + 0.3 * np.log(0.3 / 0.25) + 0.2 * np.log(0.2 / 0.5)
    assert compute_divergence(*places) == pytest.approx(expected, abs=1e-6)
    assert compute_divergence(places[0], places[0]) == pytest.approx(0, abs=1e-9)
    assert places[0].best == 0
    assert places[0].lead == pytest.approx(np.log(0.5 / 0.3))


def test_every_quantization_has_a_bound_and_ten_conversations_are_tried():
    assert set(QUANTIZATIONS) <= set(BOUNDS)
    assert len(CONVERSATIONS) == 10
