"""What is found instead of an adapter or a base: read, or refused with the way to convert it; never a traceback."""

import json
import shutil

import numpy as np
import pytest
from export_pico import export_adapter, write_base, write_json, write_lora

from bp_export.cli import main
from bp_export.errors import (
    AdapterFormatError,
    BaseModelNotFoundError,
    ModelInvalidError,
    PreTokenizerUnknownError,
    TokenizerUnsupportedError,
)
from bp_export.gguf import read_settings
from bp_export.hub.cache import find_cached_model, use_cache
from bp_export.tokenizer.pre import find_fitting_rules, recognise_pre
from bp_merge import TensorReader, read_index, write_tensors
from bp_runs.errors import OutputNotWritableError

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def base(tmp_path):
    return write_base(tmp_path / "base")


@pytest.fixture
def lora(tmp_path, base):
    return write_lora(tmp_path / "lora", base)


def change_json(path, **changes):
    write_json(path, {**json.loads(path.read_text()), **changes})


def test_a_base_named_by_its_hub_id_is_found_in_the_cache(tmp_path, base, lora, monkeypatch):
    cache = tmp_path / "hub"
    snapshot = cache / "models--acme--tiny" / "snapshots" / COMMIT
    shutil.copytree(base, snapshot)
    (cache / "models--acme--tiny" / "refs").mkdir()
    (cache / "models--acme--tiny" / "refs" / "main").write_text(COMMIT)
    plain = export_adapter(lora, name="x", output=tmp_path / "plain.gguf").sha256
    change_json(lora / "adapter_config.json", base_model_name_or_path="acme/tiny")
    with use_cache(cache):
        assert export_adapter(str(lora), name="x", output=str(tmp_path / "a.gguf")).sha256 == plain
        change_json(lora / "adapter_config.json", base_model_name_or_path="somebody/else")
        assert export_adapter(lora, base="acme/tiny", name="x", output=tmp_path / "b.gguf").sha256 == plain
        assert find_cached_model("acme/tiny", COMMIT[:7]) == snapshot
        assert find_cached_model("acme/tiny", "v2") is None
        with pytest.raises(BaseModelNotFoundError, match="nor in the Hub's cache") as caught:
            export_adapter(lora)
        assert "hf download somebody/else" in caught.value.hint
    monkeypatch.setenv("HF_HUB_CACHE", str(cache))
    assert main([str(lora), "--base", "acme/tiny", "--output", str(tmp_path / "c.gguf"), "--no-verify"]) == 0


@pytest.mark.parametrize(
    "name", ["unsloth/Llama-3.2-1B-Instruct-bnb-4bit", "Qwen/Qwen3-8B-FP8", "a/b-GPTQ-Int4", "a/b-AWQ"]
)
def test_a_packed_base_names_its_original(lora, base, name):
    original = {"unsloth": "unsloth/Llama-3.2-1B-Instruct", "Qwen": "Qwen/Qwen3-8B", "a": "a/b"}[name.split("/")[0]]
    change_json(base / "config.json", quantization_config={"quant_method": "gptq", "bits": 4}, _name_or_path=name)
    with pytest.raises(ModelInvalidError, match="gptq") as caught:
        export_adapter(lora)
    assert caught.value.fix.endswith(f'base="{original}"')
    change_json(lora / "adapter_config.json", base_model_name_or_path=name)
    with pytest.raises(BaseModelNotFoundError) as caught:
        export_adapter(lora)
    assert f"hf download {original})" in caught.value.hint
    change_json(base / "config.json", _name_or_path="")
    with pytest.raises(ModelInvalidError) as caught:
        export_adapter(lora, base=base)
    assert "/path/to/original" in caught.value.fix


def test_an_adapter_in_torchs_format(lora):
    (lora / "adapter_model.safetensors").rename(lora / "adapter_model.bin")
    with pytest.raises(AdapterFormatError, match=r"adapter_model\.bin is an adapter in torch's own format") as caught:
        export_adapter(lora)
    assert "save_file" in caught.value.fix


def test_a_base_in_torchs_format(base, lora):
    (base / "model.safetensors").rename(base / "pytorch_model.bin")
    with pytest.raises(ModelInvalidError, match=r"pytorch_model\.bin") as caught:
        export_adapter(lora)
    assert "save_pretrained" in caught.value.fix


def test_an_adapter_of_mlx(lora):
    made = export_adapter(lora, format="mlx")
    with pytest.raises(AdapterFormatError, match="mlx-lm"):
        export_adapter(made.path)


def test_a_folder_of_checkpoints_names_the_newest(tmp_path, base):
    for step in (5, 20, 100):
        write_lora(tmp_path / "out" / f"checkpoint-{step}", base)
    with pytest.raises(AdapterFormatError, match="holds 3 checkpoints") as caught:
        export_adapter(tmp_path / "out")
    assert caught.value.fix.endswith("checkpoint-100")


