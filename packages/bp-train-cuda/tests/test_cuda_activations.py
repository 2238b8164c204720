"""Memory plans: what they choose, and that they change where activations wait but not a gradient."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from cuda_training import spec_for, train
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

from bp_data.loop.shapes import read_shapes
from bp_runs.events import Notice, StepDone
from bp_runs.spec import TrainingSpec
from bp_train_cuda.memory import planner
from bp_train_cuda.memory.estimate import Load, Parts, count_parts
from bp_train_cuda.memory.planner import ActivationPlan, Choice, choose_halvings, choose_rows
from bp_train_cuda.model import activations
from bp_train_cuda.model.activations import InputOffload, Tiling, tile_feed_forward, untile_feed_forward
from bp_train_cuda.model.lora_linear import use_fast_lora

LAYERS, WIDTH = 4, 32


def adapted(dtype=torch.float64):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=96, hidden_size=WIDTH, intermediate_size=64, num_hidden_layers=LAYERS, num_attention_heads=2
    )
    model = get_peft_model(LlamaForCausalLM(config).to(dtype), LoraConfig(r=4, target_modules="all-linear"))
    for weight in model.parameters():
        if weight.requires_grad:
            weight.data = torch.randn(weight.shape, dtype=torch.float64).mul(0.1).to(dtype)
    use_fast_lora(model)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model.train()


IDS = torch.arange(2 * 40).view(2, 40) % 96


def gradients(model, context=None):
    if context is None:
        loss = model(input_ids=IDS, labels=IDS).loss
    else:
        with context:
            loss = model(input_ids=IDS, labels=IDS).loss
    loss.backward()
    found = [weight.grad.clone() for weight in model.parameters() if weight.requires_grad]
    model.zero_grad()
    return [loss.detach(), *found]


def test_inputs_in_ram_change_no_bit(monkeypatch):
    monkeypatch.setattr(activations, "_LEAST", 0)
    model = adapted()
    expected, offload = gradients(model), InputOffload(WIDTH, LAYERS)
    for _ in range(2):  # the second time in the buffers of the first
        found = gradients(model, offload.forward_pass())
        assert offload.moved == LAYERS - 1
        assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


@pytest.mark.parametrize("tile", [7, 33, 40])
def test_tiles_change_no_gradient_and_are_run_once_forward_and_once_backward(tile):
    model, calls = adapted(), []
    expected = gradients(model)
    assert tile_feed_forward(model, Tiling(tile)) == LAYERS
    model.base_model.model.model.layers[0].mlp.act_fn.register_forward_hook(lambda *_: calls.append(1))
    found = gradients(model)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)
    assert len(calls) == 2 * -(-IDS.numel() // tile)
    untile_feed_forward(model)
    assert all(torch.equal(one, other) for one, other in zip(gradients(model), expected, strict=True))


PARTS = Parts(input=1, saved=11, inner=20, rest=10, unpacked=0, head_token=1, head_logits=0, vocabulary=1, head_own=0)


def blocks(count=10):
    return [SimpleNamespace(gradient_checkpointing=True) for _ in range(count)]


@pytest.mark.parametrize(
    ("spare", "expected"),
    [
        (39 * 100, Choice(0, offload=True)),  # inputs and one layer's work take 40 bytes a token
        (40 * 100, Choice(0, offload=False)),
        (54 * 100, Choice(1, offload=False)),  # 11 bytes and a third, less the input
        (165 * 100, Choice(9, offload=False)),
        (10**6, Choice(10, offload=False)),
    ],
)
def test_memory_decides_what_layers_keep(spare, expected):
    plan = ActivationPlan(spare, PARTS, blocks(), InputOffload(8, 10))
    assert plan.choose(100) == expected
    plan.forward_pass(100)
    assert [block.gradient_checkpointing for block in plan.blocks] == [True] * (10 - expected.kept) + [
        False
    ] * expected.kept
    assert plan.has_kept == (expected.kept > 0)
    plan.shrink()
    assert plan.choose(100).kept <= expected.kept


def test_experts_with_a_change_added_count_in_every_layer_that_keeps_them():
    assert ActivationPlan(165 * 100, replace(PARTS, saved_weights=1385), blocks()).choose(100).kept == 4
    assert ActivationPlan(10**6, replace(PARTS, saved_weights=10**6), blocks()).choose(100).kept == 0


def test_tiles_bound_a_layer_s_work():
    parts = count_parts(
        read_shapes(LlamaConfig(hidden_size=64, intermediate_size=256, vocab_size=64).to_dict()), Load()
    )
    assert parts.block(199, 100) == parts.block(199)
    assert parts.block(400) - parts.block(400, 100) == 300 * parts.inner


@pytest.mark.parametrize(
    ("spare", "expected"),
    [  # 16,384 tokens: 30 bytes of work each, 10 of inputs; in tiles 20 of the 30 count for a tile's tokens
        (40 * 16384, Choice(0, offload=False)),
        (30 * 16384, Choice(0, offload=False, tile=8192)),
        (22 * 16384, Choice(0, offload=True, tile=8192)),
        (17 * 16384, Choice(0, offload=True, tile=4096)),
        (100, Choice(0, offload=True, tile=2048)),
    ],
)
def test_what_costs_least_goes_first(spare, expected):
    tiling = Tiling()
    plan = ActivationPlan(spare, PARTS, blocks(), InputOffload(8, 10), tiling)
    assert plan.choose(16384) == expected
    plan.forward_pass(16384)
    assert tiling.tokens == expected.tile
    no_ram = ActivationPlan(spare, PARTS, blocks(), InputOffload(8, 10, room=10 * 16384 - 1), tiling)
    assert not no_ram.choose(16384).offload


@pytest.mark.parametrize(
    ("batch", "accumulation", "length", "spare", "expected"),
    [
        (2, 4, 2048, 10**9, 2),  # 8,192 tokens are enough
        (2, 4, 300, 10**9, 4),
        (2, 6, 1024, 10**9, 6),
        (2, 4, 300, 40 * 600, 1),  # two rows fit
        (2, 4, 300, 40 * 1200, 2),
        (1, 7, 300, 10**9, 7),
        (1, 1, 300, 10**9, 1),
        (8, 4, 2048, 10**9, 1),
    ],
)
def test_rows_at_once(batch, accumulation, length, spare, expected):
    spec = SimpleNamespace(training=TrainingSpec(batch_size=batch, gradient_accumulation=accumulation))
    assert choose_rows(spec, ActivationPlan(spare, PARTS, blocks(), None), [length] * 20) == expected
    assert choose_rows(spec, None, [length]) == 1


@pytest.mark.parametrize(
    ("rows", "longest", "spare", "expected"),
    [
        (8, 2048, 40 * 16384, 0),
        (8, 2048, 40 * 8192, 1),
        (8, 2048, 40 * 4096, 2),
        (8, 2048, 100, 2),  # smaller chunks would have too few tokens: tiles and offloading do the rest
        (8, 300, 100, 0),
        (1, 9000, 100, 0),
        (3, 4096, 40 * 8192, 1),
    ],
)
def test_chunks_come_before_tiles(rows, longest, spare, expected):
    assert choose_halvings(ActivationPlan(spare, PARTS, blocks()), rows, longest, 3) == expected
    assert choose_halvings(None, rows, longest, 3) == choose_halvings(ActivationPlan(0, PARTS, []), rows, 0, 0) == 0


def run(chat_file, pico_model, folder):
    change = {"steps": 4, "batch_size": 2, "gradient_accumulation": 4, "learning_rate": 3e-3}
    outcome, events = train(spec_for(pico_model, chat_file, folder, training=change))
    return load_file(outcome.adapter / "adapter_model.safetensors"), events


@pytest.mark.parametrize("spare", [2**33, 0], ids=["room", "no room"])
def test_a_planned_run_learns_what_a_plain_one_learns(chat_file, pico_model, tmp_path, monkeypatch, spare):
    expected, plain = run(chat_file, pico_model, tmp_path / "plain")
    plan_activations = planner.plan_activations

    def as_on_a_gpu(spec, mode, model):
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        return plan_activations(spec, mode, model)

    monkeypatch.setattr(planner, "free_memory", lambda: spare)
    monkeypatch.setattr(planner, "plan_activations", as_on_a_gpu)
    found, events = run(chat_file, pico_model, tmp_path / "planned")
    plan = next(e.details["plan"] for e in events if isinstance(e, Notice) and "plan" in e.details)
    assert (plan["together"], plan["kept"], plan["offload"]) == ((4, 2, False) if spare else (1, 0, True))
    for before, after in zip(*([e for e in some if isinstance(e, StepDone)] for some in (plain, events)), strict=True):
        assert (after.tokens, after.loss) == (before.tokens, pytest.approx(before.loss, rel=1e-5))
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-4, atol=1e-5)
