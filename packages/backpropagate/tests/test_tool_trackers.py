import json
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType

import pytest

from backpropagate import Trainer
from backpropagate.errors import TrackerMissingError
from backpropagate.settings import resolve
from backpropagate.trackers import tracker
from bp_runs.errors import InvalidSettingError, TrainingDivergedError
from bp_runs.events import EvalDone, Notice, StepDone
from bp_runs.store import RunStore
from bp_runs.testing import FakeRail


def fake_trainer(chat_file, pico_model, tmp_path, rail=None, **flags):
    flags = {"output": tmp_path / "out", "steps": 4} | flags
    return Trainer(str(pico_model), rail=rail or FakeRail(), data=chat_file, **flags)


def read_scalars(folder):
    from tensorboard.backend.event_processing.plugin_event_accumulator import EventAccumulator  # TensorBoard's own

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
    [folder] = (tmp_path / "out" / "tensorboard").iterdir()
    assert folder.name.startswith("mine-")
    assert [step for step, _ in read_scalars(folder)["train/loss"]] == [1, 2]


class Frail:
    """A tracker that raises in the method that the test names."""

    breaks_at, told, closed = "nowhere", [], []

    def __init__(self, run):
        self._break("open")

    def log(self, step, values):
        self.told.append(step)
        self._break("log" if step == 2 else "later")

    def close(self, *, failed):
        self.closed.append(failed)
        self._break("close")

    def _break(self, where):
        if where == self.breaks_at:
            raise ConnectionError(f"no server to {where}")


@pytest.fixture
def frail(monkeypatch):
    monkeypatch.setattr(tracker, "TRACKERS", {"frail": Frail, "sound": type("Sound", (Frail,), {})})
    monkeypatch.setattr(tracker, "choose_trackers", lambda *_: ["frail", "sound"])
    for kind in tracker.TRACKERS.values():
        monkeypatch.setattr(kind, "told", [], raising=False)
        monkeypatch.setattr(kind, "closed", [], raising=False)
    return tracker.TRACKERS


@pytest.mark.parametrize("where", ["open", "log", "close"])
def test_a_tracker_that_fails_is_told_of_once_and_costs_no_run(
    chat_file, pico_model, tmp_path, frail, monkeypatch, where
):
    monkeypatch.setattr(frail["frail"], "breaks_at", where)
    monkeypatch.setattr(frail["sound"], "breaks_at", "nowhere")
    shown = []
    result = fake_trainer(chat_file, pico_model, tmp_path).train(on_event=shown.append)
    assert result.record.status == "completed"
    assert RunStore(tmp_path / "out").load(result.run_id).status == "completed"
    [notice] = [e for e in shown if isinstance(e, Notice) and "tracker" in e.details]
    assert notice.details == {"tracker": "frail", "reason": f"no server to {where}"}
    assert notice.level == "warning"
    assert frail["frail"].told == {"open": [], "log": [1, 2], "close": [1, 2, 3, 4]}[where]
    assert frail["frail"].closed == ([] if where == "open" else [False])
    assert (frail["sound"].told, frail["sound"].closed) == ([1, 2, 3, 4], [False])
    recorded = [e for e in RunStore(tmp_path / "out").read_metrics(result.run_id) if e["event"] == "notice"]
    assert any("frail" in e["message"] for e in recorded) == (where != "close")


def test_a_tracker_that_fails_at_the_end_hides_no_failure_of_the_run(
    chat_file, pico_model, tmp_path, frail, monkeypatch
):
    monkeypatch.setattr(frail["frail"], "breaks_at", "close")
    monkeypatch.setattr(frail["sound"], "breaks_at", "nowhere")
    rail = FakeRail(fail_at=3, failure=TrainingDivergedError("the loss is nan"))
    with pytest.raises(TrainingDivergedError):
        fake_trainer(chat_file, pico_model, tmp_path, rail).train()
    [row] = RunStore(tmp_path / "out").list_runs()
    assert row["status"] == "diverged"
    assert frail["sound"].closed == [True]


class Cut(BaseException):
    """What nobody catches, as a kill."""


