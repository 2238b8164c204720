"""A preflight meets the heaviest moments of a run and leaves no trace of them."""

import json
from dataclasses import replace

import pytest
import torch
from cuda_training import spec_for, train
from safetensors.torch import load_file

from bp_data.loop.examples import find_longest
from bp_data.loop.preflight import is_due
from bp_runs.errors import DiskFullError
from bp_runs.events import EvalDone, Notice, StepDone

HELD = {"eval_share": 0.25, "eval_min_rows": 2, "eval_steps": 2, "batch_size": 2, "steps": 3, "keep": "last"}


def preflights(events):
    return [e.details["preflight"] for e in events if isinstance(e, Notice) and "preflight" in e.details]


@pytest.mark.parametrize(
    "change", [{"gradient_accumulation": 2}, {"packing": True}, {"curriculum": "length", "eval_share": 0.0}]
)
def test_the_run_is_the_same_to_the_bit(pico_model, chat_file, tmp_path, change):
    def run(name, preflight):
        training = {**HELD, **change, "preflight": preflight}
        outcome, events = train(
            spec_for(pico_model, chat_file, tmp_path / name, training=training, lora={"dropout": 0.2})
        )
        told = [(e.step, e.loss, e.tokens) for e in events if isinstance(e, StepDone | EvalDone)]
        return load_file(outcome.adapter / "adapter_model.safetensors"), told, preflights(events)

    plain, plain_told, none = run("plain", "off")
    weights, told, (found,) = run("measured", "on")
    assert none == []
    assert told == plain_told
    assert all(torch.equal(weights[name], tensor) for name, tensor in plain.items())
    trained = sum(tensor.nbytes for tensor in weights.values())
    assert found["save_bytes"] == pytest.approx(3 * trained, rel=0.01)  # weights and AdamW's two moments
    assert found["rows"] == (1 if "packing" in change else 2)


@pytest.mark.parametrize("method", ["dpo", "kto"])
def test_answers_too(pico_model, tmp_path, method):
    file = tmp_path / "answers.jsonl"
    # In an order in which the longest held-out ones do not lie next to each other.
    answers = [("captain marlow " * (1 + i % 7), "the fox " * (1 + i % 5), i % 3 > 0) for i in range(24)]
    rows = [
        {"prompt": f"who are you {i}", "completion": good, "label": label}
        if method == "kto"
        else {"prompt": f"who are you {i}", "chosen": good, "rejected": bad}
        for i, (good, bad, label) in enumerate(answers)
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def run(name, preflight):
        training = {**HELD, "method": method, "batch_size": 3, "steps": 2, "preflight": preflight}
        outcome, events = train(spec_for(pico_model, file, tmp_path / name, training=training))
        return load_file(outcome.adapter / "adapter_model.safetensors"), preflights(events)

    plain, _ = run("plain", "off")
    weights, (found,) = run("measured", "on")
    assert all(torch.equal(weights[name], tensor) for name, tensor in plain.items())
    assert found["rows"] == 3


def test_it_meets_the_longest_rows(pico_model, chat_file, tmp_path):
    chat_file.write_text(chat_file.read_text() + '{"text": "' + "captain " * 60 + '"}\n')
    _, events = train(
        spec_for(pico_model, chat_file, tmp_path / "run", training={"steps": 1, "batch_size": 2, "preflight": "on"})
    )
    (found,) = preflights(events)
    assert found["tokens"] > 60 + 20  # the longest row with the next longest, without padding
    assert find_longest([3, 9, 5, 9], 3) == [1, 3, 2]


def test_no_room_for_the_saves_is_noticed_before_the_first_step(pico_model, chat_file, tmp_path, monkeypatch):
    import shutil

    usage = shutil._ntuple_diskusage
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage(1, 1, 65 * 2**20))
    events = []
    spec = spec_for(pico_model, chat_file, tmp_path / "run", training={"preflight": "on", "keep_checkpoints": 2000})
    from bp_train_cuda import CudaRail

    with pytest.raises(DiskFullError, match="2001 checkpoints"):
        CudaRail().train(spec, events.append, lambda: False)
    assert not any(isinstance(e, StepDone) for e in events)


def test_long_runs_on_a_gpu_have_a_preflight_by_default(pico_model, chat_file, tmp_path):
    spec = spec_for(pico_model, chat_file, tmp_path / "run", training={"steps": 50})
    off = replace(spec, training=replace(spec.training, preflight="off"))
    short = replace(spec, training=replace(spec.training, steps=49))
    due = [is_due(spec, on_gpu=True), is_due(spec, on_gpu=False), is_due(short, on_gpu=True), is_due(off, on_gpu=True)]
    assert due == [True, False, False, False]
