"""The engine trl against the same training in plain PyTorch, and its records, checkpoints and errors."""

import json
import shutil
import sys
from dataclasses import replace

import pytest
import torch
from cuda_training import assert_agrees, mean_loss, spec_for, train
from peft import PeftModel
from plain_training import train_plain
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaModel, MixtralConfig, MixtralForCausalLM

from bp_data.loop.plan import hold_out
from bp_data.loop.rows import prepare_rows
from bp_runs.checkpoint_store import CheckpointFolder
from bp_runs.errors import CheckpointInvalidError, GpuOutOfMemoryError, InvalidSettingError, TrainingDivergedError
from bp_runs.events import CheckpointSaved, EvalDone, SampleAnswer, StepDone
from bp_runs.witness import read_witness
from bp_train_cuda.engines import trl, trl_methods
from bp_train_cuda.engines.trl_methods import require_trl
from bp_train_cuda.errors import VersionUntestedError

METHODS = ("sft", "dpo", "orpo", "simpo", "kto")


@pytest.fixture
def files(tmp_path, chat_file):
    """Answers of equal length, so that a mean of micro-batches' means is the step's mean."""
    pairs = [{"prompt": str(i), "chosen": f"captain marlow {i % 4}", "rejected": "a lazy dog"} for i in range(8)]
    judged = [
        {"prompt": f"who are you {i}", "completion": f"captain {i}" if i % 3 else "a lazy dog", "label": bool(i % 3)}
        for i in range(8)
    ]
    found = {"sft": chat_file}
    for name, rows in {"pairs": pairs, "judged": judged}.items():
        found[name] = tmp_path / f"{name}.jsonl"
        found[name].write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {"sft": chat_file, "kto": found["judged"], **dict.fromkeys(("dpo", "orpo", "simpo"), found["pairs"])}


@pytest.fixture
def bare_model(pico_model, tmp_path):
    """A template of nothing but the words: a one-token prompt, which TRL's ORPO then has no likelihood of to add."""
    folder = shutil.copytree(pico_model, tmp_path / "bare")
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config["chat_template"] = (
        "{% for m in messages %}{{ m['content'] }}{% if m['role'] == 'assistant' %}<|im_end|>{% endif %}{% endfor %}"
    )
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def spec(files, base, run, method, **training):
    size = {"batch_size": 2, "gradient_accumulation": 2}
    if method == "kto":  # native takes the reference point from the step, TRL from the micro-batch
        size = {"batch_size": 4, "gradient_accumulation": 1}
    change = {
        "method": method, "steps": 6, **size, "warmup_steps": 2,
        "engine": "trl", "learning_rate": 3e-3, "eval_share": 0.0, "weight_decay": 0.01, **training,
    }  # fmt: skip
    return spec_for(base, files[method], run, training=change)


def steps(events):
    return [e for e in events if isinstance(e, StepDone)]


def weights(outcome):
    return load_file(outcome.adapter / "adapter_model.safetensors")


@pytest.mark.parametrize("method", METHODS)
def test_native_and_trl_have_the_loss_curve_of_plain_pytorch(files, pico_model, bare_model, tmp_path, method):
    """The promise of the engines: native is compared with what TRL's users know, and both with the papers."""
    wanted = spec(files, bare_model if method == "orpo" else pico_model, tmp_path / "trl", method, steps=4)
    losses, norms, adapter = train_plain(wanted, prepare_rows(wanted).rows)
    found = {"trl": train(wanted)}
    native = spec(files, wanted.base, tmp_path / "native", method, engine="native", steps=4)
    found["native"] = train(native)
    for outcome, events in found.values():
        assert [e.loss for e in steps(events)] == pytest.approx(losses, abs=1e-5)
        assert [e.grad_norm for e in steps(events)] == pytest.approx(norms, rel=1e-3)
        assert weights(outcome).keys() == adapter.keys()
        for name, weight in weights(outcome).items():
            torch.testing.assert_close(weight, adapter[name], rtol=0, atol=2e-5)
    one, other = (steps(events) for _, events in found.values())
    assert [e.loss for e in one] == pytest.approx([e.loss for e in other], abs=1e-5)
    assert [e.learning_rate for e in one] == [e.learning_rate for e in other]
    assert [e.tokens for e in one] == [e.tokens for e in other]


