"""Mixtures of experts: what an adapter reaches, said before weights are loaded, and training that works."""

import logging
from dataclasses import replace

import pytest
import torch
from cuda_training import spec_for, train
from decoder_classes import pico
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

from bp_runs.errors import PackingError, TargetModulesError
from bp_runs.spec import LoraSpec
from bp_train_cuda import CudaRail
from bp_train_cuda.model import load, lora
from bp_train_cuda.model.experts import ALL_LINEAR, choose_targets, find_experts
from bp_train_cuda.model.head import find_decoder, find_head
from bp_train_cuda.model.pico import shrink_config

FUSED = ("qwen3_moe", "mixtral", "granitemoe", "granitemoehybrid", "phimoe", "gpt_oss", "olmoe", "qwen3_next",
         "deepseek_v3", "llama4_text", "qwen3_5_moe_text", "nemotron_h")  # fmt: skip
TRAINED = ("qwen3_moe", "mixtral", "granitemoe", "granitemoehybrid", "phimoe", "gpt_oss")


class _TwoExperts(torch.nn.Module):
    """A layer of single experts, as remote code and older models have it."""

    def __init__(self, width):
        super().__init__()
        self.experts = torch.nn.ModuleList(
            torch.nn.ModuleDict({"up_proj": torch.nn.Linear(width, width)}) for _ in range(4)
        )
        self.gate = torch.nn.Linear(width, 4)


@pytest.mark.parametrize("name", FUSED)
def test_all_linear_reaches_no_expert_and_no_router(name):
    model = pico(name)
    experts = find_experts(model)
    assert len(experts.fused) >= 2
    assert not experts.linear
    adapted = lora.add_lora(model, LoraSpec(r=2, target_modules=ALL_LINEAR))
    reached = [key for key, module in adapted.named_modules() if isinstance(module, LoraLayer)]
    assert reached
    assert not [key for key in reached if ".experts" in key or "router" in key or key.endswith(".gate")]
    assert not adapted.peft_config["default"].target_parameters
    assert all(weight.dim() == 2 for weight in lora.trainable_weights(adapted).values())


def test_a_dense_model_keeps_pefts_all_linear():
    model = pico("llama")
    assert not find_experts(model)
    assert choose_targets(model, "all-linear").modules == ALL_LINEAR
    assert choose_targets(model, "q_proj, v_proj").modules == ("q_proj", "v_proj")


def test_a_convolution_is_no_expert():
    assert not find_experts(pico("lfm2"))


def test_layers_of_the_same_name_as_experts_are_rejected_where_peft_redirects_them():
    """Qwen3-Next's shared expert has a gate_proj; PEFT would adapt the fused experts in its place."""
    model = pico("qwen3_next")
    with pytest.raises(TargetModulesError, match="gate_proj") as raised:
        choose_targets(model, "q_proj,gate_proj,up_proj,down_proj")
    assert "q_proj,k_proj,v_proj,o_proj" in raised.value.fix
    warning = choose_targets(model, "all-linear").warnings[0]
    assert "PEFT can't adapt down_proj, gate_proj, up_proj" in warning


def test_shared_experts_that_peft_leaves_alone_are_adapted():
    modules = choose_targets(pico("qwen2_moe"), "all-linear").modules
    assert any(name.endswith("shared_expert.gate_proj") for name in modules)


def test_single_experts_get_an_adapter_and_a_warning_but_their_router_gets_none():
    model = pico("llama")
    model.config.num_experts = 4
    model.model.layers[0].mlp = _TwoExperts(64)
    experts = find_experts(model)
    assert len(experts.linear) == 4
    assert experts.routers == ("model.layers.0.mlp.gate",)
    targets = choose_targets(model, "all-linear")
    assert "model.layers.0.mlp.experts.3.up_proj" in targets.modules
    assert "model.layers.0.mlp.gate" not in targets.modules
    assert "set target_modules to q_proj,k_proj,v_proj,o_proj" in targets.warnings[0]