def cut_off(chat_file, pico_model, tmp_path, **flags):
    """A run of six steps whose trackers were told five when it was cut off, with a checkpoint of the fourth; its id."""

    def on_event(event):
        if isinstance(event, StepDone) and event.step == 6:  # told here before it is told to trackers
            raise Cut

    with pytest.raises(Cut):
        fake_trainer(chat_file, pico_model, tmp_path, **flags).train(steps=6, save_steps=4, on_event=on_event)
    store = RunStore(tmp_path / "out")
    [row] = store.list_runs()
    store.update(
        row["run_id"], lambda record: (setattr(record, "status", "interrupted"), setattr(record, "error", None))
    )
    return row["run_id"]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_run_that_goes_on_keeps_its_entry_in_tensorboard_wherever_it_is_resumed(
    chat_file, pico_model, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    run_id = cut_off(chat_file, pico_model, tmp_path, report_to="tensorboard", output="out")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    Trainer(output="../out", rail=FakeRail()).resume(run_id)
    assert list(tmp_path.rglob("tensorboard")) == [tmp_path / "out" / "tensorboard"]
    scalars = read_scalars(tmp_path / "out" / "tensorboard" / run_id)
    assert [step for step, _ in scalars["train/loss"]] == [1, 2, 3, 4, 5, 6]


class StandIn(ModuleType):
    """In the place of wandb or trackio: notes how it is begun."""

    def __init__(self, name):
        super().__init__(name)
        self.__spec__ = ModuleSpec(name, None)
        self.begun = []

    def init(self, **asked):
        self.begun.append(asked)
        return self

    def log(self, values, step):
        pass

    def finish(self, exit_code=0):
        pass


@pytest.mark.parametrize(("name", "key"), [("wandb", "id"), ("trackio", "name")])
def test_a_run_that_goes_on_keeps_its_entry_elsewhere(chat_file, pico_model, tmp_path, monkeypatch, name, key):
    module = StandIn(name)
    monkeypatch.setitem(sys.modules, name, module)
    run_id = cut_off(chat_file, pico_model, tmp_path, report_to=name, run_name="mine")
    result = fake_trainer(chat_file, pico_model, tmp_path).resume(run_id)
    assert result.outcome.steps == 6
    first, second = module.begun
    assert first["resume"] == {"wandb": None, "trackio": "never"}[name]
    assert second["resume"] == "allow"
    assert first[key] == second[key]
    assert run_id in first[key]


def test_each_run_of_a_multi_run_has_an_entry(pico_model, tmp_path, monkeypatch):
    module = StandIn("wandb")
    monkeypatch.setitem(sys.modules, "wandb", module)
    (tmp_path / "d.jsonl").write_text("".join(f'{{"text": "row {i}"}}\n' for i in range(60)))
    trainer = Trainer(str(pico_model), output=tmp_path / "out", rail=FakeRail(), steps=2, report_to="wandb")
    result = trainer.multi_run(tmp_path / "d.jsonl", runs=2, run_name="mine")
    assert [begun["id"] for begun in module.begun] == list(result.members)
    assert [begun["group"] for begun in module.begun] == [result.run_id] * 2
    assert [begun["name"] for begun in module.begun] == ["mine-1", "mine-2"]
    assert module.begun[0]["config"]["training.steps"] == 2


def test_a_missing_tracker_is_refused_before_a_multi_run_exists(chat_file, pico_model, tmp_path, monkeypatch):
    monkeypatch.setattr(tracker, "find_spec", lambda name: None)
    with pytest.raises(TrackerMissingError):
        fake_trainer(chat_file, pico_model, tmp_path, report_to="trackio").multi_run(runs=2)
    assert not (tmp_path / "out" / "runs").exists()


def test_none_leaves_no_trace(chat_file, pico_model, tmp_path):
    fake_trainer(chat_file, pico_model, tmp_path, report_to="none").train()
    assert not (tmp_path / "out" / "tensorboard").exists()


def test_a_tracker_that_is_not_installed_is_refused_before_a_run_exists(chat_file, pico_model, tmp_path, monkeypatch):
    monkeypatch.setattr(tracker, "find_spec", lambda name: None)
    with pytest.raises(TrackerMissingError, match="wandb"):
        fake_trainer(chat_file, pico_model, tmp_path, report_to="wandb").train()
    assert not (tmp_path / "out" / "runs").exists()
    assert tracker.choose_trackers(["auto"], {}) == []


SENDING = {"WANDB_API_KEY": "x", "MLFLOW_TRACKING_URI": "https://mlflow.example", "TRACKIO_SPACE_ID": "me/space"}
LOCAL = {"MLFLOW_TRACKING_URI": "sqlite:///runs.db"}


def test_a_tracker_that_sends_data_starts_only_when_it_is_named(monkeypatch):
    monkeypatch.setattr(tracker, "find_spec", lambda name: object())
    for environ in ({}, LOCAL, {"MLFLOW_TRACKING_URI": "http://127.0.0.1:5000"}, {"WANDB_API_KEY": "x"}):
        assert tracker.choose_trackers(["auto"], environ) == ["tensorboard", "mlflow", "trackio"]
    assert tracker.choose_trackers(["auto"], SENDING) == ["tensorboard"]
    for name in ("wandb", "mlflow", "trackio"):
        assert tracker.choose_trackers([name], SENDING) == [name]
    assert tracker.choose_trackers(["wandb", "auto"], {}) == ["wandb", "tensorboard", "mlflow", "trackio"]
    assert tracker.choose_trackers(["wandb", "tensorboard"], {}) == ["wandb", "tensorboard"]
    assert tracker.choose_trackers(["none"], {}) == []
    with pytest.raises(InvalidSettingError, match="none, or some"):
        tracker.choose_trackers(["none", "wandb"], {})


@pytest.mark.parametrize(
    "given", [["wandb", "tensorboard"], ("wandb", "tensorboard"), "wandb,tensorboard", "wandb|tensorboard"]
)
def test_several_trackers_by_every_way_of_setting_them(given, tmp_path):
    both = ("wandb", "tensorboard")
    assert Trainer("m", report_to=given).settings.training.report_to == both
    if isinstance(given, str):
        assert resolve({}, {"BACKPROPAGATE_TRAINING__REPORT_TO": given}).settings.training.report_to == both
    file = tmp_path / "backpropagate.toml"
    file.write_text(f"[training]\nreport_to = {list(given) if not isinstance(given, str) else given!r}\n")
    assert resolve({}, {}, file).settings.training.report_to == both
    with pytest.raises(InvalidSettingError, match="invalid value for report_to: 'wandbb'; did you mean 'wandb'"):
        Trainer("m", report_to=["tensorboard", "wandbb"])


def test_numbers_of_events():
    step = StepDone(
        step=1, steps=2, loss=1.5, learning_rate=1e-4, grad_norm=None, tokens=8, tokens_per_second=3.0,
        memory_bytes=7, metrics={"margin": 0.5},
    )  # fmt: skip
    assert tracker.numbers_of(step) == {
        "train/loss": 1.5,
        "train/learning_rate": 1e-4,
        "train/tokens_per_second": 3.0,
        "gpu/memory_bytes": 7.0,
        "train/margin": 0.5,
    }
    found = tracker.numbers_of(EvalDone(step=1, loss=2.0, tokens=3, best=True, metrics={"accuracy": 1.0}))
    assert found == {"eval/loss": 2.0, "eval/accuracy": 1.0}
    assert tracker.numbers_of(Notice(message="x")) == {}


def test_secrets_are_masked(tmp_path):
    told = tracker.describe_run(
        "r1", None, {"model.name": "hf_abcdefghijklmnopqrstuvwxyz0123456789"}, output=tmp_path, offline=True, environ={}
    )
    assert "hf_abcdef" not in json.dumps(dict(told.settings))
    assert told.name == "r1"


def test_mlflow_keeps_the_run_on_this_machine(chat_file, pico_model, tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    result = fake_trainer(chat_file, pico_model, tmp_path, report_to="mlflow").train()
    [run] = mlflow.search_runs(experiment_names=[tracker.PROJECT], output_format="list")
    assert (run.info.run_name, run.info.status, run.data.tags["run_id"]) == (
        result.run_id,
        "FINISHED",
        result.run_id,
    )
    assert run.data.metrics["train/loss"] == pytest.approx(0.8)
    assert run.data.params["training.steps"] == "4"


def test_mlflow_finds_the_run_again_by_its_id(chat_file, pico_model, tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    run_id = cut_off(chat_file, pico_model, tmp_path, report_to="mlflow")
    fake_trainer(chat_file, pico_model, tmp_path).resume(run_id)
    [run] = mlflow.search_runs(experiment_names=[tracker.PROJECT], output_format="list")
    assert (run.data.tags["run_id"], run.info.status) == (run_id, "FINISHED")
