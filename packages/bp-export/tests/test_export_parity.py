"""The gate on files that are right, and on files that are wrong in each of the ways that it looks for."""

import json

import numpy as np
import pytest
from export_pico import export_adapter, skip_without_llama_cpp, write_base, write_json, write_lora

from bp_data.templates.engine import ChatTemplate
from bp_data.templates.reader import SpecialTokens
from bp_data.templates.render_hashes import CONVERSATIONS, TOOLS
from bp_export.cli import main
from bp_export.errors import ParityFailedError, ParityNotTestedError
from bp_export.gguf.plan import build_plan
from bp_export.gguf.writer import write_gguf
from bp_export.quant.types import QUANTIZATIONS
from bp_export.verify import evidence
from bp_export.verify.parity import verify_gguf
from bp_export.verify.report import BOUNDS, ParityCheck, ParityReport
from bp_merge import FoldedModel, TensorReader, load_adapter, read_model_index, write_tensors

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


def results(report):
    return {check.name: check.result for check in report.checks}


@pytest.mark.parametrize("quantization", ["f16", "q8_0", "q4_k_m"])
def test_a_right_file_passes_and_nothing_is_left(folder, quantization):
    before = set(folder.iterdir())
    outcome = export_adapter(
        folder / "lora", quantization=quantization, output=folder / f"right-{quantization}.gguf", verify=True
    )
    assert set(folder.iterdir()) - before <= {outcome.path}
    report = outcome.parity
    found = {check.name: check for check in report.checks}
    expected = ["training", "tokenizer", "template", "witness", "greedy", "divergence", "stop", "effect"]
    assert list(found) == expected
    assert {name for name, result in results(report).items() if result == "not tested"} <= {
        "training", "witness", "greedy"
    }  # fmt: skip
    assert found["witness"].note == "training stored no witness of this model"
    assert found["template"].note == "10 conversations"
    assert found["stop"].note.startswith("<|im_end|> ends an answer")
    assert 0 <= found["divergence"].value <= BOUNDS[quantization].divergence
    assert found["effect"].value > 0.5
    assert report.reference == "independent forward pass"
    told = json.loads(json.dumps(report.to_dict()))
    assert (told["passed"], told["result"], told["counts"]["failed"]) == (True, "passed", 0)
    assert report.summary.startswith(f"passed: {told['counts']['passed']} checks passed, 0 failed")


def test_places_that_are_not_clear_are_not_a_proof(folder):
    """A random model is clear nowhere: no share of nothing is reported as passed."""
    report = export_adapter(folder / "base", quantization="q8_0", output=folder / "b.gguf", verify=True).parity
    greedy = next(check for check in report.checks if check.name == "greedy")
    assert (greedy.result, greedy.value) == ("not tested", None)
    assert greedy.note.endswith("4 are needed")
    assert "effect" not in results(report), "a model without an adapter has no effect to show"


def test_a_model_without_a_template_has_none_to_test(tmp_path):
    base = write_base(tmp_path / "base")
    (base / "chat_template.jinja").unlink()
    report = export_adapter(base, quantization="q8_0", verify=True).parity
    assert {name: results(report)[name] for name in ("tokenizer", "template", "stop")} == {
        "tokenizer": "passed", "template": "not tested", "stop": "not tested"
    }  # fmt: skip
    assert report.result == "passed", "its numbers were compared"


def test_what_was_not_compared_has_not_passed():
    checks = [ParityCheck("tokenizer", "passed", 1.0, 1.0, ""), ParityCheck("divergence", "not tested", None, None, "")]
    report = ParityReport(tuple(checks), None, "1", 0.0)
    assert (report.result, report.has_passed) == ("not tested", False)
    assert report.summary == "not tested: 1 checks passed, 0 failed, 1 not tested (divergence)"


def test_tools_and_calls_give_the_same_ids(tmp_path):
    base = write_base(tmp_path / "base", kind="qwen2")
    (base / "chat_template.jinja").write_text(TOOL_TEMPLATE)
    text = ChatTemplate(TOOL_TEMPLATE, SpecialTokens({})).render(CONVERSATIONS[-1], TOOLS, add_generation_prompt=True)
    assert '"arguments": {"city": "Paris"}}' in text
    report = export_adapter(base, quantization="q8_0", verify=True).parity
    assert next(check.note for check in report.checks if check.name == "template") == "10 conversations"


def test_a_conversation_that_the_template_refuses_is_left_out(tmp_path):
    base = write_base(tmp_path / "base")
    refusal = (
        "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system') }}{% endif %}{% endfor %}"
    )
    template = (base / "chat_template.jinja").read_text()
    (base / "chat_template.jinja").write_text(refusal + template)
    report = export_adapter(base, quantization="q8_0", verify=True).parity
    note = next(check.note for check in report.checks if check.name == "template")
    assert note == "8 conversations, 2 that the template rejects"


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