@pytest.fixture
def experts_folder(pico_model, tmp_path):
    """Writes a pico mixture of experts with the tokenizer of the pico Llama."""

    def write(name, **changes):
        folder = tmp_path / name
        size = AutoConfig.from_pretrained(pico_model).vocab_size
        config = shrink_config(AutoConfig.for_model(name, **changes))
        config.vocab_size, config.eos_token_id, config.pad_token_id, config.bos_token_id = size, 2, 2, 1
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(config).save_pretrained(folder)
        for file in ("tokenizer.json", "tokenizer_config.json"):
            (folder / file).write_bytes((pico_model / file).read_bytes())
        return folder

    return write


def test_the_rail_says_it_before_the_weights_are_there(experts_folder, chat_file, tmp_path, caplog):
    folder = experts_folder("qwen3_moe")
    for file in folder.glob("*.safetensors*"):
        file.unlink()
    with caplog.at_level(logging.WARNING, logger="bp_train_cuda"):
        CudaRail().check(spec_for(folder, chat_file, tmp_path / "run"), folder)
    assert "its experts and routers are not adapted, k_proj, o_proj, q_proj, v_proj are" in caplog.text


@pytest.mark.parametrize(
    "name",
    [name if name in ("qwen3_moe", "phimoe") else pytest.param(name, marks=pytest.mark.slow) for name in TRAINED],
)
def test_a_mixture_of_experts_trains_and_its_adapter_changes_it(name, experts_folder, chat_file, tmp_path):
    folder = experts_folder(name)
    spec = spec_for(folder, chat_file, tmp_path / "run", training={"steps": 2, "learning_rate": 1e-2})
    outcome, events = train(spec)
    assert [e for e in events if e.kind == "notice" and e.level == "warning" and "mixture of experts" in e.message]
    assert outcome.steps == 2
    weights = load_file(spec.folders.adapter / "adapter_model.safetensors")
    assert not [key for key in weights if ".experts." in key or "router" in key]
    assert any(float(weight.abs().max()) > 0 for key, weight in weights.items() if "lora_B" in key)
    own = CudaRail().evaluate(spec, None, lambda _: None).loss
    assert CudaRail().evaluate(spec, spec.folders.adapter, lambda _: None).loss < own
    # As each run of a multi-run begins: with the adapter of the run before.
    again = spec_for(folder, chat_file, tmp_path / "next", training={"steps": 1})
    assert train(replace(again, initial_adapter=spec.folders.adapter))[0].steps == 1


@pytest.mark.parametrize("name", TRAINED)
def test_decoder_and_head_train_a_mixture_of_experts(name):
    """As the loop calls them: no labels reach the model, so it adds no loss of its own."""
    model = lora.add_lora(pico(name), LoraSpec(r=2))
    head, decoder = find_head(model), find_decoder(model)
    weights = list(lora.trainable_weights(model).values())
    optimizer = torch.optim.AdamW(weights, lr=1e-2)
    ids = torch.randint(0, 90, (2, 16), generator=torch.Generator().manual_seed(0))
    model.train()
    losses = []
    for _ in range(3):
        hidden = decoder(input_ids=ids, use_cache=False).last_hidden_state[:, :-1]
        loss = torch.nn.functional.cross_entropy(head.logits(hidden.flatten(0, 1)), ids[:, 1:].flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]


def test_router_losses_are_left_out(experts_folder):
    folder = experts_folder("qwen3_moe", output_router_logits=True)
    assert AutoConfig.from_pretrained(folder).output_router_logits
    device = load.Device(kind="cpu", why="", memory=0)
    model = load.load_model(folder, device, load.Mode("lora", ""), dtype="float32", trust_remote_code=False)
    ids = torch.arange(12)[None]
    with torch.no_grad():
        found = model(input_ids=ids, labels=ids)
    own = torch.nn.functional.cross_entropy(found.logits[0, :-1], ids[0, 1:])
    assert float(found.loss) == pytest.approx(float(own), rel=1e-5)


def test_masks_of_our_own_are_trained_with_and_trl_which_passes_none_is_rejected(experts_folder, chat_file, tmp_path):
    folder = experts_folder("gpt_oss")
    spec = spec_for(folder, chat_file, tmp_path / "run", training={"steps": 1, "packing": True})
    assert train(spec)[0].steps == 1
    spec = spec_for(folder, chat_file, tmp_path / "trl", training={"steps": 1, "packing": True, "engine": "trl"})
    with pytest.raises(PackingError, match="TRL's trainer can't keep packed examples") as raised:
        train(spec)
    assert 'training.engine="native"' in raised.value.fix
