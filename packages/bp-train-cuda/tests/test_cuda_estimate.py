"""Estimates against the real thing: parameters of every family, and the bytes that real layers hold in backward."""

import sys
import weakref

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoConfig, AutoModelForCausalLM

from bp_data.loop.shapes import read_shapes
from bp_runs.errors import ShapesUnknownError
from bp_train_cuda.memory.estimate import Load, count_layer_bytes, count_saved_bytes, estimate, find_adapted
from bp_train_cuda.model.lora_linear import use_fast_lora

SIZES = {
    "vocab_size": 512, "hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
CASES = [
    ("llama", {}),
    ("llama", {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True, "head_dim": 32}),
    ("mistral", {"head_dim": 32}),
    ("qwen2", {}),
    ("qwen3", {}),
    ("smollm3", {}),
    ("phi3", {"tie_word_embeddings": True}),
    ("granite", {}),
    ("gemma2", {}),
    ("gemma3_text", {}),
    ("olmo2", {}),
    ("qwen3_5_text", {"head_dim": 64, "tie_word_embeddings": True}),
    ("qwen3_moe", {"head_dim": 32, "num_experts": 6, "moe_intermediate_size": 96}),
    ("qwen2_moe", {"num_experts": 6, "moe_intermediate_size": 96, "shared_expert_intermediate_size": 160}),
    ("mixtral", {"num_local_experts": 6}),
    ("olmoe", {"num_experts": 6}),
    ("gpt_oss", {"num_local_experts": 6}),
    ("qwen3_5_text", {"layer_types": ["full_attention", "linear_attention"] * 2}),
]


def build(kind, **changes):
    return AutoConfig.for_model(kind, **{**SIZES, **changes})


@pytest.mark.parametrize(("kind", "changes"), CASES)
def test_parameters_are_those_of_the_model(kind, changes):
    given = {**SIZES, **changes, "model_type": kind}
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(build(kind, **changes))
    linears = [m for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and n != "lm_head"]
    for config in (given, model.config.to_dict()):
        shapes = read_shapes(config)
        assert shapes.in_linears == sum(m.weight.numel() for m in linears)
        assert shapes.parameters == sum(p.numel() for p in model.parameters())


def test_the_adapter_is_counted_as_peft_builds_it():
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(build("qwen2"))
        model = get_peft_model(model, LoraConfig(r=8, target_modules="all-linear", use_dora=True))
    shapes = read_shapes({**SIZES, "model_type": "qwen2"})
    assert estimate(shapes, Load(r=8, use_dora=True)).trained == sum(
        p.numel() for p in model.parameters() if p.requires_grad
    )


def test_the_adapter_on_experts_is_counted_as_peft_builds_it():
    changes = {"head_dim": 32, "num_experts": 6, "moe_intermediate_size": 96}
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(build("qwen3_moe", **changes))
        parameters = ["experts.gate_up_proj", "experts.down_proj"]
        model = get_peft_model(model, LoraConfig(r=8, target_modules=["q_proj"], target_parameters=parameters))
    shapes = read_shapes({**SIZES, **changes, "num_experts_per_tok": 2, "model_type": "qwen3_moe"})
    plain, found = (estimate(shapes, Load(r=8, targets=f"q_proj{more}")) for more in ("", ",experts"))
    assert found.trained == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert found.parts["weights"] == plain.parts["weights"] > 2 * shapes.in_experts
    assert sum(found.parts.values()) > sum(plain.parts.values()) + 2 * shapes.in_experts // shapes.layers


class Live(TorchDispatchMode):
    """Counts the bytes of all storages that are alive."""

    def __init__(self):
        super().__init__()
        self.sizes, self.now, self.peak = {}, 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self.add(tensor.untyped_storage())
        return out

    def add(self, storage):
        key = storage._cdata
        if key not in self.sizes:
            self.sizes[key] = storage.nbytes()
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self.drop, key)

    def drop(self, key):
        self.now -= self.sizes.pop(key)


def measure(config, load, tokens):
    """Bytes a token at the peak of backward: over what is there before forward, and before backward."""
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    if load.mode != "full":
        targets = "all-linear" if load.targets == "all-linear" else load.targets.split(",")
        model = get_peft_model(model, LoraConfig(r=load.r, target_modules=targets, task_type="CAUSAL_LM"))
        for weight in model.parameters():
            weight.data = weight.data.float() if weight.requires_grad else weight.data
        use_fast_lora(model)
    if load.checkpointing:
        model.gradient_checkpointing_enable()
    if load.mode != "full":
        model.enable_input_require_grads()
    live = Live()
    for weight in model.parameters():
        weight.grad = torch.zeros_like(weight) if weight.requires_grad else None
        for tensor in (weight, weight.grad):
            if tensor is not None:
                live.add(tensor.untyped_storage())
    core = model if load.mode == "full" else model.get_base_model()
    start = live.now
    with live:
        with torch.autocast("cpu", torch.bfloat16):
            hidden = core.model(input_ids=torch.zeros(1, tokens, dtype=torch.long), use_cache=False).last_hidden_state
        before = live.peak = live.now
        hidden.sum().backward()
    return (live.peak - start) / tokens, (live.peak - before) / tokens


@pytest.mark.parametrize(
    "load",
    [
        Load(r=1),
        Load(mode="lora", r=1),
        Load(mode="lora", r=1, targets="q_proj,v_proj"),
        Load(mode="lora", r=1, targets="q_proj,k_proj,v_proj,o_proj"),
        Load(mode="full"),
    ],
)
@pytest.mark.parametrize(
    "sizes", [{"intermediate_size": 1536}, {"num_attention_heads": 8, "head_dim": 64, "num_key_value_heads": 4}]
)
def test_a_layer_s_bytes_are_those_that_live_in_backward(load, sizes):
    config = build("llama", **{**sizes, "num_hidden_layers": 2})
    shapes = read_shapes(config.to_dict())
    expected = count_layer_bytes(shapes, load, find_adapted(shapes, load))
    assert measure(config, load, 512)[1] == pytest.approx(expected, rel=0.05)


def test_without_checkpointing_every_layer_keeps_what_is_counted():
    load = Load(mode="lora", r=1, checkpointing=False)
    two, three = (build("llama", num_hidden_layers=n) for n in (2, 3))
    grown = measure(three, load, 512)[0] - measure(two, load, 512)[0]
    shapes = read_shapes(two.to_dict())
    assert count_saved_bytes(shapes, load) == pytest.approx(grown, rel=0.05)


@pytest.mark.parametrize(
    ("optimizer", "moments", "paged"),
    [("auto", 0, True), ("adamw_8bit", 2, False), ("adamw_torch", 4, False), ("paged_adamw_8bit", 0, True)],
)
def test_the_optimizer_s_moments_count_where_they_lie(optimizer, moments, paged):
    shapes = read_shapes({**SIZES, "model_type": "llama", "vocab_size": 64})
    found = estimate(shapes, Load(mode="full", optimizer=optimizer))
    assert found.parts["optimizer"] / found.trained == pytest.approx(moments, rel=0.05)
    assert bool(found.paged) == paged
    assert estimate(shapes, Load(fused=True)).in_use < estimate(shapes, Load()).in_use


def test_what_is_unknown_is_said():
    for config in ({"model_type": "mamba"}, {}, {"model_type": "llama", "hidden_size": 8}):
        with pytest.raises(ShapesUnknownError):
            read_shapes(config)


def test_estimating_needs_no_framework():
    import subprocess

    code = "import sys, bp_train_cuda.memory.estimate, bp_data.loop.shapes; assert 'torch' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
