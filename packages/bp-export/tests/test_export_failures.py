"""Injected failures: each is a coded error, before time is spent where it can be, and nothing half-written stays."""

import json
import shutil
from typing import NamedTuple

import numpy as np
import pytest
from export_pico import export_adapter, write_base, write_json, write_lora

from bp_export.errors import (
    ArchitectureUnsupportedError,
    BaseModelNotFoundError,
    ModelInvalidError,
    OutputTakenError,
    PreTokenizerUnknownError,
    QuantizationUnknownError,
)
from bp_merge import AdapterMismatchError, TensorsInvalidError
from bp_runs.adapter import write_manifest
from bp_runs.errors import AdapterInvalidError, DiskFullError, InvalidSettingError
from bp_runs.fingerprint import fingerprint_base


class Usage(NamedTuple):
    total: int
    used: int
    free: int


@pytest.fixture
def base(tmp_path):
    return write_base(tmp_path / "base")


@pytest.fixture
def lora(tmp_path, base):
    return write_lora(tmp_path / "lora", base)


def change_json(path, **changes):
    data = json.loads(path.read_text())
    data.update(changes)
    write_json(path, {k: v for k, v in data.items() if v is not None})


def expect(error, word, *args, **kwargs):
    """The export fails so, and leaves its folder as it was."""
    folder = args[0].parent
    before = sorted(str(p) for p in folder.rglob("*"))
    with pytest.raises(error, match=word) as caught:
        export_adapter(*args, **kwargs)
    assert sorted(str(p) for p in folder.rglob("*")) == before
    return caught.value


def test_unknown_architecture(base, lora):
    change_json(base / "config.json", architectures=["NobodyForCausalLM"])
    assert "LlamaForCausalLM" in expect(ArchitectureUnsupportedError, "NobodyForCausalLM", lora).details["known"]


@pytest.mark.parametrize(
    ("changes", "error", "word"),
    [
        ({"num_hidden_layers": "two"}, ModelInvalidError, "num_hidden_layers"),
        ({"num_hidden_layers": 3}, ModelInvalidError, "layer 2"),
        (
            {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}},
            ModelInvalidError,
            "bitsandby",
        ),
        ({"vocab_size": 400}, ModelInvalidError, "embedding"),
        ({"num_attention_heads": 7}, ModelInvalidError, "heads"),
        ({"rope_parameters": {"rope_type": "longrope"}}, ArchitectureUnsupportedError, "longrope"),
        ({"rope_parameters": {"rope_type": "llama3"}}, ModelInvalidError, "factor"),
        ({"hidden_act": "gelu"}, ArchitectureUnsupportedError, "gelu"),
        ({"attention_bias": True}, ArchitectureUnsupportedError, "attention_bias"),
    ],
)
def test_config_that_does_not_fit(base, lora, changes, error, word):
    change_json(base / "config.json", **changes)
    expect(error, word, lora)


def test_missing_or_damaged_config(base, lora):
    (base / "config.json").write_text("{")
    expect(ModelInvalidError, "cannot be read", lora)
    (base / "config.json").unlink()
    expect(BaseModelNotFoundError, "no config.json", lora)
    shutil.rmtree(base)
    expect(BaseModelNotFoundError, "not a folder|cannot|no config", lora)
    expect(BaseModelNotFoundError, "elsewhere", lora, base=base.parent / "elsewhere")


def test_unknown_pre_tokenizer(base, lora):
    data = json.loads((base / "tokenizer.json").read_text())
    data["pre_tokenizer"] = {"type": "ByteLevel", "add_prefix_space": True, "use_regex": True}
    write_json(base / "tokenizer.json", data)
    expect(PreTokenizerUnknownError, "pre-tokenizer", lora)
    assert export_adapter(lora, pre="gpt-2").path.is_file()


def test_unknown_words(lora):
    expect(QuantizationUnknownError, "q4_x", lora, quantization="q4_x")
    expect(QuantizationUnknownError, "onnx", lora, format="onnx")


@pytest.mark.parametrize("format", ["merged", "lora", "mlx", "gguf-adapter", "ollama-adapter"])
def test_what_only_a_gguf_can_have_is_not_left_out_without_a_word(lora, format):
    for asked in ({"quantization": "q8_0"}, {"importance": lora / "x"}, {"split_bytes": 9}, {"pre": "x"}):
        error = expect(InvalidSettingError, f"{next(iter(asked))} is for the format gguf", lora, format=format, **asked)
        assert error.setting == next(iter(asked))


