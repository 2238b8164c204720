"""All weights, starts of the adapter, optimizers, and what is refused before weights are loaded."""

import json
from dataclasses import replace
from importlib.util import find_spec
from itertools import product

import pytest
import torch
from cuda_training import assert_agrees, mean_loss, spec_for, train
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from bp_data import PrepareRequest, prepare, split_rows
from bp_runs import Settings
from bp_runs.adapter import MODEL_SCHEMA, changed_files, read_manifest
from bp_runs.errors import (
    AdapterInvalidError,
    FullModelTooLargeError,
    InvalidSettingError,
    ModelLoadError,
    SequenceTooLongError,
    TargetModulesError,
    VocabularyError,
)
from bp_runs.events import AdapterSaved, EvalDone, ModelLoaded, StepDone
from bp_runs.fingerprint import fingerprint_base
from bp_runs.spec import LoraSpec, ModelSpec, TrainingSpec
from bp_runs.witness import read_witness
from bp_train_cuda import CudaRail
from bp_train_cuda.backend import Device, Mode, choose_dtype, choose_mode
from bp_train_cuda.check import require_start
from bp_train_cuda.engines.unsloth import require_unsloth
from bp_train_cuda.errors import Bf16Error, BitsandbytesError, Fp8Error, UnslothError
from bp_train_cuda.model.kernels import use_fp8
from bp_train_cuda.model.lora import add_lora
from bp_train_cuda.optim import choose_optimizer

CPU, GPU = Device("cpu", "none", 1), Device("cuda", "a card", 16 * 2**30)


def copy_model(source, target, **config):
    target.mkdir()
    for file in source.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    changed = json.loads((source / "config.json").read_text()) | config
    (target / "config.json").write_text(json.dumps(changed))
    return target


def test_all_weights_are_trained_and_saved_as_a_model(pico_model, chat_file, tmp_path):
    change = {"mode": "full", "steps": 6, "learning_rate": 3e-3, "eval_share": 0.25, "eval_min_rows": 1}
    outcome, events = train(spec_for(pico_model, chat_file, tmp_path / "run", training=change))
    assert outcome.final_loss < outcome.first_loss - 0.2
    assert outcome.adapter == tmp_path / "run" / "model"
    assert not (tmp_path / "run" / "lora").exists()
    loaded = next(e for e in events if isinstance(e, ModelLoaded))
    assert (loaded.trainable, loaded.mode) == (loaded.parameters, "full (as set)")
    before = load_file(pico_model / "model.safetensors")
    after = load_file(outcome.adapter / "model.safetensors")
    assert before.keys() == after.keys()  # the tied output layer is not saved beside the embedding
    assert all(not torch.equal(before[name], after[name]) for name in before)
    assert sum(e.bytes for e in events if isinstance(e, AdapterSaved)) > 4 * loaded.parameters
    manifest = read_manifest(outcome.adapter)
    assert (manifest["schema"], manifest["run_id"], manifest["base"]) == (
        MODEL_SCHEMA,
        "20260101-000000-abcdef",
        str(pico_model),
    )
    assert len(set(manifest["template"]["rendered"])) == 10
    assert manifest["base_fingerprint"] == fingerprint_base(pico_model) != fingerprint_base(outcome.adapter)
    assert changed_files(outcome.adapter) == []
    config, base_config = (json.loads((f / "config.json").read_text()) for f in (outcome.adapter, pico_model))
    assert config == base_config | {"dtype": "float32"}
    assert (outcome.adapter / "tokenizer.json").read_bytes() == (pico_model / "tokenizer.json").read_bytes()
    model = AutoModelForCausalLM.from_pretrained(outcome.adapter)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    seen = read_witness(outcome.adapter)
    assert (seen.base.mode, seen.prompts[0].base_logprobs, seen.weights_sha256) == ("full", None, None)
    assert_agrees(seen, model)


