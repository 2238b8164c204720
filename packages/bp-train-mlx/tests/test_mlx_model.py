"""Models, adapters and packing on mlx, each against an independent computation."""

import json
from array import array
from types import SimpleNamespace

import mlx.core as mx
import numpy as np
import pytest
from mlx import nn
from mlx.utils import tree_flatten

from bp_data import TokenRow
from bp_data.loop.examples import pad_rows
from bp_runs.errors import (
    FullModelTooLargeError,
    ModeError,
    ModelLoadError,
    PackingError,
    RemoteCodeError,
    TargetModulesError,
)
from bp_runs.spec import LoraSpec
from bp_train_mlx import backend
from bp_train_mlx.backend import Device, Mode, choose_mode
from bp_train_mlx.errors import MlxUnavailableError
from bp_train_mlx.model import full, load, log_probs, lora
from bp_train_mlx.model.log_probs import LogProbModel
from bp_train_mlx.model.packing import require_packable
from bp_train_mlx.optim import round_stochastically

GPU = Device("metal", "a Mac", 16 * 2**30)


@pytest.fixture(autouse=True)
def _no_compile():
    mx.disable_compile()
    yield
    mx.enable_compile()


def opened(folder, mode="lora", dtype=mx.float32):
    config = load.read_config(folder, trust_remote_code=False)
    return load.load_model(folder, config, Mode(mode, "as set"), dtype, trust_remote_code=False)


def adapted(model, folder, **settings):
    config = load.read_config(folder, trust_remote_code=False)
    targets = lora.choose_targets(model, folder, config, settings.pop("target_modules", "all-linear"))
    return lora.add_lora(model, targets, LoraSpec(**{"r": 4, **settings}), seed=1)


