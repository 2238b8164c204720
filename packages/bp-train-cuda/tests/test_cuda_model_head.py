"""The output head that the loss repeats gives the model's own logits, or there is none."""

import pytest
import torch
from decoder_classes import DEFAULT, EVERY, pico
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig

from bp_train_cuda.model.head import Head, find_decoder, find_head, prove_head
from bp_train_cuda.model.pico import build_pico


def _require_equal(model, head):
    """Independent of the proof's code: other tokens, two sequences, written out."""
    ids = torch.randint(0, len(head.weight), (2, 11), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        own = model(input_ids=ids, use_cache=False).logits.float()
        hidden = find_decoder(model)(input_ids=ids, use_cache=False).last_hidden_state
        mine = (hidden * head.pre_scale) @ head.weight.T
        mine = (mine if head.bias is None else mine + head.bias) * head.scale
        mine = mine if head.softcap is None else head.softcap * torch.tanh(mine / head.softcap)
    torch.testing.assert_close(mine.log_softmax(-1), own.log_softmax(-1), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", DEFAULT)
def test_head_equals_own_logits(name):
    model = pico(name)
    head = find_head(model)
    assert head is not None
    _require_equal(model, head)


@pytest.mark.slow
@pytest.mark.parametrize("name", EVERY)
def test_head_equals_own_logits_of_every_class(name):
    model = pico(name)
    if model is None:
        pytest.skip("its default config cannot be built small")
    if (head := find_head(model)) is not None:
        _require_equal(model, head)


@pytest.mark.parametrize(
    ("name", "numbers"),
    [
        ("gemma2", (1.0, 30.0, 1.0)),
        ("cohere", (0.0625, None, 1.0)),
        ("minicpm3", (1.0, None, 4.0)),
        ("llama", (1.0, None, 1.0)),
    ],
)
def test_numbers_come_from_the_config(name, numbers):
    head = find_head(pico(name))
    assert (head.scale, head.softcap, head.pre_scale) == pytest.approx(numbers)


def test_granite_divides_its_logits():
    model = build_pico(AutoConfig.for_model("granite", logits_scaling=8.0))
    head = find_head(model)
    assert head.scale == pytest.approx(1 / 8)
    _require_equal(model, head)


def test_bias_belongs_to_the_head():
    model = pico("phi")
    with torch.no_grad():
        model.lm_head.bias.normal_()
    head = find_head(model)
    assert head.bias is model.lm_head.bias
    _require_equal(model, head)


@pytest.mark.parametrize(
    "change",
    [{"scale": 1.01}, {"softcap": None}, {"softcap": 50.0}, {"pre_scale": 0.5}],
)
def test_wrong_numbers_are_not_proved(change):
    model = pico("gemma2")
    head = find_head(model)
    numbers = {"scale": head.scale, "softcap": head.softcap, "pre_scale": head.pre_scale} | change
    assert not prove_head(model, Head(head.weight, head.bias, **numbers))


def test_unknown_steps_after_the_head_give_no_head():
    model = pico("llama")
    own_forward = model.lm_head.forward
    model.lm_head.forward = lambda hidden: own_forward(hidden) ** 3
    assert find_head(model) is None


def test_a_transform_before_the_head_gives_no_head():
    assert find_head(pico("bert")) is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_is_proved_too(dtype):
    model = pico("gemma2").to(dtype)
    head = find_head(model)
    assert head.softcap == 30.0
    assert not prove_head(model, Head(head.weight, head.bias, 1.0, None, 1.0))


def test_an_adapter_stays_active_and_modes_and_random_state_come_back():
    model = get_peft_model(
        pico("llama"), LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")
    )
    model.train()
    model.base_model.model.model.layers[1].eval()
    modes, state = [m.training for m in model.modules()], torch.get_rng_state()
    head = find_head(model)
    assert head.weight is model.get_output_embeddings().weight
    assert modes == [m.training for m in model.modules()]
    assert torch.equal(state, torch.get_rng_state())
    model.eval()
    _require_equal(model, head)