def verify_planted(written, real, *, lora=None, with_lora=True, quantization="f16", damage=None, **options):
    """Write a file from one folder, then look at it as if it came from another."""
    path, asked = real.parent / f"planted-{written.name}.gguf", QUANTIZATIONS[quantization]
    adapter = load_adapter(lora) if lora else None
    with FoldedModel(TensorReader(read_model_index(written)), adapter if with_lora else None) as model:
        write_gguf(build_plan(model, written, quantization=asked, tokenizer=real, name="x"), model, path)
        plan = build_plan(model, written, quantization=asked, tokenizer=real, name="x")
    if damage:
        damage(path)
    with FoldedModel(TensorReader(read_model_index(real)), adapter) as model:
        return verify_gguf(path, plan, model, base=real, tokenizer=real, quantization=asked, **options)


def copy_base(base, target, **config):
    target.mkdir()
    for file in base.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    write_json(target / "config.json", {**json.loads((base / "config.json").read_text()), **config})
    return target


def read_failed(caught):
    return {check["name"] for check in caught.value.details["checks"] if check["result"] == "failed"}


def test_damaged_weights_are_noticed(folder):
    def damage(path):
        raw = bytearray(path.read_bytes())
        half = len(raw) // 2
        raw[half:] = np.roll(np.frombuffer(raw[half:], np.uint8), 34 * 5).tobytes()
        path.write_bytes(raw)

    with pytest.raises(ParityFailedError, match="divergence") as caught:
        verify_planted(folder / "base", folder / "base", lora=folder / "lora", quantization="q8_0", damage=damage)
    assert caught.value.exit_status == 3


def test_a_lost_adapter_is_noticed(folder):
    with pytest.raises(ParityFailedError, match="effect"):
        verify_planted(folder / "base", folder / "base", lora=folder / "lora", with_lora=False, quantization="q8_0")


def test_a_lost_head_is_noticed(tmp_path):
    """Fault 1: the head was trained and saved, the config says tied, and the file has no output.weight."""
    real = write_base(tmp_path / "real", tied=False)
    tied = copy_base(real, tmp_path / "tied", tie_word_embeddings=True)
    tensors = read_tensors(real)
    del tensors["lm_head.weight"]
    write_tensors(tied / "model.safetensors", tensors, dtype="BF16")
    with pytest.raises(ParityFailedError) as caught:
        verify_planted(tied, real)
    assert "divergence" in read_failed(caught)


def read_tensors(folder):
    with TensorReader(read_model_index(folder)) as reader:
        return {name: reader.read(name) for name in reader.tensors}


def test_another_scale_of_yarn_is_noticed(tmp_path):
    """Fault 4: llama.cpp computes another temperature than config.json sets."""
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "rope_theta": 10000.0}
    plain = write_sharp(write_base(tmp_path / "plain", rope_scaling=yarn))
    real = copy_base(plain, tmp_path / "real", rope_scaling={**yarn, "attention_factor": 1.5})
    assert results(verify_planted(plain, plain))["divergence"] == "passed"
    with pytest.raises(ParityFailedError) as caught:
        verify_planted(plain, real)
    assert "divergence" in read_failed(caught)


@pytest.mark.parametrize("is_large", [False, True])
def test_a_window_that_llama_cpp_ignores_is_noticed(tmp_path, monkeypatch, is_large):
    """Fault 3. A model too large to be read past its window is tried in a reduced copy."""
    if is_large:
        monkeypatch.setattr(evidence, "_LONG_FACTOR", 0)
    plain = write_sharp(write_base(tmp_path / "plain", kind="mistral", sliding_window=None))
    real = copy_base(plain, tmp_path / "real", sliding_window=24)
    if is_large:
        monkeypatch.setattr("bp_export.verify.window.build_plan", _without_window)
    with pytest.raises(ParityFailedError) as caught:
        verify_planted(plain, real)
    assert "window" in read_failed(caught)


def _without_window(model, folder, **words):
    config = json.loads((folder / "config.json").read_text())
    write_json(folder / "config.json", {**config, "sliding_window": None})
    return build_plan(model, folder, **words)


def write_sharp(base):
    """Larger weights of attention, so that positions count."""
    tensors = read_tensors(base)
    for name in tensors:
        if "_proj" in name:
            tensors[name] = tensors[name] * np.float32(6)
    write_tensors(base / "model.safetensors", tensors, dtype="BF16")
    return base


def test_a_model_that_the_forward_pass_does_not_know_is_not_tested(tmp_path):
    plain = write_base(tmp_path / "plain")
    real = copy_base(plain, tmp_path / "real", architectures=["SomethingForCausalLM"])
    report = verify_planted(plain, real)
    assert (report.result, report.reference) == ("not tested", None)
    assert results(report)["divergence"] == "not tested"
    with pytest.raises(ParityNotTestedError, match="nothing could be compared") as caught:
        verify_planted(plain, real, required=True)
    assert "SomethingForCausalLM" in caught.value.cause


def test_every_quantization_has_a_bound_and_ten_conversations_are_tried():
    assert set(QUANTIZATIONS) <= set(BOUNDS)
    assert len(CONVERSATIONS) == 10
