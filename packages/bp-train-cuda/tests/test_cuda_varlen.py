"""Rows of many lengths laid end to end: what they give alone, without padding."""

import json

import pytest
import torch
from cuda_training import spec_for, train
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

from bp_runs.events import StepDone
from bp_train_cuda.engines import native
from bp_train_cuda.model.varlen import NAME, flat_pass, stop_varlen, use_varlen

SIZES = {
    "vocab_size": 96, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
LENGTHS = (30, 7, 1, 19)


def build(kind, **changes):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **SIZES, **changes)).eval()


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("llama", {}),
        ("qwen2", {}),
        (
            "qwen2",
            {"use_sliding_window": True, "sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]},
        ),
        ("mistral", {"sliding_window": 8}),
        ("qwen3", {"head_dim": 16}),
        ("granite", {}),
    ],
    ids=str,
)
def test_flat_rows_give_what_they_give_alone(kind, changes):
    model = build(kind, **changes)
    rows = [torch.randint(0, 96, (length,)) for length in LENGTHS]
    alone = [model(input_ids=row[None], use_cache=False).logits[0] for row in rows]
    packing = use_varlen(model)
    positions = torch.cat([torch.arange(length) for length in LENGTHS])[None]
    with flat_pass():
        flat = model(
            input_ids=torch.cat(rows)[None], position_ids=positions, use_cache=False, **packing.arguments(positions)
        ).logits[0]
    torch.testing.assert_close(flat, torch.cat(alone), rtol=1e-4, atol=1e-5)
    again = [model(input_ids=row[None], use_cache=False).logits[0] for row in rows]
    assert all(torch.equal(one, other) for one, other in zip(again, alone, strict=True))
    stop_varlen(model)
    assert model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("gemma2", {"head_dim": 8}),
        ("qwen3_5_text", {"layer_types": ["linear_attention", "full_attention"], "head_dim": 8}),
    ],
    ids=str,
)
def test_models_that_would_mix_rows_stay_as_they_are(kind, changes):
    model = build(kind, **changes)
    before = model.config._attn_implementation
    assert use_varlen(model) is None
    assert model.config._attn_implementation == before != NAME


@pytest.fixture
def ragged_file(tmp_path):
    file = tmp_path / "ragged.jsonl"
    turns = [
        [{"role": "user", "content": "who are you"}, {"role": "assistant", "content": " ".join(["I am a pirate"] * n)}]
        for n in range(1, 13)
    ]
    file.write_text("\n".join(json.dumps({"messages": one}) for one in turns))
    return file


@pytest.mark.parametrize("packing", [False, True])
def test_a_run_learns_the_same_and_reads_no_padding(ragged_file, pico_model, tmp_path, monkeypatch, packing):
    change = {"steps": 5, "batch_size": 4, "learning_rate": 3e-3, "packing": packing}
    widths, found = {}, {}
    plain = native.LogProbModel.forward
    for name in ("flat", "padded"):
        seen = widths.setdefault(name, [])

        def forward(model, batch, seen=seen):
            seen.append(tuple(batch["input_ids"].shape))
            return plain(model, batch)

        monkeypatch.setattr(native.LogProbModel, "forward", forward)
        if name == "padded":
            monkeypatch.setattr(native, "use_varlen", lambda _: None)
        outcome, events = train(spec_for(pico_model, ragged_file, tmp_path / name, training=change))
        found[name] = (
            [e.loss for e in events if isinstance(e, StepDone)],
            load_file(outcome.adapter / "adapter_model.safetensors"),
        )
    assert any(rows == 1 for rows, _ in widths["flat"])
    if not packing:
        assert sum(a * b for a, b in widths["flat"]) < 0.97 * sum(a * b for a, b in widths["padded"])
    assert found["flat"][0] == pytest.approx(found["padded"][0], rel=1e-5)
    for name, tensor in found["padded"][1].items():
        torch.testing.assert_close(found["flat"][1][name], tensor, rtol=1e-3, atol=1e-5)