@pytest.fixture
def expert_model(pico_model, tmp_path):
    """A mixture of four experts whose config asks for the routers' own loss."""
    folder = shutil.copytree(
        pico_model, tmp_path / "experts", ignore=shutil.ignore_patterns("*.safetensors", "config.json")
    )
    torch.manual_seed(0)
    vocabulary = json.loads((pico_model / "config.json").read_text())["vocab_size"]
    config = MixtralConfig(
        vocab_size=vocabulary, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=256, num_local_experts=4, router_aux_loss_coef=0.5,
        output_router_logits=True,
    )  # fmt: skip
    MixtralForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("method", ["sft", "orpo"])
def test_routers_get_no_loss_of_their_own(files, expert_model, tmp_path, method):
    found = {}
    for engine in ("native", "trl"):
        _, events = train(spec(files, expert_model, tmp_path / engine, method, engine=engine, steps=2))
        found[engine] = [e.loss for e in steps(events)]
    if method == "sft":
        assert found["trl"] == pytest.approx(found["native"], abs=1e-5)
    else:  # the likelihood of the prompt is TRL's own; a router's loss would be above 0.5
        assert found["trl"] == pytest.approx(found["native"], abs=0.3)


@pytest.mark.parametrize(
    "method", ["sft", pytest.param("dpo", marks=pytest.mark.slow), pytest.param("kto", marks=pytest.mark.slow)]
)
def test_a_resumed_run_ends_in_the_same_bytes(files, pico_model, tmp_path, method):
    """Stopped after the second step; DPO and KTO bring a second adapter, the reference, into the checkpoint."""
    whole, _ = train(spec(files, pico_model, tmp_path / "whole", method, steps=4))
    stopped = spec(files, pico_model, tmp_path / "run", method, steps=4)
    asked = iter([False, True])
    outcome, events = train(stopped, stop=lambda: next(asked))
    assert (outcome.stopped, outcome.steps) == (True, 2)
    (saved,) = CheckpointFolder(stopped.folders.run).read()
    assert (saved.reason, saved.step, saved.facts) == ("stop", 2, {"engine": "trl"})
    resumed, later = train(replace(stopped, checkpoint=saved.path))
    assert [e.step for e in steps(events) + steps(later)] == [1, 2, 3, 4]
    assert (resumed.steps, resumed.tokens, resumed.first_loss) == (4, whole.tokens, whole.first_loss)
    assert weights(resumed).keys() == weights(whole).keys()
    for name, weight in weights(whole).items():
        assert torch.equal(weights(resumed)[name], weight)
    assert not (stopped.folders.run / trl.SCRATCH).exists()


def test_checkpoints_come_as_often_as_asked(files, pico_model, tmp_path):
    wanted = spec(files, pico_model, tmp_path / "run", "sft", steps=5, save_steps=2, keep_checkpoints=9)
    _, events = train(wanted)
    assert [e.step for e in events if isinstance(e, CheckpointSaved)] == [2, 4]
    assert all(saved.damage() is None for saved in CheckpointFolder(wanted.folders.run).read())


def test_the_best_adapter_is_kept_and_training_stops_early(files, pico_model, tmp_path):
    training = {"eval_share": 0.25, "eval_min_rows": 1, "eval_steps": 1, "early_stop": 1, "learning_rate": 0.03}
    wanted = spec(files, pico_model, tmp_path / "run", "sft", steps=20, warmup_steps=0, **training)
    outcome, events = train(wanted)
    found = [e for e in events if isinstance(e, EvalDone)]
    assert outcome.steps < 20, "the learning rate is far too high"
    best = min(found, key=lambda e: e.loss)
    assert (outcome.best_step, outcome.eval_loss) == (best.step, best.loss)
    assert found[-1].step == best.step + 1
    rows = hold_out(prepare_rows(wanted).rows, wanted.training)[1]
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(pico_model), outcome.adapter).eval()
    assert mean_loss(model, rows) == pytest.approx(best.loss, rel=1e-4)
    assert_agrees(read_witness(outcome.adapter), model)
    assert best.tokens == sum(row.trained for row in rows)


