"""Specs and events become JSON and come back equal; anything else is rejected, with the place."""

import json
from dataclasses import fields, replace
from pathlib import Path

import pytest

from bp_runs.errors import ContractError
from bp_runs.events import Event, Notice, StepDone
from bp_runs.serialize import to_json
from bp_runs.spec import DataSpec, Ranks, RunFolders, Settings, TrainingSpec, TrainSpec

RANKS = Ranks(rank=0, count=2, address="127.0.0.1", port=29500, is_hosted=True, token="a secret of this launch")


def spec_of(**changes):
    settings = Settings(
        data=DataSpec(path="rows.jsonl", samples=7),
        training=TrainingSpec(method="dpo", sample_prompts=("who?", "where?"), learning_rate=1e-5, resume=None),
    )
    folders = RunFolders(run_id="r1", output=Path("out"), run=Path("out/runs/r1"), cache=Path("cache"))
    return replace(TrainSpec.build(settings, folders, Path("base"), "c0ffee", ranks=RANKS), **changes)


def through_json(spec):
    return json.loads(json.dumps(spec.to_dict()))


def test_a_spec_comes_back_equal_without_its_ranks():
    spec = spec_of(checkpoint=Path("out/runs/r1/checkpoints/step-3"))
    assert TrainSpec.from_dict(through_json(spec)) == replace(spec, ranks=None)


def test_the_token_is_neither_sent_nor_shown():
    assert RANKS.token not in json.dumps(spec_of().to_dict())
    assert RANKS.token not in repr(RANKS)


def test_every_setting_is_sent():
    sent = spec_of().to_dict()
    for group in fields(Settings):
        assert sent[group.name].keys() == {field.name for field in fields(getattr(Settings(), group.name))}


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        (("training", "steps"), "100", r"training.steps: expected int, found '100'"),
        (("training", "steps"), True, r"training.steps: expected int, found True"),
        (("training", "method"), "rm -rf", r"training.method: expected 'sft' or 'dpo'"),
        (("training", "packing"), 1, r"training.packing: expected bool, found 1"),
        (("training", "sample_prompts"), ["who?", 3], r"training.sample_prompts\[1\]: expected str"),
        (("training", "sample_prompts"), "who?", r"training.sample_prompts: expected"),
        (("training", "stepps"), 3, r"training.stepps: TrainingSpec has no such field"),
        (("folders",), {"output": "o", "run": "r"}, r"folders.run_id: missing"),
        (("folders",), ["out"], r"folders: expected RunFolders"),
        (("base",), None, r"base: expected Path, found None"),
        (("data", "samples"), 1.5, r"data.samples: expected int, found 1.5"),
    ],
)
def test_a_spec_that_is_none_is_rejected_with_its_place(place, value, message):
    sent = through_json(spec_of())
    *groups, last = place
    group = sent
    for name in groups:
        group = group[name]
    group[last] = value
    with pytest.raises(ContractError, match=message):
        TrainSpec.from_dict(sent)


def test_events_come_back_equal():
    notice = Notice(message="hot", level="warning", details={"celsius": 88})
    step = StepDone(
        step=1, steps=2, loss=1.5, learning_rate=1e-4, grad_norm=None, tokens=9, tokens_per_second=3.5, memory_bytes=7,
        metrics={"accuracy": 0.5},
    )  # fmt: skip
    for event in (notice, step):
        assert type(event).from_dict(json.loads(json.dumps(event.to_dict()))) == event


def test_an_event_of_another_kind_and_unknown_levels_are_rejected():
    with pytest.raises(ContractError, match="expected 'notice', found 'step'"):
        Notice.from_dict({"event": "step", "message": "hot"})
    with pytest.raises(ContractError, match="level: expected 'info' or 'warning'"):
        Notice.from_dict({"event": "notice", "message": "hot", "level": "loud"})
    with pytest.raises(ContractError, match="color: Notice has no such field"):
        Notice.from_dict({"event": "notice", "message": "hot", "color": "red"})


@pytest.mark.parametrize("value", [b"bytes", {1: "one"}, {"a": {1, 2}}, [object()], Event])
def test_what_json_cannot_say_is_rejected(value):
    with pytest.raises(ContractError, match="has no JSON form"):
        to_json(value)