def test_the_trained_model_is_a_base_itself(pico_model, chat_file, tmp_path):
    first, _ = train(spec_for(pico_model, chat_file, tmp_path / "a", training={"mode": "full", "learning_rate": 3e-3}))
    second, _ = train(spec_for(first.adapter, chat_file, tmp_path / "b", training={"steps": 1}))
    assert second.first_loss < first.first_loss - 0.2


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_full_weights_keep_their_type(pico_model, chat_file, tmp_path, dtype):
    change = {"mode": "full", "steps": 2, "learning_rate": 1e-2}
    outcome, _ = train(spec_for(pico_model, chat_file, tmp_path / "run", training=change, model={"dtype": dtype}))
    weights = load_file(outcome.adapter / "model.safetensors")
    assert {str(t.dtype) for t in weights.values()} == {f"torch.{dtype}"}


@pytest.mark.parametrize("method", ["dpo", "orpo", "simpo", "kto"])
def test_methods_that_compare_train_all_weights(pico_model, tmp_path, method):
    answers = {"chosen": "captain marlow", "rejected": "a lazy dog"}
    rows = [{"prompt": f"who {i}", **answers} for i in range(6)]
    if method == "kto":
        rows = [{"prompt": f"who {i}", "completion": [*answers.values()][i % 2], "label": i % 2 == 0} for i in range(6)]
    file = tmp_path / "answers.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    change = {"mode": "full", "method": method, "steps": 4, "batch_size": 6, "learning_rate": 1e-3, "warmup_steps": 0}
    _, events = train(spec_for(pico_model, file, tmp_path / "run", training=change))
    steps = [e for e in events if isinstance(e, StepDone)]
    if method in ("dpo", "kto"):  # the untrained model is the reference
        assert steps[0].loss == pytest.approx({"dpo": 0.6931, "kto": 0.5}[method], rel=1e-3)
    assert steps[-1].loss < steps[0].loss
    assert steps[-1].metrics["margin"] > steps[0].metrics["margin"] + 0.01


FORMS = {"DoRA": {"use_dora": True}, "rsLoRA": {"use_rslora": True}, "PiSSA": {"init_lora_weights": "pissa"}}


# Of each form sft and dpo, whose reference is the model without the adapter; of the other methods one form each.
OFTEN = {*product(FORMS, ["sft", "dpo"]), ("PiSSA", "kto"), ("rsLoRA", "orpo"), ("DoRA", "simpo")}
EVERY_PAIR = [
    pytest.param(*pair, marks=() if pair in OFTEN else pytest.mark.slow)
    for pair in product(FORMS, ["sft", "dpo", "orpo", "simpo", "kto"])
]


@pytest.mark.parametrize(("form", "method"), EVERY_PAIR)
def test_each_form_of_the_adapter_learns_by_each_method(
    pico_model, chat_file, pair_file, judged_file, tmp_path, form, method
):
    """Plain LoRA and all weights: in test_cuda_methods.py, test_cuda_rail.py and below; 4 bits need a GPU."""
    file = {"sft": chat_file, "kto": judged_file}.get(method, pair_file)
    change = {"method": method, "steps": 5, "batch_size": 8, "warmup_steps": 0, "learning_rate": 3e-3}
    outcome, events = train(spec_for(pico_model, file, tmp_path / "run", training=change, lora=FORMS[form]))
    losses = [e.loss for e in events if isinstance(e, StepDone)]
    assert losses[-1] < losses[0] - 1e-3
    assert outcome.adapter.is_dir()


