"""Packed examples give what they give alone, or packing is rejected: for every decoder class that can be built small."""

import json
from array import array
from dataclasses import replace

import pytest
import torch
from cuda_training import spec_for
from decoder_classes import DEFAULT, EVERY, pico
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig

from bp_data import IGNORED, TokenRow, build_pack
from bp_runs.errors import PackingError
from bp_train_cuda import check
from bp_train_cuda.model.packing import Packing, check_packing, require_packable

KEEPS_APART = ("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3", "cohere", "granitemoe", "minicpm3",
               "gpt_oss", "opt", "falcon")  # fmt: skip
MIXES_ON_A_CPU = ("qwen3_5_text", "qwen3_next", "lfm2", "granitemoehybrid", "falcon_h1", "mamba")
LENGTHS = (13, 30, 1, 11)


def _largest_leak(model, packing):
    """Independent of the proof's code: other lengths and tokens; each example packed against the same alone."""
    rows = torch.randint(0, 90, (sum(LENGTHS),), generator=torch.Generator().manual_seed(5)).split(LENGTHS)
    positions = torch.cat([torch.arange(length) for length in LENGTHS])[None]
    with torch.no_grad():
        packed = model(
            input_ids=torch.cat(rows)[None], position_ids=positions, use_cache=False, **packing.arguments(positions)
        ).logits[0]
        alone = torch.cat([model(input_ids=row[None], use_cache=False).logits[0] for row in rows])
    return float((packed - alone).abs().max() / alone.abs().max())


def _require_apart_or_rejected(model):
    try:
        packing = require_packable(model)
    except PackingError:
        return "rejected"
    assert _largest_leak(model, packing) < 1e-4
    return "apart"


@pytest.mark.parametrize("name", sorted({*DEFAULT, *KEEPS_APART, *MIXES_ON_A_CPU}))
def test_packed_equals_alone_or_is_rejected(name):
    found = _require_apart_or_rejected(pico(name))
    if name in KEEPS_APART:
        assert found == "apart"
    if name in MIXES_ON_A_CPU:
        assert found == "rejected"


@pytest.mark.slow
@pytest.mark.parametrize("name", EVERY)
def test_packed_equals_alone_or_is_rejected_of_every_class(name):
    model = pico(name)
    if model is None:
        pytest.skip("its default config cannot be built small")
    _require_apart_or_rejected(model)


@pytest.mark.parametrize("name", ["mamba", "opt"])
def test_what_is_rejected_does_mix(name):
    assert _largest_leak(pico(name), Packing()) > 1e-3


@pytest.mark.parametrize("name", ["gpt_oss", "afmoe", "opt"])
def test_masks_are_made_for_a_model_that_makes_its_own_without_positions(name):
    model = pico(name)
    packing = require_packable(model)
    assert packing == Packing(masked=model)
    assert _largest_leak(model, packing) < 1e-4
    positions = torch.tensor([[0, 1, 2, 0, 1]])
    masks = packing.arguments(positions)["attention_mask"]
    for mask in masks.values() if isinstance(masks, dict) else [masks]:
        seen = mask[0, 0] if mask.dtype == torch.bool else mask[0, 0] == 0
        assert seen.tolist() == [
            [True, False, False, False, False],
            [True, True, False, False, False],
            [True, True, True, False, False],
            [False, False, False, True, False],
            [False, False, False, True, True],
        ]


def test_the_error_names_the_package_that_keeps_examples_apart():
    with pytest.raises(PackingError, match="qwen3_5_text model can't be kept apart on cpu") as raised:
        require_packable(pico("qwen3_5_text"))
    assert "causal_conv1d" in raised.value.cause
    assert "training.packing=False" in raised.value.fix


def test_state_arguments_are_those_of_transformers():
    positions = torch.tensor([[0, 1, 2, 0, 0, 1]])
    assert Packing().arguments(positions) == {}
    found = Packing(seq_idx=True, cu_seq_lens=True).arguments(positions)
    assert found["seq_idx"].tolist() == [[0, 0, 0, 1, 2, 2]]
    assert found["cu_seq_lens_q"].tolist() == found["cu_seq_lens_k"].tolist() == [0, 3, 4, 6]
    assert {found[name].dtype for name in ("seq_idx", "cu_seq_lens_q", "cu_seq_lens_k")} == {torch.int32}
    assert found["max_length_q"] == found["max_length_k"] == 3


def test_state_arguments_equal_those_of_the_collator():
    from transformers import DataCollatorWithFlattening

    rows = [{"input_ids": list(range(length))} for length in LENGTHS]
    collate = DataCollatorWithFlattening(return_flash_attn_kwargs=True, return_seq_idx=True, return_tensors="pt")
    theirs = collate(rows)
    mine = Packing(seq_idx=True, cu_seq_lens=True).arguments(theirs["position_ids"])
    for name, value in mine.items():
        assert torch.equal(torch.as_tensor(value), torch.as_tensor(theirs[name]).to(torch.as_tensor(value).dtype)), name


