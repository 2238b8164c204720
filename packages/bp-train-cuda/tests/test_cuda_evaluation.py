"""Validation on held-out rows: the number is right, the best adapter is kept, training ends when it stops helping."""

import json

import pytest
import torch
from cuda_training import mean_loss, spec_for, train
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaModel

from bp_data import PrepareRequest, prepare, split_rows
from bp_data.loop.memory import MemoryGuard
from bp_data.loop.validation import Validator
from bp_runs.errors import TrainingDivergedError
from bp_runs.events import DataReady, EvalDone, StepDone
from bp_runs.spec import TrainingSpec
from bp_train_cuda import CudaRail
from bp_train_cuda.backend import TorchMemory
from bp_train_cuda.distributed.process_group import ProcessGroup

EVAL = {"eval_share": 0.25, "eval_min_rows": 2, "eval_steps": 2, "batch_size": 2}


def evals(events):
    return [e for e in events if isinstance(e, EvalDone)]


@pytest.mark.parametrize("packing", [False, True])
def test_the_validation_loss_is_that_of_the_saved_adapter_on_rows_it_never_saw(
    pico_model, chat_file, tmp_path, packing
):
    spec = spec_for(pico_model, chat_file, tmp_path / "run", training={**EVAL, "steps": 4, "packing": packing})
    outcome, events = train(spec)
    assert [e.step for e in evals(events)] == [2, 4]
    assert next(e for e in events if isinstance(e, DataReady)).heldout == 2
    _, heldout = split_rows(prepare(PrepareRequest(chat_file, pico_model, 128)).rows, 2, spec.training.seed)
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(pico_model), outcome.adapter)
    assert outcome.eval_loss == pytest.approx(mean_loss(model, heldout), rel=1e-4)
    assert evals(events)[-1].tokens == sum(row.trained for row in heldout)


def contrary(chat_file):
    """Rows of which the held-out ones ask for other answers: the better it learns, the worse it validates."""
    rows = [
        {
            "messages": [
                {"role": "user", "content": "who are you"},
                {"role": "assistant", "content": f"captain marlow {i}"},
            ]
        }
        for i in range(8)
    ]
    _, held = split_rows(list(range(8)), 2, 42)
    for place in held:
        rows[place]["messages"][1]["content"] = "7 7 7 7 7 7"
    chat_file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_it_stops_early_and_keeps_the_best(pico_model, chat_file, tmp_path):
    contrary(chat_file)
    change = {**EVAL, "steps": 40, "eval_steps": 1, "early_stop": 2, "learning_rate": 5e-2}
    outcome, events = train(spec_for(pico_model, chat_file, tmp_path / "run", training=change))
    losses = [e.loss for e in evals(events)]
    assert outcome.steps < 40
    assert not outcome.stopped
    assert outcome.best_step == 1 + losses.index(min(losses)) == outcome.steps - 2
    _, heldout = split_rows(prepare(PrepareRequest(chat_file, pico_model, 128)).rows, 2, 42)
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(pico_model), outcome.adapter)
    assert mean_loss(model, heldout) == pytest.approx(min(losses), rel=1e-4)


def test_the_last_is_kept_and_nothing_stops_where_the_user_says_so(pico_model, chat_file, tmp_path):
    contrary(chat_file)
    change = {**EVAL, "steps": 6, "eval_steps": 1, "early_stop": 0, "keep": "last", "learning_rate": 5e-2}
    outcome, events = train(spec_for(pico_model, chat_file, tmp_path / "run", training=change))
    assert outcome.steps == 6
    _, heldout = split_rows(prepare(PrepareRequest(chat_file, pico_model, 128)).rows, 2, 42)
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(pico_model), outcome.adapter)
    assert mean_loss(model, heldout) == pytest.approx(evals(events)[-1].loss, rel=1e-4)


def test_a_run_that_diverges_keeps_its_best_adapter(pico_model, chat_file, tmp_path, monkeypatch):
    forward, calls = LlamaModel.forward, []

    def spoiled(model, *args, **kwargs):
        out = forward(model, *args, **kwargs)
        calls.append(torch.is_grad_enabled())
        if sum(calls) > 4 and calls[-1]:  # the fifth step
            out.last_hidden_state = out.last_hidden_state * float("nan")
        return out

    change = {**EVAL, "steps": 12, "eval_steps": 2, "batch_size": 6, "early_stop": 0}
    spec = spec_for(pico_model, chat_file, tmp_path / "run", training=change)
    events = []
    with monkeypatch.context() as patch, pytest.raises(TrainingDivergedError) as caught:
        patch.setattr(LlamaModel, "forward", spoiled)
        CudaRail().train(spec, events.append, lambda: False)
    best = min(evals(events), key=lambda e: e.loss)
    assert caught.value.details["best_step"] == best.step == 4
    assert f'train (training.start_from="{spec.folders.run_id}@best", training.learning_rate=' in caught.value.fix
    assert caught.value.details["adapter"] == str(spec.folders.adapter)
    _, heldout = split_rows(prepare(PrepareRequest(chat_file, pico_model, 128)).rows, 2, spec.training.seed)
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(pico_model), spec.folders.adapter)
    assert mean_loss(model, heldout) == pytest.approx(best.loss, rel=1e-4)


def test_validation_changes_nothing_of_the_training(pico_model, chat_file, tmp_path):
    def weights(name, eval_steps):
        change = {**EVAL, "steps": 4, "eval_steps": eval_steps, "keep": "last"}
        outcome, _ = train(spec_for(pico_model, chat_file, tmp_path / name, training=change, lora={"dropout": 0.2}))
        return load_file(outcome.adapter / "adapter_model.safetensors")

    often, once = weights("often", 1), weights("once", 100)
    assert all(torch.equal(often[name], once[name]) for name in once)


@pytest.mark.parametrize("change", [{"eval_share": 0.0}, {"eval_min_rows": 3}, {}])
def test_few_rows_are_not_held_out(pico_model, chat_file, tmp_path, change):
    training = {"steps": 2, **({**EVAL, **change} if change else {})}
    outcome, events = train(spec_for(pico_model, chat_file, tmp_path / "run", training=training))
    assert evals(events) == []
    assert outcome.eval_loss is None
    assert next(e for e in events if isinstance(e, DataReady)).heldout == 0
    assert len([e for e in events if isinstance(e, StepDone)]) == 2


class Losses:
    """A framework whose validation losses are given."""

    def __init__(self, *losses):
        self.losses = iter(losses)

    def prepare_measure(self, mine, everyone):
        return None

    def measure(self, indexes, shared):
        return {"loss": next(self.losses), "count": 1.0, "tokens": 2.0}

    def copy_weights(self):
        return "weights"


def test_a_loss_that_is_not_finite_is_never_the_best():
    guard = MemoryGuard(TorchMemory(), lambda _: None)
    validator = Validator(
        Losses(float("nan"), 2.0), 1, TrainingSpec(), lambda _: None, guard=guard, group=ProcessGroup(), eval_steps=1
    )
    validator.validate(1)
    assert (validator.best_loss, validator.best) == (None, None)
    validator.validate(2)
    assert (validator.best_loss, validator.best_step, validator.best) == (2.0, 2, "weights")
