"""Runs of the MLX rail: memory, preflight, quantized bases, full fine-tuning, and what is rejected."""

import json
import math
from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest
from mlx_training import adapter_bytes, losses, spec_for, train
from safetensors.numpy import load_file

from bp_runs import Ranks
from bp_runs.errors import (
    AdapterInvalidError,
    GpuOutOfMemoryError,
    InvalidSettingError,
    ModeError,
    OomExhaustedError,
    SequenceTooLongError,
    TrainingDivergedError,
    TrainingFailedError,
)
from bp_runs.events import EvalDone, ModelLoaded, Notice
from bp_runs.witness import read_witness
from bp_train_mlx import MlxRail, backend
from bp_train_mlx.errors import MlxUnavailableError


def notices(events):
    return [e.message for e in events if isinstance(e, Notice)]


def limit_memory(monkeypatch, limit):
    monkeypatch.setattr(backend, "memory_limit", lambda device: limit)


def test_a_micro_batch_over_the_limit_is_split_and_the_step_is_the_same(pico_model, tmp_path, monkeypatch):
    """The limit is between what four rows and two rows take; before macOS swaps, the micro-batch runs in halves."""
    numbers = {"batch_size": 4, "gradient_accumulation": 1, "steps": 3, "eval_share": 0.0}
    whole, events = train(spec_for(pico_model, tmp_path, "whole", **numbers))
    halves, _ = train(
        spec_for(pico_model, tmp_path, "halves", **{**numbers, "batch_size": 2, "gradient_accumulation": 2})
    )
    assert halves.peak_memory < whole.peak_memory
    limit_memory(monkeypatch, (halves.peak_memory + whole.peak_memory) // 2)
    _, found = train(spec_for(pico_model, tmp_path, "split", **numbers))
    assert any("run in 2 chunks" in message for message in notices(found))
    assert losses(found) == pytest.approx(losses(events), abs=1e-5)
    limit_memory(monkeypatch, 1)
    with pytest.raises(OomExhaustedError):
        train(spec_for(pico_model, tmp_path, "none", **numbers))
    with pytest.raises(GpuOutOfMemoryError):
        train(spec_for(pico_model, tmp_path, "off", oom_recovery=False, **numbers))


def test_a_preflight_reports_and_changes_nothing(pico_model, tmp_path):
    plain, events = train(spec_for(pico_model, tmp_path, "plain", lora={"dropout": 0.2}))
    measured, found = train(spec_for(pico_model, tmp_path, "measured", lora={"dropout": 0.2}, preflight="on"))
    assert any(m.startswith("preflight: ran the longest batch (2 × ") for m in notices(found))
    assert losses(found) == losses(events)
    assert adapter_bytes(measured) == adapter_bytes(plain)


@pytest.mark.parametrize("bits", [4, 8])
def test_a_quantized_base_is_trained_on_as_it_is_stored(pico_model, tmp_path, bits):
    """A folder as mlx-community has them; its layout is mlx's own, and so are the names."""
    from mlx_lm import convert

    base = tmp_path / "quantized"
    mx.disable_compile()
    convert(str(pico_model), str(base), quantize=True, q_bits=bits, q_group_size=64)
    outcome, events = train(spec_for(base, tmp_path, "run", steps=6))
    [model] = [e for e in events if isinstance(e, ModelLoaded)]
    assert model.mode == f"qlora (the base is stored in {bits} bits)"
    assert outcome.final_loss < outcome.first_loss
    spec = spec_for(base, tmp_path, "judged")
    before, after = (MlxRail().evaluate(spec, adapter, lambda _: None).loss for adapter in (None, outcome.adapter))
    assert after < before
    with pytest.raises(ModeError):
        train(spec_for(base, tmp_path, "full", mode="full"))


def test_qlora_of_a_16_bit_base_trains_near_lora(pico_model, tmp_path):
    _, plain = train(spec_for(pico_model, tmp_path, "lora"))
    qlora, events = train(spec_for(pico_model, tmp_path, "qlora", mode="qlora"))
    assert losses(events) == pytest.approx(losses(plain), abs=0.05)
    assert losses(events) != losses(plain)
    assert read_witness(qlora.adapter).base.mode == "qlora"


def test_full_fine_tuning_leaves_a_model_folder(pico_model, tmp_path):
    spec = spec_for(pico_model, tmp_path, "full", mode="full", learning_rate=1e-2)
    outcome, _ = train(spec)
    assert outcome.adapter == spec.folders.model
    assert outcome.final_loss < outcome.first_loss
    before, after = (load_file(folder / "model.safetensors") for folder in (pico_model, outcome.adapter))
    assert {n: w.shape for n, w in before.items()} == {n: w.shape for n, w in after.items()}
    assert all(not np.array_equal(before[name], after[name]) for name in before)
    again = MlxRail().evaluate(spec_for(outcome.adapter, tmp_path, "again"), None, lambda _: None)
    assert again.loss < MlxRail().evaluate(spec, None, lambda _: None).loss


def test_small_updates_of_bfloat16_weights_are_not_lost(pico_model, tmp_path):
    """At this rate most updates are below half a step of bfloat16; rounded to nearest, the weights would stay."""
    outcome, _ = train(
        spec_for(
            pico_model,
            tmp_path,
            "full",
            mode="full",
            learning_rate=3e-5,
            dtype="bfloat16",
            eval_share=0.0,
            scheduler="constant",
            steps=8,
        )
    )
    before = mx.load(str(pico_model / "model.safetensors"))
    after = mx.load(str(outcome.adapter / "model.safetensors"))
    name = "model.layers.0.mlp.up_proj.weight"
    assert after[name].dtype == mx.bfloat16
    moved = (before[name].astype(mx.bfloat16) != after[name]).astype(mx.float32).mean().item()
    assert moved > 0.05


def test_the_witness_is_what_the_model_says(pico_model, tmp_path):
    """The base's own log-probabilities differ from the adapter's; both are those of a fresh forward pass."""
    outcome, _ = train(spec_for(pico_model, tmp_path, "run", steps=6, learning_rate=3e-2))
    witness = read_witness(outcome.adapter)
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(pico_model)
    model = PeftModel.from_pretrained(base, outcome.adapter)
    prompt = witness.prompts[0]
    with torch.no_grad():
        logs = model(torch.tensor([prompt.ids])).logits[0].log_softmax(-1)
        with model.disable_adapter():
            plain = model(torch.tensor([prompt.ids])).logits[0].log_softmax(-1)
    for place, tokens, found, own in zip(
        prompt.places, prompt.tokens, prompt.logprobs, prompt.base_logprobs, strict=True
    ):
        assert logs[place, list(tokens)].tolist() == pytest.approx(found, abs=1e-4)
        assert plain[place, list(tokens)].tolist() == pytest.approx(own, abs=1e-4)
    assert prompt.logprobs != prompt.base_logprobs


def test_a_run_that_diverges_says_so(pico_model, tmp_path):
    with pytest.raises(TrainingDivergedError):
        train(
            spec_for(pico_model, tmp_path, "run", learning_rate=1e30, warmup_steps=0, eval_share=0.0, max_grad_norm=0)
        )


@pytest.mark.parametrize(
    ("changes", "setting"),
    [
        ({"optim": "adamw_8bit"}, "training.optim"),
        ({"engine": "trl"}, "training.engine"),
        ({"kernels": "liger"}, "training.kernels"),
        ({"fp8": True}, "training.fp8"),
        ({"lora": {"init_lora_weights": "pissa"}}, "lora.init_lora_weights"),
    ],
)
def test_settings_that_would_do_nothing_are_rejected(pico_model, tmp_path, changes, setting):
    spec = spec_for(pico_model, tmp_path, "run", **changes)
    with pytest.raises(InvalidSettingError) as caught:
        MlxRail().check(spec, pico_model)
    assert caught.value.setting == setting


def test_rows_past_the_models_positions_are_rejected(pico_model, tmp_path):
    rows = [{"text": "the quick brown fox " * 60}] * 4
    spec = spec_for(pico_model, tmp_path, "run", rows=rows)
    short = tmp_path / "short"
    short.mkdir()
    for file in pico_model.iterdir():
        (short / file.name).write_bytes(file.read_bytes())
    config = json.loads((short / "config.json").read_text()) | {"max_position_embeddings": 32}
    (short / "config.json").write_text(json.dumps(config))
    with pytest.raises(SequenceTooLongError):
        train(replace(spec, base=short))


def test_several_processes_are_rejected(pico_model, tmp_path):
    ranks = Ranks(rank=0, count=2, address="127.0.0.1", port=1, is_hosted=False)
    with pytest.raises(MlxUnavailableError, match="2 processes"):
        train(replace(spec_for(pico_model, tmp_path, "run"), ranks=ranks))


def test_an_adapter_of_another_shape_is_rejected(pico_model, tmp_path):
    first, _ = train(spec_for(pico_model, tmp_path, "first"))
    for changes in ({"lora": {"r": 2}}, {"lora": {"target_modules": "q_proj"}}):
        spec = spec_for(pico_model, tmp_path, str(len(str(changes))), **changes)
        with pytest.raises(AdapterInvalidError):
            train(replace(spec, initial_adapter=first.adapter))


def test_what_mlx_raises_has_a_code(pico_model, tmp_path, monkeypatch):
    def broken(*_, **__):
        raise RuntimeError("[matmul] shapes differ")

    monkeypatch.setattr(mx, "logsumexp", broken)
    with pytest.raises(TrainingFailedError, match="shapes differ"):
        train(spec_for(pico_model, tmp_path, "run"))


def test_validation_is_the_mean_over_trained_tokens(pico_model, tmp_path):
    outcome, events = train(spec_for(pico_model, tmp_path, "run", sample_prompts=("who are you",), sample_tokens=3))
    last = [e for e in events if isinstance(e, EvalDone)][-1]
    found = MlxRail().evaluate(spec_for(pico_model, tmp_path, "same"), outcome.adapter, lambda _: None, part="heldout")
    assert found.loss == pytest.approx(min(e.loss for e in events if isinstance(e, EvalDone)), abs=1e-6)
    assert (found.tokens, math.isfinite(last.loss)) == (last.tokens, True)