class _Recurrence(torch.nn.Module):
    """A decoder layer's stand-in that mixes tokens by a running sum, apart only where it is given ``seq_idx``."""

    def __init__(self, share=0.1):
        super().__init__()
        self.share = share

    def forward(self, hidden_states, **kwargs):
        seq_idx = kwargs.get("seq_idx")
        if seq_idx is None:
            return hidden_states + hidden_states.cumsum(1) * self.share
        same = (seq_idx[:, :, None] == seq_idx[:, None, :]).tril().to(hidden_states.dtype)
        return hidden_states + same @ hidden_states * self.share


class _WeakRecurrence(_Recurrence):
    """The same without a way to keep examples apart, and so faint that only identical packs show it."""

    def forward(self, hidden_states, **kwargs):
        return super().forward(hidden_states)


@pytest.mark.parametrize(("dtype", "share"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
def test_a_leak_below_the_rounding_of_packed_against_alone_is_found(dtype, share):
    model = pico("llama")
    model.model.layers[0] = _WeakRecurrence(share)
    with pytest.raises(PackingError):
        require_packable(model.to(dtype))


def test_arguments_are_found_that_a_layer_takes():
    model = pico("llama")
    model.model.layers[0] = _Recurrence()
    packing = require_packable(model)
    assert packing == Packing(seq_idx=True)
    assert _largest_leak(model, packing) < 1e-4
    assert _largest_leak(model, Packing()) > 1e-3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("name", ["llama", "qwen3_moe"])
def test_an_adapted_model_in_low_precision_is_packable(name, dtype):
    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    torch.manual_seed(0)
    model = get_peft_model(pico(name).to(dtype), config)
    state = torch.get_rng_state()
    assert require_packable(model) == Packing()
    assert model.training
    assert torch.equal(state, torch.get_rng_state())


def test_low_precision_hides_no_leak():
    model = pico("mamba").to(torch.bfloat16)
    with pytest.raises(PackingError):
        require_packable(model)


def test_windows_shorter_than_an_example_take_part():
    model = pico("mistral")
    assert model.config.sliding_window < min(LENGTHS[0], LENGTHS[1])
    assert require_packable(model) == Packing()


def test_several_packs_in_a_batch_stay_apart_by_positions():
    """transformers masks packs by their positions in each row of a batch; flash attention needs them joined to one."""
    model = pico("qwen2")
    rows = torch.randint(0, 90, (4, 12), generator=torch.Generator().manual_seed(2))
    ids = rows.reshape(2, 24)
    positions = torch.arange(12).repeat(2, 2)
    with torch.no_grad():
        packed = model(input_ids=ids, position_ids=positions, use_cache=False).logits.reshape(4, 12, -1)
        alone = model(input_ids=rows, use_cache=False).logits
    torch.testing.assert_close(packed, alone, atol=1e-5, rtol=1e-4)


def test_a_packs_loss_is_its_examples_loss():
    """Also for an example of one token, which has nothing to predict; no example's first token is predicted."""
    model = pico("llama")
    draw = torch.Generator().manual_seed(3)
    rows = [
        TokenRow(number, array("i", torch.randint(0, 90, (length,), generator=draw).tolist()), b"\1" * length, "text")
        for number, length in enumerate(LENGTHS)
    ]
    pack = build_pack(rows)
    with torch.no_grad():
        logits = model(
            input_ids=torch.tensor([list(pack.ids)]),
            position_ids=torch.tensor([list(pack.position_ids)]),
            use_cache=False,
        ).logits[0]
        packed = torch.nn.functional.cross_entropy(
            logits[:-1], torch.tensor(list(pack.labels()))[1:], ignore_index=IGNORED, reduction="sum"
        )
        alone = sum(
            torch.nn.functional.cross_entropy(
                model(input_ids=torch.tensor([list(row.ids)]), use_cache=False).logits[0, :-1],
                torch.tensor(list(row.ids))[1:],
                reduction="sum",
            )
            for row in rows
            if len(row.ids) > 1
        )
    assert float(packed) == pytest.approx(float(alone), rel=1e-5)


def test_packing_is_checked_before_weights_are_loaded(tmp_path):
    AutoConfig.for_model("qwen3_5_text").save_pretrained(tmp_path)  # no weights in the folder
    spec = spec_for(tmp_path, tmp_path / "chats.jsonl", tmp_path / "run", training={"packing": True})
    small = json.loads((tmp_path / "config.json").read_text()) | {
        "num_hidden_layers": 4,
        "hidden_size": 256,
        "intermediate_size": 256,
        "vocab_size": 500,
    }
    small["layer_types"] = small["layer_types"][:4]
    (tmp_path / "config.json").write_text(json.dumps(small))
    with pytest.raises(PackingError):
        check.check_model(spec, tmp_path)
    check.check_model(replace(spec, training=replace(spec.training, packing=False)), tmp_path)


def test_a_config_that_cannot_be_made_small_is_left_to_the_loaded_model():
    assert check_packing(AutoConfig.for_model("mllama"), "cpu") is None