@pytest.mark.parametrize(
    ("modules", "word"),
    [
        ({"model.layers.7.self_attn.q_proj": (64, 64)}, "no such module"),
        ({"model.layers.0.self_attn.q_proj": (32, 64)}, "the base has it as"),
        ({"lm_head": (301, 64)}, "lm_head as"),
    ],
)
def test_an_adapter_of_another_base(tmp_path, base, modules, word):
    other = write_lora(tmp_path / "other", base, modules=modules)
    expect(AdapterMismatchError, word, other)
    expect(AdapterMismatchError, word, other, format="merged")


@pytest.mark.parametrize("format", ["gguf", "merged"])
def test_a_base_of_the_same_shapes_that_is_another(tmp_path, base, lora, format):
    other, packed = write_base(tmp_path / "other", seed=5), write_base(tmp_path / "f32", dtype="F32")
    export_adapter(lora, base=other, quantization="q8_0")  # there is no word of its base in this adapter
    write_manifest(lora, run_id="r", base=str(base), base_folder=base)
    expect(AdapterMismatchError, "not the base that the adapter was trained on", lora, base=other, format=format)
    assert fingerprint_base(packed) != fingerprint_base(base)  # other values, since bf16 rounded them
    shutil.copytree(base, tmp_path / "moved")
    assert export_adapter(lora, base=tmp_path / "moved", format=format, output=tmp_path / "out").path.exists()


def test_shards_that_are_missing(base, lora):
    shards = {"weight_map": {"model.norm.weight": "model-00001-of-00002.safetensors"}}
    write_json(base / "model.safetensors.index.json", shards)
    expect(TensorsInvalidError, "model-00001-of-00002", lora)


def test_a_torn_header(base, lora):
    whole = (base / "model.safetensors").read_bytes()
    for torn in (whole[:100], b"\xff" * 8 + whole[8:], whole[:8] + b"{" * 64 + whole[72:]):
        (base / "model.safetensors").write_bytes(torn)
        expect(TensorsInvalidError, "whole|damaged", lora)


@pytest.mark.parametrize("r", [0, -1, "8", None])
def test_a_rank_that_is_none(lora, r):
    change_json(lora / "adapter_config.json", r=r)
    expect(AdapterInvalidError, "rank", lora)


def test_damaged_weights(base, lora):
    whole = (base / "model.safetensors").read_bytes()
    (base / "model.safetensors").write_bytes(whole[:-100])
    expect(TensorsInvalidError, "cut short", lora)
    (lora / "adapter_model.safetensors").write_bytes(b"")
    expect(TensorsInvalidError, "not a whole", lora)
    (lora / "adapter_model.safetensors").unlink()
    expect(AdapterInvalidError, "missing", lora)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_weights_that_are_not_finite(base, lora, value):
    from bp_merge import TensorReader, read_model_index, write_tensors

    with TensorReader(read_model_index(base)) as reader:
        tensors = {name: reader.read(name) for name in reader.tensors}
    tensors["model.layers.1.mlp.down_proj.weight"][3, 5] = value
    write_tensors(base / "model.safetensors", tensors, dtype="BF16")
    expect(TensorsInvalidError, "down_proj.*not finite", lora)


def test_a_tensor_without_a_place(tmp_path, base):
    from bp_merge import TensorReader, read_model_index, write_tensors

    with TensorReader(read_model_index(base)) as reader:
        tensors = {name: reader.read(name) for name in reader.tensors}
    write_tensors(base / "model.safetensors", {**tensors, "model.vision.weight": np.ones((2, 2), np.float32)})
    expect(ArchitectureUnsupportedError, "model.vision.weight", base)


@pytest.mark.parametrize("format", ["gguf", "merged", "lora"])
def test_full_disk_is_noticed_before_the_work(lora, monkeypatch, format):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(10, 10, 0))
    expect(DiskFullError, "MiB", lora, format=format)


