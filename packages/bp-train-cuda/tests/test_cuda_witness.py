"""The witness that a run leaves next to its adapter: the model in memory, at places of held-out rows."""

import json

import pytest
import torch
from cuda_training import assert_agrees, spec_for, train
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from bp_data import PrepareRequest, prepare
from bp_data.loop.plan import hold_out
from bp_runs.adapter import changed_files
from bp_runs.events import Notice
from bp_runs.witness import TOP_TOKENS, WITNESS_FILE, read_witness
from bp_train_cuda import CudaRail, witness
from bp_train_cuda.backend import Mode

HOLD_OUT = {"eval_share": 0.25, "eval_min_rows": 1}


def test_an_adapter_gets_what_the_model_in_memory_says(pico_model, chat_file, tmp_path):
    spec = spec_for(pico_model, chat_file, tmp_path / "run", training=HOLD_OUT)
    outcome, _ = train(spec)
    seen = read_witness(outcome.adapter)
    facts = (seen.run_id, seen.base.mode, seen.base.dtype, seen.base.packed)
    assert facts == ("20260101-000000-abcdef", "lora", "float32", ())
    assert all(len(row) == TOP_TOKENS for prompt in seen.prompts for row in prompt.tokens)
    base = AutoModelForCausalLM.from_pretrained(pico_model)
    trained = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(pico_model), outcome.adapter)
    assert_agrees(seen, trained, base=base)
    assert seen.prompts[0].logprobs != seen.prompts[0].base_logprobs
    assert changed_files(outcome.adapter) == []
    assert (outcome.adapter / WITNESS_FILE).stat().st_size < 300_000
    # Rows held out come first; each place is before a trained token, the last before the one that ends the answer.
    train_rows, held = hold_out(prepare(PrepareRequest(chat_file, pico_model, 128)).rows, spec.training)
    masks = {tuple(row.ids): row.mask for row in [*train_rows, *held]}
    kinds = [prompt.kind for prompt in seen.prompts]
    assert kinds == ["validation"] * len(held) + ["training"] * (len(kinds) - len(held))
    assert {prompt.ids for prompt in seen.prompts[: len(held)]} == {tuple(row.ids) for row in held}
    assert all(masks[prompt.ids][place + 1] for prompt in seen.prompts[1:] for place in prompt.places)
    assert all(masks[prompt.ids].rfind(1) - 1 in prompt.places for prompt in seen.prompts)
    assert 7 in seen.prompts[0].places
    assert 32 <= seen.place_count <= 72


def test_an_adapter_made_of_others_is_measured_afterwards(pico_model, chat_file, tmp_path):
    spec = spec_for(pico_model, chat_file, tmp_path / "run", training={"steps": 2})
    outcome, _ = train(spec)
    (outcome.adapter / WITNESS_FILE).unlink()
    CudaRail().write_witness(spec, outcome.adapter, print)
    trained = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(pico_model), outcome.adapter)
    assert_agrees(read_witness(outcome.adapter), trained)
    assert changed_files(outcome.adapter) == []


def test_a_model_with_a_window_is_measured_past_it(pico_model, pair_file, tmp_path):
    """With a method that compares answers, and without validation."""
    base = tmp_path / "base"
    base.mkdir()
    for file in pico_model.iterdir():
        (base / file.name).write_bytes(file.read_bytes())
    config = json.loads((base / "config.json").read_text())
    mistral = {"architectures": ["MistralForCausalLM"], "model_type": "mistral", "sliding_window": 16}
    (base / "config.json").write_text(json.dumps({**config, **mistral}))
    training = {"method": "dpo", "steps": 2, "eval_share": 0.0}
    outcome, _ = train(spec_for(base, pair_file, tmp_path / "run", training=training))
    seen = read_witness(outcome.adapter)
    assert {prompt.kind for prompt in seen.prompts[:-1]} == {"training"}
    last = seen.prompts[-1]
    assert (last.kind, len(last.ids), last.places[-1]) == ("long", 48, 47)
    assert_agrees(seen, PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), outcome.adapter))


def test_measuring_leaves_the_model_as_it_was(pico_model, chat_file, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(pico_model).train()
    spec = spec_for(pico_model, chat_file, tmp_path / "run")
    rows = prepare(PrepareRequest(chat_file, pico_model, 128)).rows
    torch.manual_seed(3)
    state = torch.get_rng_state()
    seen = witness.measure_witness(
        spec,
        rows,
        rows,
        model,
        device=witness.Device("cpu", "none", 1),
        mode=Mode("full", ""),
        parameters=1,
        autocast=None,
    )
    assert seen.place_count <= 72
    assert model.training
    assert torch.equal(torch.get_rng_state(), state)
    assert all(weight.grad is None for weight in model.parameters())


def test_too_little_memory_costs_the_witness_and_not_the_run(pico_model, chat_file, tmp_path, monkeypatch):
    def full(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(witness, "build_witness", full)
    spec = spec_for(pico_model, chat_file, tmp_path / "run", training={"steps": 1, "eval_share": 0.0})
    outcome, events = train(spec)
    assert read_witness(outcome.adapter) is None
    assert "exports have no witness: too little GPU memory" in [e.message for e in events if isinstance(e, Notice)]


def test_what_was_packed_is_listed_by_its_name_in_the_base(pico_model, chat_file, tmp_path):
    """As nf4 on a CPU, which trains nothing here but loads; the export packs the same weights again."""
    pytest.importorskip("bitsandbytes")
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    loaded = AutoModelForCausalLM.from_pretrained(pico_model, quantization_config=config, device_map={"": "cpu"})
    model = get_peft_model(loaded, LoraConfig(r=2, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM"))
    rows = prepare(PrepareRequest(chat_file, pico_model, 128)).rows
    spec = spec_for(pico_model, chat_file, tmp_path / "run")
    cpu = witness.Device("cpu", "none", 1)
    facts = {"device": cpu, "mode": Mode("qlora", ""), "parameters": 1, "autocast": None}
    seen = witness.measure_witness(spec, rows, rows, model, **facts)
    linears = {name for name in load_file(pico_model / "model.safetensors") if name.endswith("_proj.weight")}
    assert set(seen.base.packed) == linears
    assert (seen.base.mode, seen.base.double_quantized) == ("qlora", True)
