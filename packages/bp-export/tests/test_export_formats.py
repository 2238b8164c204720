"""The other formats, the command line, and the file chatting in llama.cpp."""

import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
from export_pico import export_adapter, skip_without_llama_cpp, write_base, write_lora

from bp_export.chat import LlamaChat
from bp_export.cli.app import main
from bp_export.cli.options import FORMAT_NAMES
from bp_export.errors import ChatFailedError
from bp_export.export import FORMATS, build_request
from bp_export.gguf import read_settings
from bp_export.source import name_after
from bp_merge import FoldedModel, TensorReader, load_adapter, read_model_index
from bp_runs.errors import InvalidSettingError

WITHOUT_QUANTIZATION = ("merged", "lora", "gguf-adapter", "mlx")


@pytest.fixture
def lora(tmp_path):
    return write_lora(tmp_path / "lora", write_base(tmp_path / "pico"))


def test_merged_is_a_folder_that_transformers_loads_with_the_folded_weights(tmp_path, lora):
    transformers = pytest.importorskip("transformers")
    seen = []
    outcome = export_adapter(lora, format="merged", progress=lambda *step: seen.append(step))
    assert outcome.path == tmp_path / "pico-tuned-merged"
    assert seen[-1][0] == seen[-1][1]
    assert (outcome.path / "tokenizer.json").is_file()
    model = transformers.AutoModelForCausalLM.from_pretrained(outcome.path, dtype="auto")
    found = {name: value.float().numpy() for name, value in model.state_dict().items()}
    with FoldedModel(TensorReader(read_model_index(tmp_path / "pico")), load_adapter(lora)) as folded:
        for name, info in folded.tensors.items():
            expected = folded.read_rows(name, 0, info.rows).reshape(info.shape)
            assert np.array_equal(found[name], expected), name


def test_a_merged_folder_exports_to_the_same_file_as_the_adapter(tmp_path, lora):
    direct = export_adapter(lora, output=tmp_path / "a.gguf", name="x")
    merged = export_adapter(lora, format="merged", output=tmp_path / "merged")
    assert export_adapter(merged.path, output=tmp_path / "b.gguf", name="x").sha256 == direct.sha256


@pytest.mark.parametrize(
    ("base", "name"),
    [
        ("HuggingFaceTB/SmolLM2-135M-Instruct", "SmolLM2-135M-Instruct-tuned"),
        ("/models/mine/", "mine-tuned"),
        ("/cache/models--Qwen--Qwen2.5-0.5B/snapshots/0123abc", "Qwen2.5-0.5B-tuned"),
        ("", "model-tuned"),
    ],
)
def test_the_default_name_comes_from_the_base(base, name):
    assert name_after(base) == name


def test_lora_is_a_copy(tmp_path, lora):
    outcome = export_adapter(lora, format="lora", output=tmp_path / "copy")
    for file in lora.iterdir():
        assert (outcome.path / file.name).read_bytes() == file.read_bytes()
    assert outcome.tensors == 28


def test_another_base_can_be_given(tmp_path, lora):
    shutil.move(tmp_path / "pico", tmp_path / "elsewhere")
    assert export_adapter(lora, base=tmp_path / "elsewhere").path == tmp_path / "pico-tuned-q4_k_m.gguf"


@pytest.mark.parametrize("quantization", ["q8_0", "q4_k_m"])
def test_the_file_answers_in_llama_cpp(lora, quantization):
    skip_without_llama_cpp()
    with LlamaChat(export_adapter(lora, quantization=quantization).path, context=256) as chat:
        messages = [{"role": "user", "content": "the cat"}]
        first = chat.answer(messages, max_tokens=8)
        assert first == chat.answer(messages, max_tokens=8)
        assert chat.complete(messages, max_tokens=3)["finish_reason"] in ("stop", "length")


def test_what_is_no_gguf_does_not_chat(tmp_path):
    (tmp_path / "x.gguf").write_bytes(b"GGUF\x03\x00\x00\x00\x01")
    with pytest.raises(ChatFailedError):
        LlamaChat(tmp_path / "x.gguf")
    with pytest.raises(ChatFailedError):
        read_settings(tmp_path / "missing.gguf")


def test_the_command_prints_the_outcome_as_json(tmp_path, lora, capsys):
    assert (
        main([str(lora), "--no-verify", "--quantization", "Q8_0", "--output", str(tmp_path / "x.gguf"), "--json"]) == 0
    )
    outcome = json.loads(capsys.readouterr().out)
    assert outcome["path"] == str(tmp_path / "x.gguf")
    assert outcome["quantization"] == "q8_0"


