"""Methods that compare answers, trained for real on pico models; TRL's own trainers are the reference for the losses."""

import math
import shutil
from dataclasses import replace
from typing import get_args

import pytest
import torch
from cuda_training import spec_for, train
from safetensors.torch import load_file
from transformers import LlamaModel

from bp_data import PrepareRequest, prepare
from bp_data.loop.examples import join_prompt
from bp_runs.checkpoint_store import CheckpointFolder
from bp_runs.errors import InvalidSettingError
from bp_runs.events import DataReady, EvalDone, Notice, StepDone
from bp_runs.methods import METHODS as TABLE
from bp_runs.methods import MethodName
from bp_runs.spec import TrainingSpec

PAIRED = ("dpo", "orpo", "simpo")
METHODS = (*PAIRED, "kto")


@pytest.fixture
def files(pair_file, judged_file):
    return {**dict.fromkeys(PAIRED, pair_file), "kto": judged_file}


def spec(method, files, base, run, **training):
    change = {"method": method, "steps": 5, "batch_size": 8, "warmup_steps": 0, "learning_rate": 3e-3, **training}
    return spec_for(base, files[method], run, training=change)


def steps(events):
    return [e for e in events if isinstance(e, StepDone)]


def weights(outcome):
    return load_file(outcome.adapter / "adapter_model.safetensors")


@pytest.mark.parametrize("method", METHODS)
def test_it_learns_to_tell_the_answers_apart(files, pico_model, tmp_path, method):
    outcome, events = train(spec(method, files, pico_model, tmp_path / "run", steps=8))
    first, last = steps(events)[0], steps(events)[-1]
    assert last.loss < first.loss
    assert last.metrics["margin"] > first.metrics["margin"]
    assert last.metrics["accuracy"] > 0.9
    assert outcome.tokens == last.tokens > 0
    data = next(e for e in events if isinstance(e, DataReady))
    assert 0 < data.trained_tokens < data.tokens


class Scarce:
    """Memory for ``rows`` sequences at a time, wherever the model is run."""

    def __init__(self, monkeypatch, rows):
        self.hits = 0
        forward = LlamaModel.forward

        def scarce(model, *args, **kwargs):
            if kwargs["input_ids"].shape[0] > rows:
                self.hits += 1
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
            return forward(model, *args, **kwargs)

        monkeypatch.setattr(LlamaModel, "forward", scarce)


@pytest.mark.parametrize("method", METHODS)
def test_pieces_learn_what_the_whole_learns(files, pico_model, tmp_path, monkeypatch, method):
    calm, calm_events = train(spec(method, files, pico_model, tmp_path / "calm", steps=3))
    scarce = Scarce(monkeypatch, 4 if method == "kto" else 6)
    outcome, events = train(spec(method, files, pico_model, tmp_path / "scarce", steps=3))
    assert scarce.hits
    assert any(isinstance(e, Notice) and "chunks" in e.details for e in events)
    for before, after in zip(steps(calm_events), steps(events), strict=True):
        assert (after.tokens, after.loss) == (before.tokens, pytest.approx(before.loss, rel=1e-4))
        if before.step > 1:  # before the first step margins are zero but for rounding
            assert after.metrics == pytest.approx(before.metrics, abs=1e-4)
    expected, found = weights(calm), weights(outcome)
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("method", METHODS)
def test_held_out_answers_are_compared_too(files, pico_model, tmp_path, method):
    change = {"eval_share": 0.25, "eval_min_rows": 1, "eval_steps": 3, "batch_size": 3}
    outcome, events = train(spec(method, files, pico_model, tmp_path / "run", steps=6, **change))
    evals = [e for e in events if isinstance(e, EvalDone)]
    assert [e.step for e in evals] == [3, 6]
    assert all(0 <= e.metrics["accuracy"] <= 1 and math.isfinite(e.metrics["margin"]) for e in evals)
    assert outcome.eval_loss == min(e.loss for e in evals)
    assert evals[0].tokens > 0


def test_the_method_s_own_rate_runs_unless_another_is_named(files, pico_model, tmp_path):
    own = {"sft": 2e-4, "dpo": 5e-6, "orpo": 8e-6, "simpo": 1e-5, "kto": 5e-6}
    assert {method: TrainingSpec(method=method).resolved_learning_rate for method in own} == own
    for rate, expected in ((None, own["kto"]), (1e-3, 1e-3)):
        change = {"steps": 1, "scheduler": "constant", "learning_rate": rate}
        _, events = train(spec("kto", files, pico_model, tmp_path / str(rate), **change))
        assert steps(events)[0].learning_rate == expected


@pytest.mark.parametrize(
    ("group", "change", "key"),
    [
        ("training", {"packing": True}, "training.packing"),
        ("data", {"min_tokens": 3}, "data.min_tokens"),
        ("data", {"reasoning_trace": True}, "data.reasoning_trace"),
        ("data", {"on_overflow": "split"}, "data.on_overflow"),
    ],
)
def test_settings_of_whole_rows_are_refused(pair_file, pico_model, tmp_path, group, change, key):
    changes = {"training": {"method": "dpo"}}
    changes[group] = changes.get(group, {}) | change
    with pytest.raises(InvalidSettingError, match=key):
        train(spec_for(pico_model, pair_file, tmp_path / "run", **changes))


def test_an_answer_goes_under_another_prompt(judged_file, pico_model):
    rows = prepare(PrepareRequest(judged_file, pico_model, 128, learns_from="judged")).rows
    mine, other = rows[0].row, rows[1].row
    split, start = mine.mask.find(1), other.mask.find(1)
    joined = join_prompt(mine, other, 128)
    assert joined.ids.tolist() == [*mine.ids[:split], *other.ids[start:]]
    assert [*joined.mask] == [0] * split + [*other.mask[start:]]
    assert len(join_prompt(mine, other, split + 1).ids) == split + 1


def test_a_preflight_leaves_no_trace_in_the_metrics(files, pico_model, tmp_path):
    runs = {
        preflight: steps(train(spec("dpo", files, pico_model, tmp_path / preflight, preflight=preflight))[1])
        for preflight in ("off", "on")
    }
    assert [(e.loss, e.metrics) for e in runs["on"]] == [(e.loss, e.metrics) for e in runs["off"]]


@pytest.mark.parametrize("method", ["dpo", "kto", "pissa"])
def test_a_run_that_is_cut_off_goes_on_with_what_it_started_from(files, chat_file, pico_model, tmp_path, method):
    lora = {"init_lora_weights": "pissa"} if method == "pissa" else {}
    change = {"steps": 6, "batch_size": 3, "save_steps": 3, "learning_rate": 3e-3}
    if method != "pissa":
        change["method"] = method
    file = files.get(method, chat_file)
    whole, _ = train(spec_for(pico_model, file, tmp_path / "whole", training=change, lora=lora))
    cut = spec_for(pico_model, file, tmp_path / "cut", training=change, lora=lora)

    def stop_after_four(seen=[]):
        seen.append(1)
        return len(seen) >= 4

    train(cut, stop=stop_after_four)
    shutil.rmtree(cut.folders.adapter)
    newest, _ = CheckpointFolder(cut.folders.run).newest_whole()
    resumed, _ = train(replace(cut, checkpoint=newest.path))
    name = "adapter_model.safetensors"
    assert (resumed.adapter / name).read_bytes() == (whole.adapter / name).read_bytes()


def test_every_method_is_one_row_and_has_a_loss():
    assert tuple(TABLE) == get_args(MethodName)
    assert {name for name, row in TABLE.items() if row.loss is None} == {"sft"}
