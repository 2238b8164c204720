import json

import pytest

from backpropagate import Trainer, trackers
from backpropagate.errors import TrackerMissingError
from bp_runs.errors import TrainingDivergedError
from bp_runs.events import EvalDone, Notice, StepDone
from bp_runs.testing import FakeRail


def fake_trainer(chat_file, pico_model, tmp_path, rail=None, **flags):
    return Trainer(str(pico_model), output=tmp_path / "out", rail=rail or FakeRail(), steps=4, data=chat_file, **flags)


def read_scalars(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(folder)).Reload()
    return {tag: [(e.step, e.tensor_proto.float_val[0]) for e in found.Tensors(tag)] for tag in found.Tags()["tensors"]}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_tensorboard_is_told_every_step_under_the_run_s_id(chat_file, pico_model, tmp_path):
    result = fake_trainer(chat_file, pico_model, tmp_path, report_to="tensorboard").train()
    scalars = read_scalars(tmp_path / "out" / "tensorboard" / result.run_id)
    assert [step for step, _ in scalars["train/loss"]] == [1, 2, 3, 4]
    assert [loss for _, loss in scalars["train/loss"]] == pytest.approx([4 / 2, 4 / 3, 4 / 4, 4 / 5])
    assert {"train/learning_rate", "train/tokens_per_second", "gpu/memory_bytes"} <= scalars.keys()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_run_can_be_named_and_a_failed_one_is_closed(chat_file, pico_model, tmp_path):
    rail = FakeRail(fail_at=3, failure=TrainingDivergedError("the loss is nan"))
    trainer = fake_trainer(chat_file, pico_model, tmp_path, rail, report_to="tensorboard", run_name="mine")
    with pytest.raises(TrainingDivergedError):
        trainer.train()
    assert [step for step, _ in read_scalars(tmp_path / "out" / "tensorboard" / "mine")["train/loss"]] == [1, 2]


def test_none_leaves_no_trace(chat_file, pico_model, tmp_path):
    fake_trainer(chat_file, pico_model, tmp_path, report_to="none").train()
    assert not (tmp_path / "out" / "tensorboard").exists()


def test_a_tracker_that_is_not_installed_is_refused_before_a_run_exists(chat_file, pico_model, tmp_path, monkeypatch):
    monkeypatch.setattr(trackers, "find_spec", lambda name: None)
    with pytest.raises(TrackerMissingError, match="wandb"):
        fake_trainer(chat_file, pico_model, tmp_path, report_to="wandb").train()
    assert not (tmp_path / "out" / "runs").exists()
    assert trackers.choose_trackers("auto", {}) == []


def test_auto_takes_what_is_found_and_sends_nothing_away_unasked(monkeypatch):
    monkeypatch.setattr(trackers, "find_spec", lambda name: object())
    assert trackers.choose_trackers("auto", {}) == ["tensorboard", "mlflow", "trackio"]
    assert "wandb" in trackers.choose_trackers("auto", {"WANDB_API_KEY": "x"})
    assert trackers.choose_trackers("wandb", {}) == ["wandb"]


def test_numbers_of_events():
    step = StepDone(
        step=1, steps=2, loss=1.5, learning_rate=1e-4, grad_norm=None, tokens=8, tokens_per_second=3.0,
        memory_bytes=7, metrics={"margin": 0.5},
    )  # fmt: skip
    assert trackers.numbers_of(step) == {
        "train/loss": 1.5,
        "train/learning_rate": 1e-4,
        "train/tokens_per_second": 3.0,
        "gpu/memory_bytes": 7.0,
        "train/margin": 0.5,
    }
    found = trackers.numbers_of(EvalDone(step=1, loss=2.0, tokens=3, best=True, metrics={"accuracy": 1.0}))
    assert found == {"eval/loss": 2.0, "eval/accuracy": 1.0}
    assert trackers.numbers_of(Notice(message="x")) == {}


def test_secrets_are_masked(tmp_path):
    told = trackers.describe_run(
        "r1", None, {"model.name": "hf_abcdefghijklmnopqrstuvwxyz0123456789"}, output=tmp_path, offline=True, environ={}
    )
    assert "hf_abcdef" not in json.dumps(dict(told.settings))
    assert told.name == "r1"


def test_mlflow_keeps_the_run_on_this_machine(chat_file, pico_model, tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    result = fake_trainer(chat_file, pico_model, tmp_path, report_to="mlflow").train()
    [run] = mlflow.search_runs(experiment_names=[trackers.PROJECT], output_format="list")
    assert (run.info.run_name, run.info.status, run.data.tags["run_id"]) == (
        result.run_id,
        "FINISHED",
        result.run_id,
    )
    assert run.data.metrics["train/loss"] == pytest.approx(0.8)
    assert run.data.params["training.steps"] == "4"
