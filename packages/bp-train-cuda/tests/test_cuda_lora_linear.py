"""Our LoRA product against PEFT's, judged in float64; PEFT's own forward wherever it does not apply."""

import copy
import os
import subprocess
import sys

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.utils.checkpoint import checkpoint
from transformers import LlamaConfig, LlamaForCausalLM

from bp_train_cuda.model import lora_linear
from bp_train_cuda.model.lora_linear import restore_lora, use_fast_lora

HIDDEN, INNER = 48, 80


class Block(torch.nn.Module):
    """Layers that share inputs, one that does not, with and without bias."""

    def __init__(self):
        super().__init__()
        self.q_proj = torch.nn.Linear(HIDDEN, HIDDEN)
        self.k_proj, self.v_proj = torch.nn.Linear(HIDDEN, 16), torch.nn.Linear(HIDDEN, 16)
        self.gate_proj = torch.nn.Linear(HIDDEN, INNER, bias=False)
        self.up_proj = torch.nn.Linear(HIDDEN, INNER, bias=False)
        self.down_proj = torch.nn.Linear(INNER, HIDDEN, bias=False)

    def forward(self, x):
        y = x + self.q_proj(x) * torch.cat([self.k_proj(x), self.v_proj(x), self.k_proj(x * 2)], -1).tanh()
        return y + self.down_proj(torch.nn.functional.silu(self.gate_proj(y)) * self.up_proj(y))


def adapted(dtype=torch.float64, **config):
    torch.manual_seed(1)
    model = get_peft_model(Block().to(dtype), LoraConfig(r=4, lora_alpha=6, target_modules="all-linear", **config))
    for name, weight in model.named_parameters():
        if weight.requires_grad:
            weight.data = torch.randn(weight.shape, dtype=torch.float64).mul(0.3).to(dtype)
    return model.train()


def run(model, x, through=lambda f, x: f(x)):
    """Output, the input's gradient, and the adapter's gradients by name."""
    x = x.clone().requires_grad_()
    out = through(model, x)
    weight = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)
    (out * weight).sum().backward()
    grads = {name: w.grad.clone() for name, w in model.named_parameters() if w.requires_grad}
    model.zero_grad()
    return [out.detach(), x.grad, *grads.values()], list(grads)


def checkpointed(model, x):
    return checkpoint(model, x, use_reentrant=False)


@pytest.mark.parametrize("through", [lambda f, x: f(x), checkpointed], ids=["kept", "checkpointed"])
@pytest.mark.parametrize("config", [{}, {"use_rslora": True}], ids=["lora", "rslora"])
def test_in_float64_it_is_peft_s(through, config):
    model, x = adapted(**config), torch.randn(3, 7, HIDDEN, dtype=torch.float64)
    expected, names = run(model, x)
    assert use_fast_lora(model) == 6
    found, _ = run(model, x, through)
    for one, other, name in zip(found, expected, ["out", "x", *names], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9, msg=name)
    restore_lora(model)
    assert all("forward" not in vars(module) for module in model.modules())
    again, _ = run(model, x)
    assert all(torch.equal(one, other) for one, other in zip(again, expected, strict=True))


@pytest.mark.parametrize("base", ["bfloat16", "nf4"])
def test_in_bfloat16_it_is_as_near_to_float64_as_peft(base):
    if base == "nf4":
        from bitsandbytes.functional import dequantize_4bit
        from bitsandbytes.nn import Linear4bit
    block = Block().to(torch.bfloat16)
    exact = copy.deepcopy(block).double()
    if base == "nf4":
        for name, layer in list(block.named_children()):
            four = Linear4bit(
                layer.in_features, layer.out_features, layer.bias is not None, torch.bfloat16, quant_type="nf4"
            )
            four.load_state_dict(layer.state_dict())
            four.weight = four.weight.to("cpu")  # packs it
            setattr(block, name, four)
            exact_weight = dequantize_4bit(four.weight, four.weight.quant_state).double()
            getattr(exact, name).weight.data = exact_weight.view_as(getattr(exact, name).weight)
    config = LoraConfig(r=4, lora_alpha=6, target_modules="all-linear")
    torch.manual_seed(2)
    model, reference = get_peft_model(block, config), get_peft_model(exact, config).double()
    for (name, weight), (_, other) in zip(model.named_parameters(), reference.named_parameters(), strict=True):
        if weight.requires_grad:
            weight.data = torch.randn(weight.shape) * 0.3
            other.data = weight.data.double()
    x = torch.randn(4, 33, HIDDEN).bfloat16()
    expected, names = run(reference, x.double())

    def errors():
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found, _ = run(model, x)
        return [float((a.double() - b).norm() / b.norm()) for a, b in zip(found, expected, strict=True)]

    plain = errors()
    assert use_fast_lora(model) == 6
    for mine, theirs, name in zip(errors(), plain, ["out", "x", *names], strict=True):
        assert mine < max(1.3 * theirs, 2e-3), name


