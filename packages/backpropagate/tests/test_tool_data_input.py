"""Data as people hold it in Python: written once, named by its content, and read again by resume and replay."""

import datetime as dt
import json

import datasets
import numpy as np
import pandas as pd
import pytest

from backpropagate import Trainer
from backpropagate.data_input import is_in_memory, snapshot
from backpropagate.errors import ModelInvalidError
from backpropagate.event_dispatch import listener
from bp_data.errors import DatasetEmptyError, DatasetInvalidError
from bp_runs.errors import CodedError, ContractError, InvalidSettingError
from bp_runs.testing import FakeRail

ROWS = [{"prompt": f"who are you {i}", "completion": f"captain {i}"} for i in range(20)]
SECRET = "a diary that nobody may read"


@pytest.fixture
def trainer(pico_model, tmp_path):
    return Trainer(str(pico_model), output=tmp_path / "out", rail=FakeRail(), steps=2, report_to="none", resume=False)


@pytest.mark.parametrize(
    "data",
    [
        ROWS,
        tuple(ROWS),
        (row for row in ROWS),
        datasets.Dataset.from_list(ROWS),
        pd.DataFrame(ROWS),
        iter(datasets.Dataset.from_list(ROWS)),
    ],
    ids=["list", "tuple", "generator", "Dataset", "DataFrame", "iterator"],
)
def test_all_forms_are_the_same_run_of_the_same_file(trainer, data):
    result = trainer.train(data)
    assert result.record.data["read"] == len(ROWS)
    file = trainer.output / "snapshots" / f"{snapshot(ROWS, trainer.output).stem}.jsonl"
    assert result.record.setting("data.path") == str(file)
    assert [json.loads(line) for line in file.read_text().splitlines()] == ROWS
    assert [f.name for f in file.parent.iterdir()] == [file.name], "one file, nothing half-written"


def test_a_run_of_rows_in_memory_is_replayed_and_resumed_without_them(trainer, pico_model):
    first = trainer.train(ROWS)
    later = Trainer(str(pico_model), output=trainer.output, rail=FakeRail(), report_to="none")
    again = later.replay(first.run_id)
    assert again.record.data["sha256"] == first.record.data["sha256"]
    later.runs.update(again.run_id, lambda record: setattr(record, "status", "interrupted"))
    assert later.resume(again.run_id).run_id == again.run_id


def test_other_calls_take_them_too(trainer, pico_model, tmp_path):
    assert trainer.validate(ROWS).ledger.read == len(ROWS)
    assert trainer.train(dataset=ROWS).record.data["read"] == len(ROWS)
    other = Trainer(str(pico_model), data=ROWS, output=tmp_path / "other", rail=FakeRail(), steps=2, report_to="none")
    assert other.settings.data.path.startswith(str(tmp_path / "other"))
    assert other.train().record.data["read"] == len(ROWS)


def test_values_become_json(tmp_path):
    row = {"a": np.int64(3), "b": [np.float32(0.5), True], "c": float("nan"), "d": dt.date(2026, 1, 2), 5: None}
    lines = snapshot([row, {**row, "e": {"big": 2**80}}], tmp_path).read_text().splitlines()
    wanted = {"a": 3, "b": [0.5, True], "c": None, "d": "2026-01-02", "5": None}
    assert [json.loads(line) for line in lines] == [wanted, {**wanted, "e": {"big": 2**80}}]


@pytest.mark.parametrize(
    ("data", "code", "said"),
    [
        ([*ROWS, SECRET], DatasetInvalidError, "example 21 is a str"),
        ([ROWS[0], [SECRET]], DatasetInvalidError, "example 2 is a list"),
        ({"train": [SECRET]}, DatasetInvalidError, "with the keys train"),
        (datasets.DatasetDict({"train": datasets.Dataset.from_list(ROWS)}), DatasetInvalidError, "keys train"),
        (5, DatasetInvalidError, "the data is a int"),
        ([], DatasetEmptyError, "no examples"),
        (iter(()), DatasetEmptyError, "no examples"),
    ],
)
def test_what_is_no_list_of_examples_is_rejected_without_showing_it(trainer, data, code, said):
    with pytest.raises(code, match=said) as caught:
        trainer.train(data)
    assert SECRET not in f"{caught.value} {caught.value.cause} {caught.value.fix}"
    assert not trainer.runs.list_runs()
    assert not list((trainer.output / "snapshots").iterdir())


def test_an_error_about_settings_never_dumps_the_rows(trainer):
    rows = [{"text": SECRET}]
    for call in (lambda: trainer.train(rows, dataset=ROWS), lambda: trainer.train(rows, steps="x")):
        with pytest.raises(InvalidSettingError) as caught:
            call()
        assert SECRET not in f"{caught.value} {caught.value.cause} {caught.value.fix}"


def test_paths_and_lists_of_paths_are_no_examples(tmp_path):
    assert not any(map(is_in_memory, [None, "a", tmp_path, ["a", tmp_path], ("a",)]))
    assert all(map(is_in_memory, [[], [{}], {}, iter("")]))


def test_a_loaded_model_is_saved_and_trained(pico_model, tmp_path):
    transformers = pytest.importorskip("transformers")
    model = transformers.AutoModelForCausalLM.from_pretrained(pico_model)
    tokenizer = transformers.AutoTokenizer.from_pretrained(pico_model)
    flags = {"rail": FakeRail(), "steps": 2, "report_to": "none", "resume": False}
    for number, more in enumerate(({}, {"tokenizer": tokenizer}, {})):
        trainer = Trainer(model, output=tmp_path / f"out{number % 2}", **more, **flags)
        folder = trainer.runs.output / "snapshots"
        assert len(list(folder.glob("model*"))) == 1, "the same model is the same folder"
        assert trainer.train(ROWS).record.setting("model.name").startswith(str(folder))
        assert (folder / trainer.settings.model.name / "tokenizer.json").is_file()
    with pytest.raises(InvalidSettingError, match="goes with a model that is loaded"):
        Trainer(str(pico_model), tokenizer=tokenizer)
    model.config._name_or_path = "owner/name"
    with pytest.raises(ModelInvalidError, match="without a tokenizer"):
        Trainer(model, output=tmp_path / "none", **flags)
    model.peft_config = {}
    with pytest.raises(ModelInvalidError, match="adapters on it"):
        Trainer(model, output=tmp_path / "none", **flags)


def test_the_callback_s_old_name(trainer):
    heard = Listener()
    trainer.train(ROWS, callback=heard)
    assert heard.steps == 2


class Listener:
    def __init__(self):
        self.steps, self.all = 0, 0

    def on_step(self, event):
        self.steps += 1

    def on_event(self, event):
        self.all += 1


def test_an_object_hears_the_events_that_it_has_methods_for(trainer):
    heard = Listener()
    trainer.train(ROWS, on_event=heard)
    assert heard.steps == 2
    assert heard.all > heard.steps
    assert listener(print) is print
    assert listener(None) is None
    with pytest.raises(ContractError, match="no method on_event"):
        listener(object())


def test_a_callback_of_a_wrong_kind_fails_before_the_run(trainer):
    with pytest.raises(ContractError):
        trainer.train(ROWS, on_event=object())
    assert not trainer.runs.list_runs()


def test_the_errors_are_coded(trainer):
    with pytest.raises(CodedError):
        trainer.validate([{"nothing": "known"}])