def some_rows(lengths):
    draw = np.random.default_rng(0)
    rows = [array("i", draw.integers(3, 250, length).tolist()) for length in lengths]
    return [
        TokenRow(number, ids, bytes(1 + len(ids) // 2) + b"\1" * (len(ids) - 1 - len(ids) // 2))
        for number, ids in enumerate(rows)
    ]


def plain_log_probs(model, rows):
    """Of each row's trained tokens, by the whole model and a softmax of all logits."""
    found = []
    for row in rows:
        logits = np.array(model(mx.array([list(row.ids)]))[0].astype(mx.float32), dtype=np.float64)
        logits -= logits.max(axis=1, keepdims=True)
        table = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
        found += [table[at - 1, row.ids[at]] for at in range(1, len(row.ids)) if row.mask[at]]
    return np.array(found)


@pytest.mark.parametrize("tile", [2**26, 2**10])
@pytest.mark.parametrize("packed", [False, True])
def test_log_probabilities_are_those_of_the_whole_model(pico_model, monkeypatch, tile, packed):
    monkeypatch.setattr(log_probs, "TILE", tile)
    model, rows = opened(pico_model), some_rows([9, 5, 14, 3])
    wrapped = LogProbModel(model)
    assert wrapped.has_head
    batch = pad_rows([rows] if packed else [(row,) for row in rows], 2)
    assert np.array(wrapped(batch)) == pytest.approx(plain_log_probs(model, rows), abs=1e-5)


@pytest.mark.parametrize("trains", ["adapter", "all weights"])
def test_tiles_and_recomputed_layers_change_no_gradient(pico_model, monkeypatch, trains):
    """Gradients of a trained embedding, which is the head too, come through the tiles; dropout draws the same mask."""
    model, rows = opened(pico_model), some_rows([9, 5, 14, 3])
    adapter = None
    if trains == "adapter":
        adapter = adapted(model, pico_model, dropout=0.5)
        adapter.load({n: w + 0.01 for n, w in adapter.weights().items()})
    else:
        full.open_weights(model, pico_model)
    model.train()
    batch = pad_rows([rows], 2)

    def gradients():
        for number, layer in enumerate(adapter.dropouts if adapter else ()):
            layer.set_key(mx.random.key(number))
        wrapped = LogProbModel(model)
        return dict(tree_flatten(nn.value_and_grad(model, lambda: wrapped(batch).sum())()[1]))

    plain = gradients()
    monkeypatch.setattr(log_probs, "TILE", 2**10)
    full.checkpoint_layers(model)
    tiled = gradients()
    full.plain_layers(model)
    assert plain.keys() == tiled.keys()
    for name, gradient in plain.items():
        assert np.array(tiled[name]) == pytest.approx(np.array(gradient), abs=1e-4, rel=1e-3), name
    assert any(float(mx.abs(g).max()) > 0 for g in plain.values())


def write_config(folder, **config):
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_a_model_with_a_state_is_not_packed(tmp_path):
    """LFM2's convolutions read the tokens before, whatever the mask says."""
    import torch
    from transformers import Lfm2Config, Lfm2ForCausalLM

    torch.manual_seed(0)
    config = Lfm2Config(
        vocab_size=300, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, layer_types=["conv", "full_attention"], block_auto_adjust_ff_dim=False, block_ff_dim=64,
    )  # fmt: skip
    Lfm2ForCausalLM(config).save_pretrained(tmp_path / "lfm2")
    own = json.loads((tmp_path / "lfm2" / "config.json").read_text())
    write_config(tmp_path / "lfm2", **own, block_dim=32)
    with pytest.raises(PackingError, match="lfm2"):
        require_packable(opened(tmp_path / "lfm2"), 300, "lfm2")


def test_packs_pass_the_proof_with_a_sliding_window(tmp_path):
    import torch
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    torch.manual_seed(0)
    config = Gemma3TextConfig(
        vocab_size=300, hidden_size=32, intermediate_size=64, num_hidden_layers=6, num_attention_heads=2, head_dim=16,
        num_key_value_heads=1, sliding_window=8, max_position_embeddings=256,
    )  # fmt: skip
    Gemma3ForCausalLM(config).save_pretrained(tmp_path / "gemma")
    model = opened(tmp_path / "gemma")
    require_packable(model, 300, "gemma3_text")
    names = adapted(model, tmp_path / "gemma").weights()
    assert "base_model.model.model.layers.0.self_attn.q_proj.lora_A.default.weight" in names


def test_an_adapter_starts_as_no_change_and_comes_off(pico_model):
    model = opened(pico_model)
    ids = mx.array([[5, 6, 7, 8]])
    before = np.array(model(ids))
    adapter = adapted(model, pico_model)
    assert np.array_equal(np.array(model(ids)), before)
    adapter.load({name: weight + 0.1 for name, weight in adapter.weights().items()})
    changed = np.array(model(ids))
    assert not np.allclose(changed, before)
    with adapter.disabled():
        assert np.array_equal(np.array(model(ids)), before)
    assert np.array_equal(np.array(model(ids)), changed)
    adapter.remove()
    assert np.array_equal(np.array(model(ids)), before)


def test_only_named_layers_carry_an_adapter(pico_model):
    model = opened(pico_model)
    names = adapted(model, pico_model, target_modules="q_proj,v_proj").weights()
    assert len(names) == 2 * 2 * 2
    assert all(".q_proj." in name or ".v_proj." in name for name in names)
    with pytest.raises(TargetModulesError, match="lm_head"):
        adapted(opened(pico_model), pico_model, target_modules="q_proj,lm_head")


@pytest.mark.parametrize("bits", [4, 8])
def test_a_base_is_quantized_on_load(pico_model, monkeypatch, bits):
    monkeypatch.setattr(load, "BITS", bits)
    model, whole = opened(pico_model, "qlora"), opened(pico_model)
    layers = [m for _, m in model.named_modules() if isinstance(m, nn.QuantizedLinear)]
    assert {layer.bits for layer in layers} == {bits}
    assert len(layers) == 2 * 7
    assert load.count_parameters(model) == load.count_parameters(whole)
    ids = mx.array([[5, 6, 7, 8]])
    off = float(mx.abs(model(ids) - whole(ids)).max())
    assert 0 < off < (0.2 if bits == 4 else 0.02)


def test_rotary_settings_of_transformers_5_are_read(tmp_path):
    """mlx-lm's Llama reads ``rope_theta`` alone and would compute with 10,000."""
    rope = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0}
    assert load.plain_rope({"rope_parameters": rope}) == {"rope_theta": 5e5, "rope_scaling": rope}
    assert load.plain_rope({"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}}) == {"rope_theta": 500.0}
    assert load.plain_rope({"rope_theta": 1.0, "rope_parameters": {"rope_theta": 2.0}}) == {}
    by_layer = {"full_attention": {"rope_theta": 1.0}, "sliding_attention": {"rope_theta": 2.0}}
    assert load.plain_rope({"rope_parameters": by_layer}) == {}


def test_what_mlx_lm_does_not_know_is_rejected_with_its_words(tmp_path):
    folder = write_config(tmp_path / "m", model_type="no_such_model", hidden_size=8)
    config = load.read_config(folder, trust_remote_code=False)
    with pytest.raises(ModelLoadError) as caught:
        load.sketch_model(folder, config, trust_remote_code=False)
    assert "no_such_model" in (caught.value.cause or "")
    with pytest.raises(ModelLoadError):
        load.read_config(tmp_path / "none", trust_remote_code=False)
    own = write_config(tmp_path / "own", model_type="llama", model_file="model.py")
    with pytest.raises(RemoteCodeError):
        load.read_config(own, trust_remote_code=False)


def test_modes_are_chosen_by_memory_and_by_how_the_base_is_stored():
    assert choose_mode("auto", 7 * 10**9, GPU, None).name == "qlora"
    assert choose_mode("auto", 10**9, GPU, None).name == "lora"
    assert choose_mode("auto", 7 * 10**9, Device("cpu", "", 2**30), None).name == "lora"
    assert choose_mode("lora", 10**9, GPU, 4).label == "qlora (the base is stored in 4 bits)"
    with pytest.raises(ModeError):
        choose_mode("full", 10**9, GPU, 8)
    with pytest.raises(FullModelTooLargeError):
        choose_mode("full", 7 * 10**9, GPU, None)


@pytest.mark.parametrize(
    ("found", "word"), [({"mlx": "0.31.0", "mlx-lm": "0.32.2"}, "0.31.0"), ({"mlx": "0.32.4"}, "mlx-lm")]
)
def test_old_and_missing_packages_are_named(monkeypatch, found, word):
    def version(name):
        if name not in found:
            raise backend.PackageNotFoundError(name)
        return found[name]

    monkeypatch.setattr(backend, "version", version)
    with pytest.raises(MlxUnavailableError, match=word):
        backend.require_mlx()


def test_stochastic_rounding_is_right_on_average():
    values = mx.array([1.0, 1.001, -2.3, 3e-5, 0.0], dtype=mx.float32)
    draws = mx.stack([round_stochastically(values, mx.random.key(n)).astype(mx.float32) for n in range(2000)])
    mean = np.array(draws.mean(axis=0))
    step = np.abs(np.array(values)) * 2**-7
    assert np.all(np.abs(mean - np.array(values)) <= 0.1 * step + 1e-12)
    assert len(np.unique(np.array(draws)[:, 1])) == 2


def test_running_out_of_memory_is_told_from_other_errors():
    memory = backend.MlxMemory()
    metal = "[METAL] Command buffer execution failed: Insufficient Memory (00000008:kIOGPUCommandBufferCallbackErrorOutOfMemory)"
    assert memory.is_out_of_memory(RuntimeError(metal))
    assert memory.is_out_of_memory(
        RuntimeError("[metal::malloc] Attempting to allocate 99 bytes which is greater than the maximum")
    )
    assert not memory.is_out_of_memory(RuntimeError("[matmul] Last dimension of first input does not match"))


def test_process_settings_are_put_back():
    before = mx.set_cache_limit(2**30)
    try:
        with backend.process_settings(SimpleNamespace(kind="cuda", is_gpu=True, memory=2**33)):
            assert mx.set_cache_limit(2**30) == 2**30  # an eighth
        assert mx.set_cache_limit(2**30) == 2**30
    finally:
        mx.set_cache_limit(before)