@pytest.mark.parametrize("config", [{"lora_dropout": 0.5}, {"use_dora": True}, {"lora_bias": True}], ids=str)
def test_what_peft_computes_in_between_stays_peft_s(config):
    assert use_fast_lora(adapted(torch.float32, **config)) == 0


def test_adapters_that_are_off_or_merged_are_peft_s():
    model, x = adapted(), torch.randn(2, 5, HIDDEN, dtype=torch.float64)
    use_fast_lora(model)
    with torch.no_grad():
        on = model(x)
        with model.disable_adapter():
            off = model(x)
        base = copy.deepcopy(model).unload()(x)
        model.merge_adapter()
        merged = model(x)
    assert torch.equal(off, base)
    assert not torch.allclose(on, off)
    torch.testing.assert_close(merged, on)


def test_a_layer_that_is_not_called_gets_no_gradient_and_no_share_of_another_input():
    model = adapted()
    use_fast_lora(model)
    layers = model.base_model.model
    x, other = (torch.randn(2, 5, HIDDEN, dtype=torch.float64) for _ in range(2))
    layers.q_proj(x)
    expected = layers.k_proj.base_layer(other) + 1.5 * layers.k_proj.lora_B["default"](
        layers.k_proj.lora_A["default"](other)
    )
    found = layers.k_proj(other)
    torch.testing.assert_close(found, expected)
    found.sum().backward()
    assert layers.k_proj.lora_B["default"].weight.grad.abs().sum() > 0
    assert layers.v_proj.lora_B["default"].weight.grad is None


def test_a_checkpoint_does_not_multiply_a_block_s_last_layer_again(monkeypatch):
    model, calls = adapted(), []
    plain = lora_linear._add_adapter

    def count(rows, *rest):
        calls.append(rows.shape[-1])
        return plain(rows, *rest)

    use_fast_lora(model)
    monkeypatch.setattr(lora_linear, "_add_adapter", count)
    run(model, torch.randn(3, 7, HIDDEN, dtype=torch.float64), checkpointed)
    assert calls.count(INNER) == 1  # the down projection: forward alone
    assert calls.count(HIDDEN) == 2 * (len(calls) - 1) / 2


def test_a_hundred_steps_lose_what_peft_loses():
    losses = {}
    for fast in (False, True):
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=96, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2
        )
        model = get_peft_model(LlamaForCausalLM(config), LoraConfig(r=4, lora_alpha=8, target_modules="all-linear"))
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        assert use_fast_lora(model) == 14 if fast else True
        weights = [w for w in model.train().parameters() if w.requires_grad]
        optimizer, ids = torch.optim.AdamW(weights, lr=1e-2), torch.randint(0, 96, (4, 24))
        losses[fast] = []
        for _ in range(100):
            loss = model(input_ids=ids, labels=ids).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses[fast].append(loss.item())
    assert losses[True][-1] < losses[True][0] - 0.1
    assert max(abs(a - b) for a, b in zip(losses[True], losses[False], strict=True)) < 2e-3


def test_one_launch_unpacks_what_bitsandbytes_unpacks():
    """In a process of its own, since Triton chooses between GPU and interpreter when it is imported."""
    code = """
import torch
from bitsandbytes.functional import dequantize_4bit, quantize_4bit
from bp_train_cuda.model import nf4_triton

for shape in ((64, 128), (96, 200), (320, 512)):
    packed, state = quantize_4bit(torch.randn(*shape), compress_statistics=True, quant_type="nf4")
    assert torch.equal(nf4_triton.dequantize(packed, state), dequantize_4bit(packed, state)), shape
"""
    pytest.importorskip("triton")
    subprocess.run([sys.executable, "-c", code], env=os.environ | {"TRITON_INTERPRET": "1"}, check=True)