def test_the_commands_errors_are_coded_and_have_no_traceback(tmp_path, lora, capsys):
    assert main([str(tmp_path / "nothing")]) == 1
    printed = capsys.readouterr().err
    assert printed.startswith("[INPUT_ADAPTER_INVALID]")
    assert "Traceback" not in printed
    assert main([str(lora), "--quantization", "q9", "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["code"] == "INPUT_EXPORT_QUANTIZATION"


def test_the_command_reports_an_interrupt(lora, capsys, monkeypatch):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("bp_export.formats.gguf.GgufExport.write", interrupt)
    assert main([str(lora)]) == 130
    assert "nothing was left" in capsys.readouterr().err


def test_the_commands_formats_are_the_tables():
    assert list(FORMATS) == list(FORMAT_NAMES)


@pytest.mark.parametrize("format", FORMATS)
def test_a_plan_names_what_is_written(format, tmp_path):
    lora = write_lora(tmp_path / "lora", write_base(tmp_path / "base"))
    options = (
        {"ollama_base": "x"} if format == "ollama-adapter" else {"quantization": "q8_0"} if format == "gguf" else {}
    )
    request = build_request(str(lora), format, output=str(tmp_path / "out.x"), **options)
    plan = request.plan()
    assert not plan.path.exists()
    assert any(tensor.is_changed for tensor in plan.tensors)
    written = request.write()
    assert (plan.path, len(plan.tensors)) == (written.path, written.tensors)
    assert plan.bytes <= written.bytes


@pytest.mark.parametrize(
    ("format", "option"),
    [
        ("merged", "quantization"),
        ("lora", "importance"),
        ("mlx", "pre"),
        ("gguf", "ollama_base"),
        ("merged", "split_bytes"),
    ],
)
def test_an_option_of_another_format_is_rejected(format, option, tmp_path):
    with pytest.raises(InvalidSettingError, match=f"{option}.* is for the format") as caught:
        build_request(tmp_path, format, **{option: "x"})
    assert caught.value.setting == option
    with pytest.raises(TypeError):
        build_request(tmp_path, format, quantisation="q8_0")


def test_import_and_help_are_light():
    script = "import sys, bp_export, bp_export.cli.app; assert not {'numpy', 'gguf', 'torch'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", script], check=True)


@pytest.mark.parametrize("group", ["", "chat", "gguf", "hub", "ollama", "quant", "verify"])
def test_public_names_are_real_and_exported(group):
    import bp_export

    package = getattr(bp_export, group) if group else bp_export
    assert len(package.__all__) == len(set(package.__all__))
    assert all(getattr(package, name) is not None for name in package.__all__)
    with pytest.raises(AttributeError):
        _ = package.nonsense


def test_it_works_where_frameworks_cannot_be_imported(tmp_path, lora):
    """Every format, to the same weights as with frameworks installed; the command line too."""
    script = f"""
import sys
from pathlib import Path
class Blocker:
    def find_spec(self, name, path=None, target=None):
        blocked = {{"torch", "transformers", "peft", "trl", "datasets", "safetensors", "tokenizers", "xllamacpp"}}
        if name.partition(".")[0] in blocked:
            raise ImportError(f"{{name}} is blocked")
sys.meta_path.insert(0, Blocker())
from bp_export import export_adapter
from bp_export.chat import LlamaChat
from bp_export.cli.app import main
from bp_export.errors import LlamaCppMissingError
outcome = export_adapter(Path({str(lora)!r}))
assert outcome.parity is None
for format in {WITHOUT_QUANTIZATION!r}:
    export_adapter(Path({str(lora)!r}), format=format, output=Path({str(tmp_path / "without")!r}) / format)
assert main([{str(lora)!r}, "--format", "gguf", "--quantization", "q8_0"]) == 0
try:
    LlamaChat(outcome.path)
except LlamaCppMissingError as error:
    print(error)
"""
    (tmp_path / "without").mkdir()
    (tmp_path / "with").mkdir()
    done = subprocess.run([sys.executable, "-c", script], check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "[DEP_LLAMA_CPP_MISSING]" in done.stdout
    assert {path.name for path in tmp_path.glob("*.gguf")} == {"pico-tuned-q4_k_m.gguf", "pico-tuned-q8_0.gguf"}
    for format in WITHOUT_QUANTIZATION:
        export_adapter(lora, format=format, output=tmp_path / "with" / format)
    written = [path for path in (tmp_path / "with").rglob("*") if path.suffix in {".safetensors", ".gguf", ""}]
    written = [path for path in written if path.is_file()]
    assert len(written) >= len(WITHOUT_QUANTIZATION)
    for path in written:
        assert path.read_bytes() == (tmp_path / "without" / path.relative_to(tmp_path / "with")).read_bytes(), path
