"""Classes without a native layout go through llama.cpp's own converter, and the gate compares them with transformers.

The heavy share needs the network once, for the converter: `just via`.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from export_pico import export_adapter, skip_without_llama_cpp, write_base, write_json, write_lora, write_tokenizer

import bp_export
from bp_export.architectures import ARCHITECTURES
from bp_export.cli.options import EXPORT
from bp_export.errors import (
    ArchitectureUnsupportedError,
    ConversionFailedError,
    ConverterMissingError,
    OutputTakenError,
)
from bp_export.formats.request import ViaChoice
from bp_export.gguf.stored import StoredWeights
from bp_export.gguf.writer import write_gguf
from bp_export.llama_cpp.classes import BUILD, VIA, list_classes
from bp_export.llama_cpp.convert import convert_folder
from bp_export.llama_cpp.environment import Converter, use_environment
from bp_export.llama_cpp.requantize import plan_requantized
from bp_export.quant.types import QUANTIZATIONS
from bp_export.tokenizer.vocabulary import read_vocabulary
from bp_merge import read_model_index
from bp_runs.errors import InvalidSettingError

OTHER = "StableLmForCausalLM"  # llama.cpp's converter knows it, and this package does not
SIZES = {
    "hidden_size": 256,
    "intermediate_size": 256,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
}


@pytest.fixture
def other(tmp_path):
    """An adapter on a base of a class without a native layout."""
    base = write_base(tmp_path / "base")
    config = json.loads((base / "config.json").read_text())
    write_json(base / "config.json", {**config, "architectures": [OTHER]})
    return write_lora(tmp_path / "lora", base)


def test_the_public_answer_says_how_a_class_is_written():
    shape = {"num_hidden_layers": 1, "num_attention_heads": 1, "hidden_size": 8, "vocab_size": 9}
    native = bp_export.supports({**shape, "architectures": ["LlamaForCausalLM"]})
    via = bp_export.supports({**shape, "architectures": [OTHER]})
    neither = bp_export.supports({"architectures": ["NobodyForCausalLM"]})
    option = bp_export.supports({**shape, "architectures": ["LlamaForCausalLM"], "hidden_act": "gelu"})
    assert [bool(row) for row in (native, via, neither, option)] == [True, True, False, False]
    assert [row.words for row in (native, via, neither, option)] == ["native", f"via llama.cpp b{BUILD}", "no", "no"]
    assert native.reason == ""
    assert "NobodyForCausalLM" in neither.reason
    assert "gelu" in option.reason
    assert len(list_classes()) > 200
    assert set(bp_export.ARCHITECTURES) == set(ARCHITECTURES)


def test_offline_without_the_converter_says_what_to_do(other, tmp_path):
    with use_environment(tmp_path / "converter", is_offline=True), pytest.raises(ConverterMissingError) as caught:
        export_adapter(other)
    assert "offline" in caught.value.message
    assert "merged" in caught.value.hint
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "lora"], "nothing is left"


def test_a_file_that_is_taken_is_found_before_the_conversion(other, tmp_path):
    (tmp_path / "taken.gguf").write_bytes(b"GGUF")
    with use_environment(tmp_path / "nothing", is_offline=True), pytest.raises(OutputTakenError, match="exists"):
        export_adapter(other, output=tmp_path / "taken.gguf")


OPEN = """
import runpy, sys
runpy.run_path(sys.argv[1])["reject_model_code"]()
from transformers import AutoTokenizer
AutoTokenizer.from_pretrained(sys.argv[2], trust_remote_code=True)
"""


@pytest.mark.parametrize("where", ["tokenizer_config.json", "config.json"])
def test_the_converter_runs_no_code_of_a_model(tmp_path, where):
    pytest.importorskip("transformers")
    write_tokenizer(tmp_path / "model")
    (tmp_path / "model" / "code.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Own: pass\n")
    file = tmp_path / "model" / where
    kept = json.loads(file.read_text()) if file.exists() else {"model_type": "nobodys"}
    named = ["code.Own", None] if where.startswith("tokenizer") else "code.Own"
    kept.pop("tokenizer_class", None)
    write_json(file, {**kept, "auto_map": {"AutoTokenizer": named, "AutoConfig": "code.Own"}})
    driver = Path(bp_export.__file__).parent / "llama_cpp" / "driver.py"
    done = subprocess.run(
        [sys.executable, "-c", OPEN, driver, tmp_path / "model"], check=False, capture_output=True, text=True
    )
    assert done.returncode
    assert "asks to run its own code" in done.stderr
    assert not (tmp_path / "ran").exists()


def test_a_plan_needs_no_converter(other, tmp_path):
    with use_environment(tmp_path / "converter", is_offline=True):
        plan = bp_export.plan_export(other, quantization="q8_0")
    assert any(VIA in note for note in plan.notes)
    assert plan.bytes > 10_000


def test_native_only_offers_the_converter_where_it_knows_the_class(other):
    with pytest.raises(ArchitectureUnsupportedError) as caught:
        export_adapter(other, via="native")
    assert caught.value.fix.endswith('converter: format="gguf" via="llama.cpp"')
    with pytest.raises(InvalidSettingError, match="via"):
        export_adapter(other, via="magic")


def test_what_neither_knows_is_rejected(other, tmp_path):
    config = json.loads((tmp_path / "base" / "config.json").read_text())
    write_json(tmp_path / "base" / "config.json", {**config, "architectures": ["NobodyForCausalLM"]})
    for via in ("auto", "native", "llama.cpp"):
        with pytest.raises(ArchitectureUnsupportedError, match="NobodyForCausalLM"):
            export_adapter(other, via=via)


def test_an_option_that_the_native_layout_rejects_is_not_handed_over(tmp_path):
    base = write_base(tmp_path / "base", hidden_act="gelu")
    with pytest.raises(ArchitectureUnsupportedError, match="gelu"):
        export_adapter(base)


def test_the_choices_of_the_command_are_those_of_the_request():
    [option] = [row for row in EXPORT if row.name == "via"]
    assert option.choices == ViaChoice.__args__


def test_a_converter_that_fails_is_a_coded_error_with_its_last_words(tmp_path):
    broken = Converter(Path(sys.executable), tmp_path / "nothing")
    with pytest.raises(ConversionFailedError) as caught:
        convert_folder(broken, tmp_path, tmp_path / "x.gguf", type="bf16", without_vocabulary=True)
    assert "ModuleNotFoundError" in str(caught.value.cause)


def test_a_python_that_cannot_be_made_is_a_coded_error(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "executable", str(tmp_path / "no-python"))
    monkeypatch.setenv("PATH", str(tmp_path))
    from bp_export.llama_cpp.environment import ensure_converter

    told = []
    with use_environment(tmp_path / "home", notice=told.append), pytest.raises(ConverterMissingError) as caught:
        ensure_converter()
    assert "environment could not be made" in caught.value.message
    assert [str(BUILD) in text for text in told] == [True], "what is going to be downloaded is said first"
    assert [path.name for path in (tmp_path / "home").iterdir() if path.is_dir()] == []


@pytest.mark.parametrize("asked", ["bf16", "q4_k_m"])
def test_quantizing_a_gguf_gives_the_bytes_of_a_native_export(tmp_path, asked):
    base = write_base(tmp_path / "base", hidden=256, inner=256, layers=4, tied=False)
    plain = export_adapter(base, quantization="bf16", output=tmp_path / "plain.gguf").path
    direct = export_adapter(base, quantization=asked, output=tmp_path / "direct.gguf").path
    weights = StoredWeights(plain)
    vocabulary = read_vocabulary(base, vocab_size=None, model_config={})
    plan = plan_requantized(weights, vocabulary, quantization=QUANTIZATIONS[asked], writes_vocabulary=False)
    write_gguf(plan, weights, tmp_path / "again.gguf")
    assert (tmp_path / "again.gguf").read_bytes() == direct.read_bytes()


def write_pico(folder, name, **options):
    """A random model of transformers whose distributions differ from place to place."""
    import torch
    import transformers

    vocab = write_tokenizer(folder)
    kept = (folder / "tokenizer_config.json").read_text()
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**{**SIZES, "vocab_size": vocab, **options})
    model = getattr(transformers, f"{name}ForCausalLM")(config)
    with torch.no_grad():
        for key, weight in model.named_parameters():
            if weight.ndim == 2:
                weight.mul_(6 if "embed" in key else 5)
    model.to(torch.bfloat16).save_pretrained(folder)
    (folder / "tokenizer_config.json").write_text(kept)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("name", ["Starcoder2", "StableLm", "Arcee", "Ernie4_5"])
def test_classes_of_llama_cpp_pass_the_gate(tmp_path, name, llama_quantize):
    """The whole way: adapter, merged folder, converter, quantizer; compared with transformers and llama-quantize."""
    skip_without_llama_cpp()
    base = write_pico(tmp_path / "base", name)
    index = read_model_index(base)
    modules = {n.removesuffix(".weight"): i.shape for n, i in index.items() if len(i.shape) == 2 and "layers" in n}
    lora = write_lora(tmp_path / "lora", base, modules=modules, alpha=8)
    with use_environment(Path.home() / ".backpropagate" / "llama.cpp"):
        made = bp_export.export_adapter(lora, quantization="q8_0", output=tmp_path / "q8.gguf", verify=True)
        plain, packed = (
            bp_export.export_adapter(lora, quantization=asked, output=tmp_path / f"{asked}.gguf", verify=False).path
            for asked in ("bf16", "q4_k_m")
        )
    assert made.parity.result == "passed", made.parity.summary
    assert (made.via, made.parity.reference) == (VIA, "transformers")
    assert {check.name for check in made.parity.checks if check.result == "passed"} >= {
        "tokenizer",
        "template",
        "divergence",
        "stop",
        "effect",
    }
    llama_quantize(plain, tmp_path / "theirs.gguf", "q4_k_m")
    assert packed.read_bytes() == (tmp_path / "theirs.gguf").read_bytes()
    assert not list(tmp_path.glob(".via-*"))


@pytest.mark.slow
def test_a_base_without_weights_for_its_class_is_a_coded_error(other, tmp_path):
    """Llama's tensors under another class's name: the converter says which tensor is missing or unknown."""
    with (
        use_environment(Path.home() / ".backpropagate" / "llama.cpp"),
        pytest.raises(ConversionFailedError) as caught,
    ):
        export_adapter(other)
    assert caught.value.cause