@pytest.mark.parametrize("format", ["gguf", "merged"])
@pytest.mark.parametrize("error", [KeyboardInterrupt, DiskFullError("full"), RuntimeError("bug")])
def test_a_stop_half_way_leaves_nothing_and_keeps_the_old_file(lora, format, error):
    def stop(done, total):
        if done > total // 2:
            raise error

    kind = error if isinstance(error, type) else type(error)
    expect(kind, ".*", lora, format=format, progress=stop)
    if format == "gguf":
        old = export_adapter(lora).path
        before = old.read_bytes()
        expect(kind, ".*", lora, progress=stop, force=True)
        assert old.read_bytes() == before


def test_the_disk_filling_up_while_writing(lora, monkeypatch):
    import errno

    from bp_export.gguf.file import GgufStream

    real, calls = GgufStream._append, []

    class Full:
        def __init__(self, file):
            self.file = file

        def write(self, part):
            raise OSError(errno.ENOSPC, "No space left on device")

        def close(self):
            self.file.close()

    def fill(self, part):
        calls.append(part)
        if len(calls) == 20:
            self._file = Full(self._file)
        real(self, part)

    monkeypatch.setattr(GgufStream, "_append", fill)
    expect(DiskFullError, "no room left", lora)


@pytest.mark.parametrize("format", ["gguf", "merged"])
def test_a_disk_that_does_not_take_what_was_written_before(lora, monkeypatch, format):
    """Older parts are on their way to the disk while newer ones are computed."""
    import errno

    from bp_export.formats import hash_and_flush

    def fail(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(hash_and_flush, "_FLUSH_BYTES", 1000)
    export_adapter(lora, format=format)  # a real disk takes it
    monkeypatch.setattr(hash_and_flush, "_flush", fail)
    expect(DiskFullError, "no room left", lora, format=format, force=True)


def test_what_stands_at_the_output_is_not_replaced(tmp_path, lora):
    keep = tmp_path / "keep"
    keep.mkdir()
    (keep / "precious.txt").write_text("x")
    for force, word in ((False, "not empty"), (True, "no export's folder")):
        for format in ("lora", "merged", "mlx"):
            expect(OutputTakenError, word, lora, format=format, output=keep, force=force)
    expect(OutputTakenError, "exists", lora, output=keep / "precious.txt")
    expect(OutputTakenError, "no GGUF", lora, output=keep / "precious.txt", force=True)
    expect(OutputTakenError, "is a folder", lora, output=keep, force=True)


@pytest.mark.parametrize("format", ["gguf", "merged", "lora", "mlx", "gguf-adapter", "ollama-adapter"])
def test_an_earlier_export_is_replaced_only_by_force(lora, format):
    words = {"format": format, "ollama_base": "x"}
    first = export_adapter(lora, **words)
    assert "force=True" in expect(OutputTakenError, "exists", lora, **words).fix
    again = export_adapter(lora, **words, force=True)
    assert (again.path, again.sha256) == (first.path, first.sha256)


@pytest.mark.parametrize("format", ["merged", "lora", "mlx", "ollama-adapter"])
def test_a_folder_that_no_export_wrote_is_never_replaced(tmp_path, base, lora, format):
    """A model that somebody downloaded, an adapter that somebody trained, an export with somebody's notes."""
    words = {"format": format, "ollama_base": "x", "force": True}
    for place in (write_base(tmp_path / "downloaded"), write_lora(tmp_path / "trained", base)):
        error = expect(OutputTakenError, "no export's folder", lora, **words, output=place)
        assert "output=" in error.fix
    (tmp_path / "downloaded" / "export.json").write_text('{"files": ["config.json"]}')  # and some file of that name
    expect(OutputTakenError, "no export's folder", lora, **words, output=tmp_path / "downloaded")
    made = export_adapter(lora, **words, output=tmp_path / "made").path
    (made / ".DS_Store").write_text("left by a file browser")
    export_adapter(lora, **words, output=made)
    (made / "notes.md").write_text("mine")
    expect(OutputTakenError, "notes.md, which no export wrote", lora, **words, output=made)


@pytest.mark.parametrize("format", ["merged", "lora", "mlx"])
def test_what_is_exported_is_never_replaced_by_it(tmp_path, base, lora, format):
    for place in (lora, tmp_path, *([base] if format == "merged" else [])):
        expect(OutputTakenError, "holds what is to be exported", lora, format=format, output=place, force=True)