@pytest.mark.parametrize("rs", [False, True])
def test_pissa_comes_out_as_an_adapter_for_the_base_as_it_was(pico_model, chat_file, tmp_path, rs):
    lora = {"init_lora_weights": "pissa", "r": 4, "use_rslora": rs}
    change = {"eval_share": 0.25, "eval_min_rows": 1, "eval_steps": 100, "keep": "last"}
    outcome, events = train(spec_for(pico_model, chat_file, tmp_path / "run", lora=lora, training=change))
    assert outcome.final_loss < outcome.first_loss
    config = json.loads((outcome.adapter / "adapter_config.json").read_text())
    assert (config["r"], config["init_lora_weights"]) == (8, True)
    assert sorted(p.name for p in (tmp_path / "run").iterdir() if p.is_dir()) == ["lora"]
    # What the trained model said of the held-out rows is what the base on disk says with the adapter, put on or merged.
    measured = [e.loss for e in events if isinstance(e, EvalDone)][-1]
    _, heldout = split_rows(prepare(PrepareRequest(chat_file, pico_model, 128)).rows, 2, 42)
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(pico_model), outcome.adapter)
    assert mean_loss(model, heldout) == pytest.approx(measured, rel=1e-5)
    assert mean_loss(model.merge_and_unload(), heldout) == pytest.approx(measured, rel=1e-5)
    plain, _ = train(
        spec_for(pico_model, chat_file, tmp_path / "plain", lora={"r": 4}, training={**change, "steps": 1})
    )
    first = next(e.loss for e in events if isinstance(e, StepDone))
    assert first == pytest.approx(plain.first_loss, rel=1e-4)  # at its start it is the base


@pytest.mark.skipif(not torch.cuda.is_available(), reason="PEFT starts loftq on a CUDA device only")
def test_loftq_starts_nearer_to_the_whole_weights_than_4_bits_are(pico_model):
    quantization = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    whole = load_file(pico_model / "model.safetensors")["model.layers.0.mlp.down_proj.weight"]
    errors = {}
    for start in ("default", "loftq"):
        base = AutoModelForCausalLM.from_pretrained(pico_model, quantization_config=quantization, device_map="cuda")
        model = add_lora(base, LoraSpec(r=8, init_lora_weights=start), pico_model)
        layer = model.base_model.model.model.layers[0].mlp.down_proj
        eye = torch.eye(whole.shape[1], device="cuda")
        with torch.no_grad():
            errors[start] = (layer(eye).T.cpu() - whole).norm()
    assert errors["loftq"] < 0.9 * errors["default"]


@pytest.mark.parametrize(
    ("optim", "mode", "device", "expected"),
    [
        ("auto", "lora", GPU, "adamw_torch"),
        ("auto", "qlora", GPU, "adamw_8bit"),
        ("auto", "full", GPU, "paged_adamw_8bit"),
        ("auto", "full", CPU, "adamw_torch"),
        ("adamw_torch", "qlora", GPU, "adamw_torch"),
        ("adamw_8bit", "lora", CPU, "adamw_8bit"),
    ],
)
def test_the_optimizer_follows_the_mode(optim, mode, device, expected):
    assert choose_optimizer(TrainingSpec(optim=optim), Mode(mode, ""), device) == expected


def test_an_8_bit_optimizer_trains(pico_model, chat_file, tmp_path):
    outcome, _ = train(spec_for(pico_model, chat_file, tmp_path / "run", training={"optim": "adamw_8bit"}))
    assert outcome.final_loss < outcome.first_loss


def test_four_billion_is_the_most_that_full_takes():
    assert choose_mode("full", 4_000_000_000, GPU).name == "full"
    with pytest.raises(FullModelTooLargeError, match=r"7\.6 billion") as caught:
        choose_mode("full", 7_600_000_000, GPU)
    assert 'training.mode="lora"' in caught.value.fix
    assert "SmolLM3-3B" in caught.value.fix


def refused(base, **changes):
    groups = {"model": ModelSpec, "lora": LoraSpec, "training": TrainingSpec}
    CudaRail().check(Settings(**{g: groups[g](**c) for g, c in changes.items()}), base)