def test_names_that_hold_the_adapters_own(tmp_path, base, lora):
    plain = export_adapter(lora, output=tmp_path / "a.gguf").sha256
    file = lora / "adapter_model.safetensors"
    with TensorReader(read_index(file)) as reader:
        found = {name: reader.read(name) for name in reader.tensors}
    write_tensors(file, {name.replace(".weight", ".default.weight"): values for name, values in found.items()})
    assert export_adapter(lora, output=tmp_path / "b.gguf").sha256 == plain


def test_a_slow_tokenizer(base, lora):
    (base / "tokenizer.json").rename(base / "vocab.json")
    with pytest.raises(TokenizerUnsupportedError, match=r"no tokenizer\.json") as caught:
        export_adapter(lora)
    assert "AutoTokenizer" in caught.value.fix


def test_special_tokens_without_a_row_are_left_out(base, lora):
    tokenizer = json.loads((base / "tokenizer.json").read_text())
    rows = json.loads((base / "config.json").read_text())["vocab_size"]
    pad = {"id": rows, "content": "[PAD]", "single_word": False, "lstrip": False, "rstrip": False}
    pad |= {"normalized": False, "special": True}
    write_json(base / "tokenizer.json", {**tokenizer, "added_tokens": [*tokenizer["added_tokens"], pad]})
    change_json(base / "tokenizer_config.json", pad_token="[PAD]")
    made = export_adapter(lora)
    assert made.notes == (f"the model has no row for 1 special tokens, which are left out: [PAD] ({rows})",)
    found = read_settings(made.path)
    assert len(found["tokenizer.ggml.tokens"]) == rows
    assert found.get("tokenizer.ggml.padding_token_id", 0) < rows
    write_json(
        base / "tokenizer.json", {**tokenizer, "added_tokens": [*tokenizer["added_tokens"], {**pad, "special": False}]}
    )
    with pytest.raises(TokenizerUnsupportedError, match="only"):
        export_adapter(lora, force=True)


def test_an_output_where_no_file_can_be(lora):
    with pytest.raises(OutputNotWritableError):
        export_adapter(lora, output="/proc/x.gguf")


def read_tokenizer(base):
    return json.loads((base / "tokenizer.json").read_text())


@pytest.mark.parametrize(
    "idle",
    [
        {"type": "Sequence", "normalizers": []},
        {"type": "Sequence", "normalizers": [{"type": "Sequence", "normalizers": []}]},
        {"type": "Strip", "strip_left": False, "strip_right": False},
        {"type": "Prepend", "prepend": ""},
        {"type": "Replace", "pattern": {"String": " "}, "content": " "},
    ],
)
def test_a_normalizer_that_changes_nothing_is_none(base, idle):
    assert recognise_pre({**read_tokenizer(base), "normalizer": idle}) == "smollm"


def test_an_unknown_rule_names_the_known_one_that_splits_alike(base):
    """Spelled in another way than the table has it: two steps in sequences of their own."""
    pytest.importorskip("tokenizers")
    tokenizer = read_tokenizer(base)
    steps = tokenizer["pre_tokenizer"]["pretokenizers"]
    nested = {"type": "Sequence", "pretokenizers": [{"type": "Sequence", "pretokenizers": steps}]}
    with pytest.raises(PreTokenizerUnknownError) as caught:
        recognise_pre({**tokenizer, "pre_tokenizer": nested})
    assert "as llama.cpp's rule smollm does" in caught.value.fix
    assert caught.value.details["fitting"] == ["smollm"]
    other = {"type": "Split", "pattern": {"Regex": r"\w"}, "behavior": "Isolated", "invert": False}
    with pytest.raises(PreTokenizerUnknownError) as caught:
        recognise_pre({**tokenizer, "pre_tokenizer": {"type": "Sequence", "pretokenizers": [other, *steps]}})
    assert caught.value.details["fitting"] == []
    assert "pre=" not in caught.value.hint
    assert find_fitting_rules({**tokenizer, "pre_tokenizer": {"type": "Nothing"}}) == []


def test_weights_that_are_not_finite_stay_an_error(base, lora):
    file = lora / "adapter_model.safetensors"
    with TensorReader(read_index(file)) as reader:
        found = {name: reader.read(name) for name in reader.tensors}
    found[next(iter(found))][0, 0] = np.nan
    write_tensors(file, found)
    assert main([str(lora)]) == 1


def test_paths_may_be_strings(tmp_path, base, lora):
    from bp_export import GgufExport, name_gguf
    from bp_export.hub import prepare_push

    pytest.importorskip("PIL")
    made = GgufExport(adapter=str(lora), base=str(base), output=str(tmp_path / "x.gguf"), verify=False).write()
    assert read_settings(str(made.path)) == read_settings(made.path)
    assert name_gguf(str(lora)) == name_gguf(lora)
    assert prepare_push(str(lora), "me/x", base=str(base)).card == prepare_push(lora, "me/x", base=base).card
