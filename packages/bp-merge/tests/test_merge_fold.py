"""Folding against PEFT's own ``merge_and_unload()``, bit for bit, and everything that must be refused."""

import json

import numpy as np
import pytest

from bp_merge import (
    AdapterMismatchError,
    AdapterUnfoldableError,
    FoldedModel,
    TensorReader,
    TensorsInvalidError,
    compute_scale,
    load_adapter,
    read_model_index,
    write_tensors,
)
from bp_runs.errors import AdapterInvalidError

SHAPES = {"q_proj": (576, 576), "k_proj": (192, 576), "down_proj": (576, 1536)}


def build_peft_case(folder, *, dtype, **settings):
    """A base of two layers of linears, an adapter with random A and B on it, and PEFT's merge of the two."""
    torch = pytest.importorskip("torch")
    peft = pytest.importorskip("peft")
    save_file = pytest.importorskip("safetensors.torch").save_file
    torch.manual_seed(0)

    class Layer(torch.nn.Module):
        def __init__(self):
            super().__init__()
            for name, (out, into) in SHAPES.items():
                self.add_module(name, torch.nn.Linear(into, out, bias=False))

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = torch.nn.ModuleList([Layer(), Layer()])

    base = Model().to(getattr(torch, dtype))
    (folder / "base").mkdir()
    save_file({k: v.clone() for k, v in base.state_dict().items()}, folder / "base" / "model.safetensors")
    model = peft.get_peft_model(base, peft.LoraConfig(target_modules=list(SHAPES), **settings))
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_" in name:
                weight.copy_(torch.randn_like(weight) * 0.02)
    model.save_pretrained(folder / "lora")
    config = json.loads((folder / "lora" / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = str(folder / "base")
    (folder / "lora" / "adapter_config.json").write_text(json.dumps(config))
    merged = model.merge_and_unload().state_dict()
    return {name: value.float().numpy() for name, value in merged.items()}


@pytest.mark.parametrize(
    ("dtype", "settings"),
    [
        ("bfloat16", {"r": 1, "lora_alpha": 32}),
        ("bfloat16", {"r": 8, "lora_alpha": 16}),
        ("bfloat16", {"r": 16, "lora_alpha": 32}),
        ("bfloat16", {"r": 64, "lora_alpha": 64}),
        ("float16", {"r": 16, "lora_alpha": 32}),
        ("float32", {"r": 16, "lora_alpha": 32}),
        ("bfloat16", {"r": 8, "lora_alpha": 20, "use_rslora": True}),
        (
            "bfloat16",
            {
                "r": 8,
                "rank_pattern": {"layers.0.q_proj": 16, "^layers.1.*": 4},
                "alpha_pattern": {"k_proj": 5, "q_proj|down_proj": 3},
            },
        ),
    ],
    ids=["r1", "r8", "r16", "r64", "r16-f16", "r16-f32", "rslora", "patterns"],
)
def test_fold_is_pefts_merge_bit_for_bit(tmp_path, dtype, settings):
    merged = build_peft_case(tmp_path, dtype=dtype, **settings)
    adapter = load_adapter(tmp_path / "lora")
    assert len(adapter.modules) == 6
    with FoldedModel(TensorReader(read_model_index(tmp_path / "base")), adapter) as model:
        assert model.changed == set(merged)
        for name, expected in merged.items():
            whole = model.read_rows(name, 0, expected.shape[0])
            pieces = [model.read_rows(name, i, min(i + 37, expected.shape[0])) for i in range(0, expected.shape[0], 37)]
            assert np.array_equal(whole.view(np.uint32), expected.view(np.uint32)), name
            assert np.array_equal(np.concatenate(pieces).view(np.uint32), expected.view(np.uint32)), name


def test_an_adapters_pairs_stay_in_its_file_until_they_are_asked_for(tmp_path):
    write_case(tmp_path)
    adapter = load_adapter(tmp_path / "lora")
    assert adapter.modules["layers.0.q_proj"].shape == (4, 8)
    other = load_adapter(tmp_path / "lora")
    (tmp_path / "lora" / "adapter_model.safetensors").unlink()
    assert list(other.modules) == ["layers.0.q_proj"]
    with pytest.raises(TensorsInvalidError):
        other.modules["layers.0.q_proj"]
    # The last few are kept.
    assert adapter.modules["layers.0.q_proj"].shape == (4, 8)


def write_case(folder, *, module="layers.0.q_proj", a=(2, 8), b=(4, 2), base=(4, 8), key=None, fill=1.0, **config):
    """A base with one linear and an adapter for ``module``, without torch."""
    for name in ("base", "lora"):
        (folder / name).mkdir()
    write_tensors(folder / "base" / "model.safetensors", {"layers.0.q_proj.weight": np.ones(base, np.float32)})
    stem = f"base_model.model.{module}"
    tensors = {f"{stem}.lora_A.weight": np.full(a, fill, np.float32), f"{stem}.lora_B.weight": np.ones(b, np.float32)}
    if key:
        tensors[key] = np.ones(3, np.float32)
    write_tensors(folder / "lora" / "adapter_model.safetensors", tensors)
    settings = {"peft_type": "LORA", "base_model_name_or_path": "base", "r": 2, "lora_alpha": 4, **config}
    (folder / "lora" / "adapter_config.json").write_text(json.dumps(settings))


def fold(folder):
    return FoldedModel(TensorReader(read_model_index(folder / "base")), load_adapter(folder / "lora"))


def test_the_small_case_folds(tmp_path):
    write_case(tmp_path)
    with fold(tmp_path) as model:
        assert np.array_equal(model.read_rows("layers.0.q_proj.weight", 0, 4), np.full((4, 8), 5.0, np.float32))


@pytest.mark.parametrize(
    ("config", "word"),
    [
        ({"init_lora_weights": "pissa_niter_4"}, "pissa"),
        ({"layer_replication": [[0, 2]]}, "replicated"),
        ({"use_dora": True, "fan_in_fan_out": True}, "DoRA on transposed"),
        ({"key": "base_model.model.layers.0.q_proj.lora_other.weight"}, "lora_other"),
        ({"key": "something.weight"}, "something"),
    ],
)
def test_what_a_fold_would_lose_is_refused(tmp_path, config, word):
    write_case(tmp_path, **config)
    with pytest.raises(AdapterUnfoldableError, match=word):
        load_adapter(tmp_path / "lora")


@pytest.mark.parametrize(
    ("case", "error", "word"),
    [
        ({"module": "layers.9.q_proj"}, AdapterMismatchError, "no such module"),
        ({"base": (5, 8)}, AdapterMismatchError, r"\(4, 8\).*\(5, 8\)"),
        ({"a": (3, 8)}, AdapterInvalidError, "rank 2"),
        ({"b": (4, 3)}, AdapterInvalidError, "rank 2"),
        ({"fill": float("nan")}, AdapterInvalidError, "diverged"),
        ({"key": "base_model.model.other.lora_A.weight"}, AdapterInvalidError, "only one"),
        ({"key": "base_model.model.embed.lora_embedding_A"}, AdapterInvalidError, "only one"),
        ({"key": "base_model.model.layers.0.q_proj.lora_magnitude_vector"}, AdapterInvalidError, "DoRA"),
        ({"use_dora": True}, AdapterInvalidError, "DoRA"),
        ({"key": "base_model.model.lm_head.weight"}, AdapterMismatchError, "no such module"),
        ({"key": "base_model.model.embed.token_adapter.trainable_tokens_delta"}, AdapterInvalidError, "rows"),
        ({"rank_pattern": {"(": 1}}, AdapterInvalidError, "no pattern"),
    ],
)
def test_adapters_that_do_not_fit_are_refused(tmp_path, case, error, word):
    write_case(tmp_path, **case)
    with pytest.raises(error, match=word):
        fold(tmp_path)


def test_scales_follow_peft():
    config = {"r": 16, "lora_alpha": 32, "rank_pattern": {"q_proj": 4}, "alpha_pattern": {r".*\.1\.k_proj": 8}}
    assert compute_scale(config, "model.layers.0.v_proj") == (16, 2.0)
    assert compute_scale(config, "model.layers.0.q_proj") == (4, 8.0)
    assert compute_scale(config, "model.layers.1.k_proj") == (16, 0.5)
    assert compute_scale({"r": 16, "lora_alpha": 32, "use_rslora": True}, "x") == (16, 8.0)


def build_rich_case(folder, *, dtype="bfloat16", tied=False, **settings):
    """A model with an embedding, biases and a head, any PEFT adapter on it, and PEFT's merge of the two."""
    torch = pytest.importorskip("torch")
    peft = pytest.importorskip("peft")
    save_file = pytest.importorskip("safetensors.torch").save_file
    conv = pytest.importorskip("transformers.pytorch_utils").Conv1D
    torch.manual_seed(0)

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.embed_tokens = torch.nn.Embedding(300, 96)
            self.q_proj = torch.nn.Linear(96, 192)
            self.c_attn = conv(288, 96)
            self.lm_head = torch.nn.Linear(96, 300, bias=False)
            if tied:
                self.lm_head.weight = self.embed_tokens.weight

        def get_input_embeddings(self):
            return self.embed_tokens

        def get_output_embeddings(self):
            return self.lm_head

    base = Model().to(getattr(torch, dtype))
    (folder / "base").mkdir()
    names = [name for name in base.state_dict() if not (tied and name == "lm_head.weight")]
    save_file({n: base.state_dict()[n].clone() for n in names}, folder / "base" / "model.safetensors")
    model = peft.get_peft_model(base, peft.LoraConfig(r=8, lora_alpha=20, **settings))
    with torch.no_grad():
        for weight in model.parameters():
            if weight.requires_grad:
                weight.add_(torch.randn_like(weight) * 0.05)
    model.save_pretrained(folder / "lora", save_embedding_layers=settings.get("save_embeddings", "auto"))
    config = json.loads((folder / "lora" / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = str(folder / "base")
    (folder / "lora" / "adapter_config.json").write_text(json.dumps(config))
    merged = model.merge_and_unload().state_dict()
    return {name: merged[name].to(getattr(torch, dtype)).float().numpy() for name in names}


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": ["q_proj"], "bias": "lora_only"},
        {"target_modules": ["q_proj"], "bias": "all"},
        {"target_modules": ["q_proj"], "lora_bias": True},
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "embed_tokens"]},
        {"target_modules": ["embed_tokens", "lm_head"]},
        {"target_modules": ["c_attn"], "fan_in_fan_out": True},
        {"target_modules": ["q_proj"], "trainable_token_indices": [3, 250, 7]},
        {"target_modules": ["q_proj"], "trainable_token_indices": {"embed_tokens": [0, 299]}},
    ],
    ids=["bias-lora", "bias-all", "lora-bias", "to-save", "embeddings", "fan-in", "tokens", "tokens-by-name"],
)
def test_what_else_an_adapter_holds_folds_as_peft_merges_it(tmp_path, dtype, settings):
    merged = build_rich_case(tmp_path, dtype=dtype, **settings)
    with fold(tmp_path) as model:
        assert model.changed
        assert not model.is_unchanged
        for name, expected in merged.items():
            info = model.tensors[name]
            step = max(1, info.rows // 3)
            pieces = [model.read_rows(name, i, min(i + step, info.rows)) for i in range(0, info.rows, step)]
            found = np.concatenate(pieces).reshape(info.shape)
            assert np.array_equal(found.view(np.uint32), expected.view(np.uint32)), name
    plain = set(settings) == {"target_modules"} and "q_proj" in settings["target_modules"]
    assert load_adapter(tmp_path / "lora").is_plain is plain


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_dora_is_pefts_but_for_a_last_bit(tmp_path, dtype):
    merged = build_rich_case(tmp_path, dtype=dtype, target_modules=["q_proj", "lm_head"], use_dora=True)
    with fold(tmp_path) as model:
        assert not load_adapter(tmp_path / "lora").is_plain
        for name, expected in merged.items():
            info = model.tensors[name]
            found = model.read_rows(name, 0, info.rows).reshape(info.shape)
            relative = {"bfloat16": 2**-7, "float16": 2**-10, "float32": 2**-21}[dtype]
            assert np.allclose(found, expected, rtol=relative, atol=0), name
            if dtype != "float32":
                assert (found != expected).mean() < 2e-3, name


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_head_saved_with_the_embedding_it_shares_is_no_change_of_its_own(tmp_path):
    merged = build_rich_case(tmp_path, tied=True, target_modules=["embed_tokens"])
    with fold(tmp_path) as model:
        assert model.changed == {"embed_tokens.weight"}
        assert np.array_equal(model.read_rows("embed_tokens.weight", 0, 300), merged["embed_tokens.weight"])
