"""LoRA on experts and routers: named targets, what cannot be had, packing, and training through the rail."""

import json
from dataclasses import replace

import pytest
import torch
from cuda_training import spec_for, train
from decoder_classes import pico
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

from bp_runs.errors import InvalidSettingError, TargetModulesError
from bp_runs.spec import LoraSpec
from bp_train_cuda import CudaRail
from bp_train_cuda.model import lora
from bp_train_cuda.model.experts import choose_targets
from bp_train_cuda.model.pico import shrink_config

KINDS = ("qwen3_moe", "gpt_oss")


@pytest.fixture
def base(request, pico_model, tmp_path):
    """A pico mixture of experts with the tokenizer of the pico Llama."""
    folder = tmp_path / "base"
    config = shrink_config(AutoConfig.for_model(request.param))
    config.vocab_size = AutoConfig.from_pretrained(pico_model).vocab_size
    config.eos_token_id, config.pad_token_id, config.bos_token_id = 2, 2, 1
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (folder / file).write_bytes((pico_model / file).read_bytes())
    return folder


@pytest.mark.parametrize("base", ["qwen3_moe", pytest.param("gpt_oss", marks=pytest.mark.slow)], indirect=True)
def test_experts_and_routers_are_trained_and_saved(base, chat_file, tmp_path):
    changes = {"lora": {"target_modules": "q_proj,experts,router"}}
    training = {"steps": 2, "learning_rate": 1e-2, "packing": True}
    spec = spec_for(base, chat_file, tmp_path / "run", training=training, **changes)
    assert train(spec)[0].steps == 2
    weights = load_file(spec.folders.adapter / "adapter_model.safetensors")
    changed = [key for key, weight in weights.items() if "lora_B" in key and float(weight.abs().max()) > 0]
    router = "gate" if AutoConfig.from_pretrained(base).model_type == "qwen3_moe" else "router"
    for word in ("experts.lora_B", "experts.base_layer.lora_B", f"mlp.{router}.lora_B", "q_proj.lora_B"):
        assert len([key for key in changed if word in key]) == 2, word
    config = json.loads((spec.folders.adapter / "adapter_config.json").read_text())
    assert set(config["target_parameters"]) >= {"mlp.experts.gate_up_proj", "mlp.experts.down_proj"}
    own = CudaRail().evaluate(spec, None, lambda _: None).loss
    assert CudaRail().evaluate(spec, spec.folders.adapter, lambda _: None).loss < own
    # As each run of a multi-run begins: with the adapter of the run before.
    again = spec_for(base, chat_file, tmp_path / "next", training={"steps": 1}, **changes)
    assert train(replace(again, initial_adapter=spec.folders.adapter))[0].steps == 1


@pytest.mark.parametrize("kind", KINDS)
def test_packed_examples_are_apart_with_an_adapter_on_experts(kind):
    """Each token passes experts by itself, so an adapter on them reads no other example."""
    model = lora.add_lora(pico(kind), LoraSpec(r=2, target_modules="experts,router")).eval()
    with torch.no_grad():
        for weight in lora.trainable_weights(model).values():
            weight.normal_(0, 0.1)
        one, two = torch.arange(3, 12)[None], torch.arange(20, 30)[None]
        places = torch.cat([torch.arange(9), torch.arange(10)])[None]
        packed = model(input_ids=torch.cat([one, two], 1), position_ids=places, use_cache=False).logits[0]
        alone = [model(input_ids=ids, use_cache=False).logits[0] for ids in (one, two)]
    assert torch.allclose(packed[:9], alone[0], atol=1e-5)
    if kind == "qwen3_moe":  # gpt-oss needs masks of our own, which the rail makes
        assert torch.allclose(packed[9:], alone[1], atol=1e-5)


def test_what_the_presets_mean():
    model = pico("qwen3_moe")
    experts = choose_targets(model, "experts")
    assert (experts.modules, experts.parameters) == ((), ("mlp.experts.down_proj", "mlp.experts.gate_up_proj"))
    every = choose_targets(model, "all-linear,experts,router")
    assert "mlp.gate.weight" in every.parameters
    assert {name.rsplit(".", 1)[-1] for name in every.modules} == {"q_proj", "k_proj", "v_proj", "o_proj"}
    assert not every.warnings


@pytest.mark.parametrize(("kind", "word"), [("llama", "this model is none"), ("granitemoe", "can't be adapted")])
def test_models_without_experts_or_with_others_reject_the_name(kind, word):
    with pytest.raises(TargetModulesError, match=word):
        choose_targets(pico(kind), "q_proj,experts")


@pytest.mark.parametrize("base", ["qwen3_moe"], indirect=True)
@pytest.mark.parametrize("changed", [{"dropout": 0.1}, {"use_dora": True}, {"init_lora_weights": "pissa"}])
def test_what_parameters_cannot_have_is_rejected(base, chat_file, tmp_path, changed):
    spec = spec_for(base, chat_file, tmp_path / "run", lora={"target_modules": "experts", **changed})
    with pytest.raises(InvalidSettingError, match=r"mlp\.experts\.down_proj") as raised:
        CudaRail().check(spec, base)
    assert next(iter(changed)) in raised.value.fix
