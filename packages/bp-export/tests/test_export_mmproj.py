"""The vision tower next to a GGUF: through llama.cpp's converter, or a note that says why not."""

import json
from pathlib import Path

import pytest
from export_pico import export_adapter, write_base, write_json, write_lora, write_tokenizer

import bp_export
from bp_export.errors import ArchitectureUnsupportedError, ConverterMissingError
from bp_export.gguf.file import read_settings
from bp_export.llama_cpp.environment import use_environment
from bp_merge import TensorReader, read_model_index, write_tensors


@pytest.fixture
def seeing(tmp_path):
    """A Gemma 3 by its config alone, with the tensors of a text model: enough for what comes before a conversion."""
    base = write_base(tmp_path / "base", vision_config={"hidden_size": 32})
    return write_lora(tmp_path / "lora", base)


def test_a_text_model_has_no_tower(tmp_path):
    base = write_base(tmp_path / "base")
    made = export_adapter(base)
    assert (made.mmproj, made.notes) == (None, ())
    with pytest.raises(ArchitectureUnsupportedError, match="no vision or audio tower"):
        export_adapter(base, mmproj=True, output=tmp_path / "other.gguf")
    assert not (tmp_path / "other.gguf").exists(), "rejected before the work"


def test_a_tower_that_the_converter_does_not_know_is_a_note(seeing, tmp_path):
    made = export_adapter(seeing)
    assert any("text only" in note for note in made.notes)
    with pytest.raises(ArchitectureUnsupportedError, match="does not know its vision tower"):
        export_adapter(seeing, mmproj=True, output=tmp_path / "other.gguf")
    assert export_adapter(seeing, mmproj=False, output=tmp_path / "third.gguf").notes == ()


def test_without_the_converter_the_note_says_how(seeing, tmp_path):
    config = json.loads((tmp_path / "base" / "config.json").read_text())
    write_json(tmp_path / "base" / "config.json", {**config, "architectures": ["LlavaForConditionalGeneration"]})
    from bp_export.formats.mmproj import plan_towers

    with use_environment(tmp_path / "converter", is_offline=True):
        path, notes = plan_towers(tmp_path / "base", tmp_path / "x.gguf", wanted=None, force=False)
        assert path is None
        assert "{set:mmproj=true}" in notes[0]
        with pytest.raises(ConverterMissingError):
            plan_towers(tmp_path / "base", tmp_path / "x.gguf", wanted=True, force=False)


@pytest.mark.slow
def test_gemma_3_gets_its_tower_next_to_the_verified_text_model(tmp_path):
    import torch
    import transformers

    base = tmp_path / "base"
    vocab = write_tokenizer(base)
    kept = (base / "tokenizer_config.json").read_text()
    text = {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 6,
        "num_attention_heads": 4,
        "head_dim": 32,
    }
    text |= {
        "num_key_value_heads": 2,
        "query_pre_attn_scalar": 32,
        "max_position_embeddings": 512,
        "vocab_size": vocab + 8,
    }
    vision = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    vision |= {"image_size": 56, "patch_size": 14}
    ids = {"image_token_index": vocab + 1, "boi_token_index": vocab + 2, "eoi_token_index": vocab + 3}
    torch.manual_seed(0)
    config = transformers.Gemma3Config(
        text_config={**text, "sliding_window": 512}, vision_config=vision, mm_tokens_per_image=4, bos_token_id=1, **ids
    )
    transformers.Gemma3ForConditionalGeneration(config).to(torch.bfloat16).save_pretrained(base)
    (base / "tokenizer_config.json").write_text(kept)
    write_json(
        base / "preprocessor_config.json", {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "size": {"height": 56}}
    )
    # The published models have one more wrapper than transformers 5 saves.
    with TensorReader(read_model_index(base)) as reader:
        tensors = {n: reader.read_rows(n, 0, i.rows).reshape(i.shape) for n, i in reader.tensors.items()}
    wrapped = {
        n.replace("vision_tower.", "vision_tower.vision_model.") if "vision_model" not in n else n: t
        for n, t in tensors.items()
    }
    write_tensors(base / "model.safetensors", wrapped, dtype="BF16")
    modules = {
        n.removesuffix(".weight"): t.shape for n, t in wrapped.items() if "language" in n and "_proj.weight" in n
    }
    lora = write_lora(tmp_path / "lora", base, modules=modules, alpha=8)
    with use_environment(Path.home() / ".backpropagate" / "llama.cpp"):
        made = bp_export.export_adapter(lora, quantization="f16", output=tmp_path / "x.gguf", verify=True, mmproj=True)
    assert made.mmproj == tmp_path / "mmproj-x.gguf"
    assert read_settings(made.mmproj)["general.architecture"] == "clip"
    assert made.parity.result == "passed"