def test_refused_before_weights_are_loaded(pico_model, tmp_path, monkeypatch):
    base = copy_model(pico_model, tmp_path / "weightless")
    (base / "model.safetensors").unlink()
    refused(base)  # nothing needs the weights so far
    with pytest.raises(TargetModulesError, match="'k_prog'") as caught:
        refused(base, lora={"target_modules": "q_proj,k_prog"})
    assert "k_proj" in caught.value.cause
    for name in ("lm_head", "embed_tokens", "q_proj,lm_head", ""):
        with pytest.raises(TargetModulesError):
            refused(base, lora={"target_modules": name})
    with pytest.raises(Fp8Error, match="cpu"):
        refused(base, training={"fp8": True})
    with pytest.raises(InvalidSettingError, match="loftq"):
        refused(base, lora={"init_lora_weights": "loftq"})
    with pytest.raises(InvalidSettingError, match="DoRA"):
        refused(base, lora={"init_lora_weights": "pissa", "use_dora": True})
    with pytest.raises(InvalidSettingError, match="pissa"):
        require_start(LoraSpec(init_lora_weights="pissa"), Mode("qlora", ""))
    monkeypatch.setattr("bp_train_cuda.check.find_spec", lambda name: None)
    with pytest.raises(BitsandbytesError, match="paged_adamw_8bit"):
        refused(base, training={"optim": "paged_adamw_8bit"})


@pytest.mark.parametrize(
    ("group", "name", "value"),
    [
        ("lora", "r", 0),
        ("lora", "alpha", 0.0),
        ("lora", "alpha", float("nan")),
        ("training", "batch_size", 0),
        ("training", "gradient_accumulation", 0),
        ("training", "steps", 0),
    ],
)
def test_numbers_that_train_nothing(pico_model, group, name, value):
    with pytest.raises(InvalidSettingError, match=rf"{group}\.{name} is {value}"):
        refused(pico_model, **{group: {name: value}})


def test_an_adapter_of_another_base_is_refused_before_weights_are_loaded(pico_model, chat_file, tmp_path):
    adapter = train(spec_for(pico_model, chat_file, tmp_path / "run", training={"steps": 1}))[0].adapter
    CudaRail().evaluate(spec_for(pico_model, chat_file, tmp_path / "own"), adapter, lambda _: None)
    other = copy_model(pico_model, tmp_path / "other")
    weights = load_file(other / "model.safetensors")
    weights["model.norm.weight"] += 1
    save_file(weights, other / "model.safetensors", metadata={"format": "pt"})
    narrow = copy_model(pico_model, tmp_path / "narrow", intermediate_size=96)
    short = copy_model(pico_model, tmp_path / "short", num_hidden_layers=1)
    for base in (narrow, short):
        (base / "model.safetensors").unlink()  # nothing needs the weights so far
    expected = {other: "norms differ", narrow: "does not fit", short: "does not fit"}
    for base, message in expected.items():
        for use in ("evaluate", "train"):
            spec = spec_for(base, chat_file, tmp_path / f"{base.name}-{use}")
            with pytest.raises(AdapterInvalidError, match=message) as caught:
                if use == "evaluate":
                    CudaRail().evaluate(spec, adapter, lambda _: None)
                else:
                    train(replace(spec, initial_adapter=adapter))
            assert caught.value.cause
    assert "no layer model.layers.1." in str(caught.value.cause)


def test_unsloth_is_refused_where_it_cannot_be(pico_model, monkeypatch):
    if find_spec("unsloth") is None:
        with pytest.raises(UnslothError, match="not installed"):
            refused(pico_model, training={"engine": "unsloth"})
    monkeypatch.setattr("bp_train_cuda.engines.unsloth.find_spec", lambda name: object())
    with pytest.raises(UnslothError, match="CUDA device"):
        refused(pico_model, training={"engine": "unsloth"})
    for change in ({"method": "dpo"}, {"mode": "full"}, {"fp8": True}):
        with pytest.raises(InvalidSettingError, match=next(iter(change))):
            require_unsloth(Settings(training=TrainingSpec(**change)), GPU)
    require_unsloth(Settings(), GPU)