def test_packed_rows_learn_as_rows_do(files, pico_model, tmp_path):
    """All rows fit into one pack: a step over it is a step over all rows."""
    rows, _ = train(spec(files, pico_model, tmp_path / "rows", "sft", batch_size=8, gradient_accumulation=1))
    changes = {"packing": True, "batch_size": 1, "gradient_accumulation": 1}
    wanted = spec(files, pico_model, tmp_path / "packs", "sft", **changes)
    packs, _ = train(replace(wanted, model=replace(wanted.model, max_seq_length=512)))
    assert packs.tokens == rows.tokens
    for name, weight in weights(rows).items():
        torch.testing.assert_close(weights(packs)[name], weight, rtol=0, atol=2e-4)


def test_all_weights_are_trained_too(files, pico_model, tmp_path):
    """DPO without an adapter loads the base a second time, as its reference."""
    wanted = spec(files, pico_model, tmp_path / "run", "dpo", mode="full", learning_rate=1e-3)
    outcome, events = train(wanted)
    assert steps(events)[0].loss == pytest.approx(0.6931, abs=1e-3)
    assert steps(events)[-1].loss < 0.6
    assert AutoModelForCausalLM.from_pretrained(outcome.adapter).dtype == torch.float32


def test_sample_prompts_are_answered_before_and_after(files, pico_model, tmp_path):
    training = {"sample_prompts": ("who are you",), "sample_tokens": 4, "steps": 2}
    _, events = train(spec(files, pico_model, tmp_path / "run", "sft", **training))
    assert [e.step for e in events if isinstance(e, SampleAnswer)] == [0, 2]


def test_a_lack_of_memory_names_the_engine_that_can(files, pico_model, tmp_path, monkeypatch):
    def scarce(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr(LlamaModel, "forward", scarce)
    with pytest.raises(GpuOutOfMemoryError) as error:
        train(spec(files, pico_model, tmp_path / "run", "sft"))
    assert 'training.engine="native"' in error.value.fix


def test_a_loss_that_is_not_finite_ends_the_run(files, pico_model, tmp_path):
    with pytest.raises(TrainingDivergedError):
        train(spec(files, pico_model, tmp_path / "run", "sft", learning_rate=1e30, max_grad_norm=0.0))


def test_another_engines_checkpoint_is_rejected(files, pico_model, tmp_path):
    (tmp_path / "other").mkdir()
    wanted = spec(files, pico_model, tmp_path / "run", "sft")
    with pytest.raises(CheckpointInvalidError, match="engine trl"):
        train(replace(wanted, checkpoint=tmp_path / "other"))


def test_what_trl_cannot_do_is_rejected_before_a_model_is_loaded(files, pico_model, tmp_path, monkeypatch):
    def check(method, **training):
        require_trl(spec(files, pico_model, tmp_path / "run", method, **training))

    for method in METHODS:
        check(method)
    with pytest.raises(InvalidSettingError, match="batch_size is 1"):
        check("kto", batch_size=1)
    with pytest.raises(InvalidSettingError, match="preflight"):
        check("sft", preflight="on")
    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "device_count", lambda: 2)
        with pytest.raises(InvalidSettingError, match="sees 2"):
            check("sft")
    with monkeypatch.context() as patch:
        patch.setattr(trl_methods, "version", {"transformers": "5.18.2", "trl": "1.16.0"}.get)
        with pytest.raises(VersionUntestedError, match=r"needs transformers 5.19, and 5.18.2") as error:
            check("sft")
        assert "pip install 'transformers>=5.19'" in error.value.fix
    monkeypatch.setitem(sys.modules, "trl.experimental.orpo", None)
    with pytest.raises(VersionUntestedError, match="no ORPOTrainer") as error:
        check("orpo")
    assert "pip install" in error.value.fix