def test_deterministic_holds_for_the_run_and_no_longer(pico_model, chat_file, tmp_path):
    for wanted in (True, False):
        seen = []
        spec = spec_for(pico_model, chat_file, tmp_path / str(wanted), training={"deterministic": wanted, "steps": 1})
        CudaRail().train(spec, lambda _: seen.append(torch.are_deterministic_algorithms_enabled()), lambda: False)
        assert seen[-1] is wanted
        assert not torch.are_deterministic_algorithms_enabled()


def test_float8_layers_are_all_but_the_output(pico_model):
    pytest.importorskip("torchao")
    model = AutoModelForCausalLM.from_pretrained(pico_model)
    ids = torch.arange(3, 35)[None]
    before = model(ids).logits
    assert use_fp8(model, emulate=True) == 14
    sides = [m.config.pad_inner_dim for m in model.modules() if type(m).__name__ == "Float8Linear"]
    assert sides == [True] * 14  # else a card refuses batches whose tokens 16 does not divide
    adapted = add_lora(model, LoraSpec(r=4))
    loss = adapted(ids, labels=ids).loss
    loss.backward()
    assert all(p.grad is not None for p in adapted.parameters() if p.requires_grad)
    change = (adapted(ids).logits - before).abs().max()
    assert 0 < change < 0.2


def test_bfloat16_is_refused_on_a_card_that_emulates_it(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_bf16_supported", lambda including_emulation=True: including_emulation)
    with pytest.raises(Bf16Error):
        choose_dtype("bfloat16", GPU)
    assert choose_dtype("auto", GPU) == torch.float32
    assert choose_dtype("bfloat16", CPU) == torch.bfloat16


def test_rows_that_the_model_cannot_hold(pico_model, chat_file, tmp_path):
    base = copy_model(pico_model, tmp_path / "short", max_position_embeddings=16)
    with pytest.raises(SequenceTooLongError, match="16") as caught:
        train(spec_for(base, chat_file, tmp_path / "a"))
    assert "model.max_seq_length=16" in caught.value.fix
    base = copy_model(pico_model, tmp_path / "small", vocab_size=300)
    with pytest.raises(VocabularyError, match="300"):
        train(spec_for(base, chat_file, tmp_path / "b"))


def test_weights_that_lack_a_tensor_are_refused(pico_model, chat_file, tmp_path):
    base = copy_model(pico_model, tmp_path / "hole")
    weights = load_file(base / "model.safetensors")
    weights.pop("model.layers.1.mlp.up_proj.weight")
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelLoadError, match="lack") as caught:
        train(spec_for(base, chat_file, tmp_path / "run"))
    assert "up_proj" in caught.value.cause


FAMILIES = {
    "mistral": ("MistralConfig", {"sliding_window": None}),
    "qwen2": ("Qwen2Config", {}),
    "qwen3_5": ("Qwen3_5TextConfig", {"head_dim": 16, "linear_num_value_heads": 4, "linear_num_key_heads": 2}),
    "phi3": ("Phi3Config", {}),
    "smollm3": ("SmolLM3Config", {}),
}


@pytest.mark.parametrize(
    ("family", "mode"),
    [
        pytest.param(
            family, mode, marks=pytest.mark.slow if mode == "full" and family not in ("mistral", "qwen3_5") else ()
        )
        for family, mode in product(FAMILIES, ["lora", "full"])
    ],
)
def test_each_family_trains(pico_model, chat_file, tmp_path, family, mode):
    import transformers

    name, special = FAMILIES[family]
    kind = getattr(transformers, name)
    config = kind(
        vocab_size=320, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=512, bos_token_id=1, eos_token_id=2, pad_token_id=2, **special,
    )  # fmt: skip
    base = copy_model(pico_model, tmp_path / family)
    (base / "config.json").unlink()
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(base)
    outcome, _ = train(spec_for(base, chat_file, tmp_path / "run", training={"mode": mode, "steps": 5}))
    assert outcome.final_loss < outcome.first_loss - 0.1
