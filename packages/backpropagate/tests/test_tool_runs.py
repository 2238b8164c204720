"""Runs from the command line: going on, doing again, comparing, exporting, changing; on the fake rail."""

import csv
import json
import os
import platform
import signal
from pathlib import Path

import pytest

from backpropagate import Trainer, on_interrupt, rails
from backpropagate.cli.app import run
from backpropagate.settings import all_settings
from bp_runs.checkpoint_store import CheckpointFolder
from bp_runs.errors import ResumeChangedError, TrainingDivergedError, registered_codes
from bp_runs.events import StepDone
from bp_runs.process import process_birth
from bp_runs.store import RunStore
from bp_runs.testing import FakeRail

TRAIN = ["train", "--data", "d.jsonl", "--model", "./m", "--steps", "20", "--save-steps", "7"]
STORE = RunStore(Path("output"))


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A working folder with a data file and a model folder that the fake rail does not look into."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "d.jsonl").write_text('{"text": "a"}\n{"text": "b"}\n')
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "config.json").write_text("{}")
    (tmp_path / "m" / "model.safetensors").write_bytes(b"")
    with rails.use(FakeRail()):
        yield tmp_path


def out(capsys, argv) -> dict:
    status = run([*argv, "--json"])
    document = json.loads(capsys.readouterr().out)
    assert status == 0, document
    return document


def refused(capsys, argv) -> dict:
    assert run([*argv, "--json"]) != 0
    return json.loads(capsys.readouterr().out)["error"]


class Cut(BaseException):
    """What nobody catches, as a kill."""


def cut_at(step, **flags):
    """A run that is cut off after ``step``, as an interrupted one at the next look."""

    def on_event(event):
        if isinstance(event, StepDone) and event.step == step:
            raise Cut

    flags = {"data": "d.jsonl", "model": "./m", "steps": 20, "save_steps": 7} | flags
    with pytest.raises(Cut):
        Trainer(**flags).train(on_event=on_event)
    run_id = STORE.list_runs()[0]["run_id"]
    STORE.update(run_id, lambda record: (setattr(record, "status", "interrupted"), setattr(record, "error", None)))
    return run_id


def losses(run_id):
    return [(e["step"], e["loss"]) for e in STORE.read_metrics(run_id) if e["event"] == "step"]


CURVE = [(step, 4 / (step + 1)) for step in range(1, 21)]


@pytest.mark.parametrize("how", [["resume"], ["resume", "RUN"], TRAIN, [*TRAIN, "--resume"]])
def test_a_run_that_was_cut_off_goes_on(place, capsys, how):
    run_id = cut_at(9, lora_r=4) if how[0] == "resume" else cut_at(9)
    done = out(capsys, [run_id[-6:] if word == "RUN" else word for word in how])
    assert (done["run_id"], done["status"], done["result"]["steps"]) == (run_id, "completed", 20)
    assert losses(run_id) == CURVE
    record = STORE.load(run_id)
    assert [(s["from_step"], (s["checkpoint"] or "")[:11]) for s in record.sessions] == [(0, ""), (7, "step-000007")]
    assert record.setting("lora.r") == (4 if how[0] == "resume" else record.setting("lora.r"))
    assert len(STORE.list_runs()) == 1


def test_a_run_whose_length_the_data_decides_is_recorded_and_goes_on_to_its_planned_end(place, capsys):
    (place / "d.jsonl").write_text('{"text": "a"}\n' * 80)
    run_id = cut_at(9, steps=None)
    record = STORE.load(run_id)
    assert record.settings["training.steps"] == {"value": None, "source": "default"}
    assert (record.plan["steps"], record.plan["origin"], record.plan["rows"]["read"]) == (30, "default", 80)
    assert STORE.list_runs()[0]["steps_asked"] == 30
    assert run(["list-runs"]) == 0
    assert " 9/30 " in capsys.readouterr().out
    assert run(["show-run", run_id]) == 0
    shown = capsys.readouterr().out
    assert "  plan      80 rows: 3 epochs = 30 steps of 8, not validated\n" in shown
    assert "  rows      planned: 80 read = 80 trained on; each training example seen 3.0 times\n" in shown
    done = out(capsys, ["resume"])
    assert (done["run_id"], done["result"]["steps"], done["result"]["rows"]["passes"]) == (run_id, 30, 3.0)
    assert run(["show-run", run_id]) == 0
    assert "  rows      80 read = 80 trained on; each" in capsys.readouterr().out


def test_a_screen_shows_the_plan_and_at_the_end_what_became_of_every_row(place, capsys):
    (place / "d.jsonl").write_text('{"text": "a"}\n' * 80)
    assert run(["train", "--data", "d.jsonl", "--model", "./m", "--epochs", "0.5"]) == 0
    shown = capsys.readouterr().out
    assert "  plan      80 rows: 0.5 epochs = 5 steps of 8, not validated; 40 rows not reached\n" in shown
    assert "  rows      80 read = 40 trained on + 40 not reached; 50% of an epoch\n" in shown
    told = refused(capsys, ["train", "--data", "d.jsonl", "--model", "./m", "--epochs", "2", "--steps", "9"])
    assert (told["code"], "--epochs 3" in told["fix"]) == ("CONFIG_INVALID_SETTING", True)


def test_epochs_and_steps_replace_each_other_in_a_replay_and_over_the_trainers_own(place, capsys):
    (place / "d.jsonl").write_text('{"text": "a"}\n' * 80)
    trainer = Trainer(model="./m", steps=4)
    assert trainer.train("d.jsonl", epochs=0.2).outcome.steps == 2
    assert trainer.train("d.jsonl").outcome.steps == 4
    run_id = trainer.last.run_id
    assert out(capsys, ["replay", run_id, "--override", "epochs=1"])["result"]["steps"] == 10
    assert out(capsys, ["replay", "--override", "steps=3", STORE.list_runs()[0]["run_id"]])["result"]["steps"] == 3


def test_a_record_whose_plan_was_edited_is_shown_without_it(place, capsys):
    run_id = out(capsys, TRAIN)["run_id"]
    STORE.update(run_id, lambda record: record.plan.pop("rows"))
    STORE.update(run_id, lambda record: record.result["rows"].update(visited="many"))
    assert run(["show-run", run_id]) == 0
    shown = capsys.readouterr().out
    assert "  plan " not in shown
    assert "  rows " not in shown


@pytest.mark.parametrize("change", [["--no-resume"], ["--lr", "1e-5"], ["--lora-r", "3"]])
def test_another_command_begins_a_new_run(place, capsys, change):
    run_id = cut_at(9)
    assert out(capsys, [*TRAIN, *change])["run_id"] != run_id
    assert STORE.load(run_id).status == "interrupted"


def test_a_finished_run_is_not_gone_on_with_by_itself(place, capsys):
    first = out(capsys, TRAIN)["run_id"]
    assert out(capsys, TRAIN)["run_id"] != first


def test_resume_takes_the_record_and_no_other_settings(place, capsys):
    run_id = cut_at(9, lora_r=4, lr=1e-3, method="dpo")
    error = refused(capsys, [*TRAIN, "--lora-r", "8", "--resume"])
    assert error["code"] == "CONFIG_RESUME_DIFFERS"
    assert "lora.r is 8 and was 4" in error["cause"]
    assert "--override lora.r=8" in error["fix"]
    done = out(capsys, ["train", "--resume"])
    assert done["run_id"] == run_id
    settings = STORE.load(run_id).settings
    assert settings["lora.r"] == {"value": 4, "source": "flag"}
    assert settings["training.method"]["value"] == "dpo"


def test_resume_from_another_folder_finds_the_data(place, capsys, monkeypatch, tmp_path):
    run_id = cut_at(9)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert out(capsys, ["resume", "--output", "../output"])["run_id"] == run_id


def test_an_output_folder_that_was_moved_goes_on_where_it_is(place, capsys):
    run_id = cut_at(9)
    before = out(capsys, ["list-runs"])["runs"]
    (place / "output").rename(place / "moved")
    assert out(capsys, ["list-runs", "--output", "moved"])["runs"] == before
    assert out(capsys, ["resume", "--output", "moved"])["run_id"] == run_id
    again = out(capsys, ["replay", run_id, "--output", "moved"])["run_id"]
    moved = RunStore(Path("moved"))
    assert moved.load(again).setting("training.output_dir") == "moved"
    assert (place / "moved/lora/adapter_config.json").exists()
    assert not (place / "output").exists()
    (place / "other/runs").mkdir(parents=True)
    moved.folder(again).rename(place / "other/runs" / again)
    assert [r["run_id"] for r in out(capsys, ["list-runs", "--output", "moved"])["runs"]] == [run_id]
    assert [r["run_id"] for r in out(capsys, ["list-runs", "--output", "other"])["runs"]] == [again]


def test_the_newest_run_is_shown_where_none_is_named(place, capsys):
    assert refused(capsys, ["show-run"])["code"] == "INPUT_RUN_NOT_FOUND"
    _, second = (out(capsys, TRAIN)["run_id"] for _ in range(2))
    newest = out(capsys, ["list-runs", "--limit", "1"])
    assert out(capsys, ["show-run"])["record"]["run_id"] == newest["runs"][0]["run_id"] == second
    assert newest["total"] == 2
    assert refused(capsys, ["list-runs", "--limit", "-1"])["code"] == "INPUT_COMMAND_LINE"


def test_ways_out_name_the_output_folder(place, capsys):
    assert run(["list-runs", "--output", "o o"]) == 0
    assert "--output 'o o'" in capsys.readouterr().out
    done = out(capsys, [*TRAIN, "--output", "o o"])["run_id"]
    assert "--output 'o o' --override" in refused(capsys, ["resume", done, "--output", "o o"])["fix"]
    other = out(capsys, [*TRAIN, "--output", "o o"])["run_id"]
    error = refused(capsys, ["show-run", "2", "--output", "o o"])
    assert error["cause"] == ", ".join(sorted((done, other)))


def test_a_record_has_all_that_the_run_was_made_of(place, capsys, monkeypatch):
    monkeypatch.setenv("BACKPROPAGATE_LORA__R", "4")
    (place / "backpropagate.toml").write_text("[training]\nseed = 7\n")
    record = out(capsys, ["show-run", out(capsys, TRAIN)["run_id"]])["record"]
    assert record["settings"].keys() == all_settings().keys()
    assert {entry["source"] for entry in record["settings"].values()} == {"flag", "env", "toml", "default"}
    assert (record["settings"]["lora.r"]["value"], record["settings"]["training.seed"]["value"]) == (4, 7)
    assert {"python", "backpropagate", "bp-runs", "torch", "transformers", "numpy"} <= record["versions"].keys()
    assert {"system", "machine", "cores", "memory", "device", "device_facts"} <= record["hardware"].keys()
    assert {"sha256", "template", "template_sha256", "revision"} <= record["data"].keys()
    assert {"name", "revision", "config_sha256", "dtype", "device"} <= record["model"].keys()
    whole = json.loads((place / "output/runs" / record["run_id"] / "run.json").read_bytes())
    assert whole["process_started"] == process_birth(whole["pid"])
    assert (whole["host"], whole["cwd"]) == (platform.node(), str(place))


def test_a_run_cut_off_before_its_first_checkpoint_begins_again_under_its_id(place, capsys):
    run_id = cut_at(3)
    assert out(capsys, ["resume"])["run_id"] == run_id
    assert losses(run_id) == CURVE


@pytest.mark.parametrize("automatic", [False, True])
def test_changed_data_stops_resume_and_begins_anew_by_itself(place, capsys, automatic):
    run_id = cut_at(9)
    before = STORE.load(run_id)
    (place / "d.jsonl").write_text('{"text": "c"}\n{"text": "d"}\n')
    if automatic:
        assert out(capsys, TRAIN)["run_id"] != run_id
    else:
        error = refused(capsys, ["resume"])
        assert error["code"] == "INPUT_RESUME_CHANGED"
        assert "sha256" in error["cause"]
        assert f"backprop replay {run_id} --output output" in error["fix"]
    assert STORE.load(run_id) == before


def test_a_changed_model_is_refused(place):
    run_id = cut_at(9)
    STORE.update(run_id, lambda record: record.model.update(config_sha256="other"))
    with pytest.raises(ResumeChangedError, match="base model changed"):
        Trainer().resume(run_id)


def test_a_damaged_checkpoint_is_passed_over_and_told(place, capsys):
    run_id = cut_at(16)
    newest = CheckpointFolder(STORE.folder(run_id)).read()[0].path
    (newest / "weights.bin").write_bytes(b"x")
    assert run(["resume"]) == 0
    text = capsys.readouterr().out
    assert f"the checkpoint {newest.name} is passed over: weights.bin is not what was saved" in text
    assert "goes on from step 7" in text
    assert losses(run_id) == CURVE
    told = out(capsys, ["show-run", run_id])
    assert told["damaged"] == {newest.name: "weights.bin is not what was saved"}
    assert newest.name not in str(told["checkpoints"])
    assert run(["show-run", run_id]) == 0
    assert f"damaged   the checkpoint {newest.name}: weights.bin is not" in capsys.readouterr().out


def test_no_whole_checkpoint_has_its_code(place, capsys):
    run_id = cut_at(9)
    for checkpoint in CheckpointFolder(STORE.folder(run_id)).read():
        (checkpoint.path / "manifest.json").unlink()
    assert refused(capsys, ["resume"])["code"] == "STATE_CHECKPOINT_INVALID"
    assert out(capsys, TRAIN)["run_id"] != run_id, "the same command is not stopped by it"


def test_what_cannot_go_on_says_why(place, capsys):
    assert refused(capsys, ["resume"])["code"] == "INPUT_RESUME_NOT_FOUND"
    done = out(capsys, TRAIN)["run_id"]
    assert "is finished" in refused(capsys, ["resume", done])["message"]
    with rails.use(FakeRail(fail_at=9, failure=TrainingDivergedError("loss is nan"))):
        assert run([*TRAIN, "--lr", "1"]) == 2
    capsys.readouterr()
    diverged = STORE.list_runs()[0]["run_id"]
    error = refused(capsys, ["resume", diverged])
    assert "diverged" in error["message"]
    assert "replay" in error["fix"]
    assert refused(capsys, ["resume", "zzz"])["code"] == "INPUT_RUN_NOT_FOUND"


def test_ctrl_c_once_saves_and_says_how_to_go_on(place, capsys):
    def interrupt(event):
        if isinstance(event, StepDone) and event.step == 5:
            signal.raise_signal(signal.SIGINT)

    result = Trainer(data="d.jsonl", model="./m", steps=20, interrupts=on_interrupt).train(on_event=interrupt)
    assert (result.record.status, result.outcome.steps) == ("stopped", 5)
    assert [c.reason for c in CheckpointFolder(STORE.folder(result.run_id)).read()] == ["stop"]
    assert run(["show-run", result.run_id]) == 0
    assert f"backprop resume {result.run_id}" in capsys.readouterr().out
    assert out(capsys, ["resume"])["result"]["steps"] == 20
    assert losses(result.run_id) == CURVE


def test_replay_does_it_again_as_a_child(place, capsys):
    first = out(capsys, [*TRAIN, "--lora-r", "4", "--sample-prompt", "hi"])["run_id"]
    second = out(capsys, ["replay", first, "--override", "lr=1e-3", "--override", "lora.alpha=3"])["run_id"]
    record = STORE.load(second)
    assert record.parent == {"run_id": first, "relation": "replay"}
    assert record.settings["training.learning_rate"] == {"value": 1e-3, "source": "override"}
    assert record.settings["lora.r"] == {"value": 4, "source": "record"}
    assert record.settings["training.seed"] == {"value": 42, "source": "default"}
    assert record.setting("training.sample_prompts") == ["hi"]
    found = out(capsys, ["diff-runs", first, second])
    assert found["settings"] == {"lora.alpha": [None, 3.0], "training.learning_rate": [2e-4, 1e-3]}
    assert (found["data"], found["first_different_step"]) == ({}, None)
    assert [step for step, *_ in found["curve"]] == [1, 3, 5, 7, 9, 12, 14, 16, 18, 20]
    assert run(["diff-runs", first, second]) == 0
    assert "equal at every step" in capsys.readouterr().out


def test_a_replay_with_another_method_brings_its_own_rate(place, capsys):
    first = out(capsys, TRAIN)["run_id"]
    second = out(capsys, ["replay", first, "--override", "method=orpo"])["run_id"]
    assert STORE.load(second).setting("training.learning_rate") < 2e-4


@pytest.mark.parametrize(
    ("override", "code"),
    [("lr", "INPUT_COMMAND_LINE"), ("learning=3", "CONFIG_UNKNOWN_SETTING"), ("lora_r=many", "CONFIG_INVALID_SETTING")],
)
def test_a_wrong_override_is_refused(place, capsys, override, code):
    first = out(capsys, TRAIN)["run_id"]
    assert refused(capsys, ["replay", first, "--override", override])["code"] == code
    assert len(STORE.list_runs()) == 1


def test_runs_are_exported(place, capsys):
    ids = [out(capsys, [*TRAIN, "--lora-r", r])["run_id"] for r in ("3", "4")]
    assert out(capsys, ["export-runs", "--to", "all.jsonl", "--metrics"])["runs"] == 2
    lines = [json.loads(line) for line in (place / "all.jsonl").read_text().splitlines()]
    assert [line["run_id"] for line in lines] == ids
    assert lines[0]["schema"] == "backpropagate.exported-run/1"
    assert sum(e["event"] == "step" for e in lines[1]["metrics"]) == 20
    out(capsys, ["export-runs", "--format", "csv", "--to", "all.csv", "--status", "completed"])
    rows = list(csv.DictReader((place / "all.csv").read_text().splitlines()))
    assert (rows[0]["training.sample_prompts"], rows[0]["lora.use_dora"], rows[0]["model.revision"]) == (
        "[]",
        "false",
        "",
    )
    assert [(row["run_id"], row["lora.r"], row["steps"]) for row in rows] == [(ids[0], "3", "20"), (ids[1], "4", "20")]
    assert run(["export-runs"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 2


def test_tags_notes_and_removal(place, capsys):
    first, second = (out(capsys, TRAIN)["run_id"] for _ in range(2))
    assert out(capsys, ["runs", "tag", first, "good", "pirate"])["tags"] == ["good", "pirate"]
    assert out(capsys, ["runs", "tag", first, "good", "--remove"])["tags"] == ["pirate"]
    assert [r["run_id"] for r in out(capsys, ["list-runs", "--tag", "pirate"])["runs"]] == [first]
    assert out(capsys, ["runs", "note", first, "the one we ship"])["note"] == "the one we ship"
    assert run(["show-run", first]) == 0
    text = capsys.readouterr().out
    assert "the one we ship" in text
    assert "pirate" in text
    assert refused(capsys, ["runs", "rm", first, "zzz"])["code"] == "INPUT_RUN_NOT_FOUND"
    assert out(capsys, ["runs", "rm", first, first])["removed"] == [first]
    assert [r["run_id"] for r in out(capsys, ["list-runs"])["runs"]] == [second]
    assert not STORE.folder(first).exists()
    assert (place / "output/lora/adapter_config.json").exists()


def test_a_protected_checkpoint_stays(place, capsys):
    run_id = cut_at(9, keep_checkpoints=1)
    assert out(capsys, ["runs", "protect", run_id, "--step", "7"])["step"] == 7
    out(capsys, ["resume"])
    shown = out(capsys, ["show-run", run_id])["checkpoints"]
    assert [(c["step"], c["protected"]) for c in shown] == [(14, False), (7, True)]
    assert refused(capsys, ["runs", "protect", run_id, "--step", "8"])["code"] == "STATE_CHECKPOINT_INVALID"


OLD = [
    {
        "run_id": "3f2a9c", "timestamp": "2026-05-01T10:00:00", "started_at": "2026-05-01T10:00:00",
        "completed_at": "2026-05-01T11:00:00", "status": "completed", "session_kind": "single_run",
        "model_name": "Qwen/Qwen2.5-7B-Instruct", "dataset_info": "pirates.jsonl", "dataset_hash": "0123456789abcdef",
        "hyperparameters": {"lora_r": 16, "lora_alpha": 32, "learning_rate": 2e-4, "block_order": "random"},
        "steps": 100, "final_loss": 0.5, "loss_history": [3.0, 1.0, 0.5], "duration_seconds": 3600.0,
        "export_paths": ["out/model.gguf"], "schema_version": "1.0",
    },
    {"run_id": "77b0de", "timestamp": "2026-05-02T10:00:00", "status": "completed", "model_name": "m", "steps": 30,
     "hyperparameters": {}, "final_loss": 0.0, "loss_history": [3.0, 9.0, float("nan")]},
    {"run_id": "masked", "timestamp": "2026-05-03T10:00:00", "status": "completed", "final_loss": 0.0, "loss_history": [3.0, 9.0]},
    {"run_id": "failed", "timestamp": "2026-05-04T10:00:00", "status": "failed", "failure_reason": "CUDA out of memory"},
]  # fmt: skip


def test_the_older_tool_s_history_is_imported_once(place, capsys):
    (place / "output").mkdir()
    (place / "output/run_history.json").write_text(json.dumps(OLD))
    done = out(capsys, ["runs", "import"])
    assert done["imported"] == ["3f2a9c", "77b0de", "masked", "failed"]
    rows = {r["run_id"]: (r["status"], r["final_loss"]) for r in out(capsys, ["list-runs"])["runs"]}
    assert rows == {
        "3f2a9c": ("completed", 0.5),
        "77b0de": ("diverged", None),
        "masked": ("diverged", None),
        "failed": ("failed", None),
    }
    assert out(capsys, ["runs", "import"])["known"] == done["imported"]
    assert json.dumps(json.loads((place / "output/run_history.older.json").read_text())) == json.dumps(OLD)
    shown = out(capsys, ["show-run", "3f2a9c"])
    assert shown["record"]["settings"]["lora.alpha"] == {"value": 32, "source": "import"}
    assert shown["record"]["settings"]["block_order"]["value"] == "random"
    assert [m["loss"] for m in shown["metrics"]] == [3.0, 1.0, 0.5]
    for run_id in rows:
        assert run(["show-run", run_id]) == 0
    capsys.readouterr()
    for command in (["replay", "3f2a9c"], ["resume", "failed"], ["resume"]):
        assert refused(capsys, command)["code"] == "INPUT_RESUME_NOT_FOUND"
    assert run(["show-run", "failed"]) == 0
    shown = capsys.readouterr().out
    assert "go on" not in shown
    assert "rail" not in shown
    assert "ended unknown" in shown
    out(capsys, ["runs", "rm", *rows])


@pytest.mark.parametrize("content", ["", "{", '{"runs": []}', "[3]", '[{"name": "x"}]', "[" * 9999])
def test_a_file_that_is_no_history_is_refused(place, capsys, content):
    (place / "h.json").write_text(content)
    assert refused(capsys, ["runs", "import", "h.json"])["code"] == "INPUT_HISTORY_INVALID"
    assert refused(capsys, ["runs", "import"])["code"] == "INPUT_HISTORY_INVALID"


def test_odd_rows_of_an_older_history(place, capsys):
    rows = r"""[
        {"run_id": "nan", "status": "completed", "loss_history": [3.0, NaN], "timestamp": 1735786800},
        {"run_id": "twice", "status": "running", "model_name": "m"},
        {"run_id": "twice", "status": "completed", "final_loss": 0.5, "steps": 4, "model_name": null},
        {"run_id": "../up", "status": "failed", "model_name": 5, "dataset_info": {"a": 1}},
        {"model_name": "no id", "status": "completed"},
        {"run_id": 7, "loss_history": [1, null, "x", 2], "status": null, "steps": 1e400, "timestamp": "never"},
        {"run_id": "odd", "final_loss": "x", "hyperparameters": [1], "export_paths": "a", "duration_seconds": true,
         "steps": 99999999999999999999, "failure_reason": "\ud800", "timestamp": "0001-01-01", "status": "completed"},
        5, {"name": "no run"}
    ]"""
    (place / "h.json").write_text("\ufeff" + rows, encoding="utf-8")
    done = out(capsys, ["runs", "import", "h.json"])
    assert done["left_out"] == ["h.json, row 8", "h.json, row 9"]
    found = {r["run_id"]: r for r in out(capsys, ["list-runs"])["runs"]}
    assert found.keys() == set(done["imported"])
    made = sorted(run_id for run_id in found if run_id.startswith("older-"))
    assert {run_id: found[run_id]["status"] for run_id in found.keys() - set(made)} == {
        "nan": "diverged", "twice": "completed", "7": "failed", "odd": "completed",
    }  # fmt: skip
    assert (found["twice"]["model"], found["twice"]["final_loss"], found["odd"]["final_loss"]) == ("m", 0.5, None)
    assert found["nan"]["created_at"] == "2025-01-02T03:00:00.000+00:00"
    notes = [out(capsys, ["show-run", run_id])["record"]["note"] for run_id in made]
    assert sorted(note.rpartition(" ")[2] for note in notes) == ["'../up'", "None"]
    for run_id in found:
        assert run(["show-run", run_id]) == 0
    capsys.readouterr()
    again = out(capsys, ["runs", "import", "h.json"])
    assert (again["imported"], set(again["known"])) == ([], found.keys())


def test_an_older_history_is_never_overwritten_by_a_run(place, capsys):
    (place / "output").mkdir()
    (place / "output/run_history.json").write_text(json.dumps(OLD))
    out(capsys, TRAIN)
    assert (place / "output/run_history.older.json").exists()
    assert len(out(capsys, ["runs", "import"])["imported"]) == 4


@pytest.fixture
def hub(place, monkeypatch):
    """A model of the Hub in this machine's cache, whose branch main can be moved; the network is off."""
    from huggingface_hub import constants

    cache = place / "hub" / "models--owner--m"
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(place / "hub"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")

    def move(commit):
        snapshot = cache / "snapshots" / commit
        snapshot.mkdir(parents=True, exist_ok=True)
        (snapshot / "config.json").write_text(json.dumps({"made": commit[0]}))
        (snapshot / "model.safetensors").write_bytes(b"")
        (cache / "refs").mkdir(exist_ok=True)
        (cache / "refs" / "main").write_text(commit)
        return commit

    return move


@pytest.mark.parametrize("how", ["resume", "automatic", "replay", "replay of another model"])
def test_a_run_goes_on_with_the_commit_of_its_base_though_the_branch_has_moved(hub, how):
    old = hub("a" * 40)
    run_id = cut_at(9, model="owner/m")
    new = hub("b" * 40)
    done = {
        "resume": lambda: Trainer().resume(run_id),
        "automatic": lambda: Trainer("owner/m").train("d.jsonl", steps=20, save_steps=7),
        "replay": lambda: Trainer().replay(run_id),
        "replay of another model": lambda: Trainer().replay(run_id, overrides={"model.revision": "main"}),
    }[how]()
    assert STORE.load(done.run_id).model["revision"] == (new if "another" in how else old)
    assert (done.run_id == run_id) == ("replay" not in how)
    assert STORE.load(done.run_id).setting("model.revision") == ("main" if "another" in how else None)


def test_a_multi_run_goes_on_with_the_commit_of_its_base(hub):
    (Path("d.jsonl")).write_text("".join(f'{{"text": "row {i}"}}\n' for i in range(60)))
    old = hub("a" * 40)

    def on_event(event):
        if isinstance(event, StepDone) and len(STORE.list_runs()) == 3:
            raise Cut

    with pytest.raises(Cut):
        Trainer("owner/m", steps=3).multi_run("d.jsonl", runs=2, on_event=on_event)
    hub("b" * 40)
    whole = [row["run_id"] for row in STORE.list_runs() if row["kind"] == "multi-run"]
    result = Trainer("owner/m", steps=3).multi_run(resume=whole[0])
    assert [STORE.load(member).model["revision"] for member in result.members] == [old, old]


def tear(run_id):
    file = STORE.folder(run_id) / "run.json"
    file.write_bytes(file.read_bytes()[:-40])


@pytest.mark.parametrize("automatic", [True, False])
def test_other_weights_under_the_same_config_are_refused(place, capsys, automatic):
    run_id = cut_at(9)
    (place / "m/model.safetensors").write_bytes(b"other weights")
    if automatic:
        assert out(capsys, TRAIN)["run_id"] != run_id
    else:
        error = refused(capsys, ["resume"])
        assert (error["code"], error["message"]) == (
            "INPUT_RESUME_CHANGED",
            "the base model changed since the run began",
        )
        assert f"backprop replay {run_id}" in error["fix"]
        shown = out(capsys, ["replay", run_id])["run_id"]
        notices = [e["message"] for e in STORE.read_metrics(shown) if e["event"] == "notice"]
        assert any(f"changed since the run {run_id}, so the result will differ" in text for text in notices)
    assert STORE.load(run_id).status == "interrupted"
    (place / "m/model.safetensors").write_bytes(b"")
    assert out(capsys, ["resume", run_id])["run_id"] == run_id


@pytest.mark.parametrize("how", [["resume"], ["resume", "RUN"], TRAIN, [*TRAIN, "--resume"]])
def test_a_damaged_record_is_rebuilt_and_no_older_run_taken(place, capsys, caplog, how):
    older = cut_at(9, **({"seed": 3} if how == TRAIN else {}))
    run_id = cut_at(8, resume=False)
    tear(run_id)
    done = out(capsys, [run_id if word == "RUN" else word for word in how])
    assert (done["run_id"], done["status"]) == (run_id, "completed")
    assert losses(run_id) == CURVE
    assert "run.json was damaged" in caplog.text
    assert STORE.load(older).status == "interrupted"
    assert "Rebuilt from checkpoints/step-000007" in STORE.load(run_id).note


def test_a_damaged_record_without_a_checkpoint_is_named(place, capsys, caplog):
    older, run_id = cut_at(9), cut_at(2, resume=False)
    tear(run_id)
    error = refused(capsys, ["resume"])
    assert error["code"] == "STATE_RECORD_INVALID"
    assert f"backprop runs rm {run_id}" in error["fix"]
    assert f"resume the older run: backprop resume {older}" in error["fix"]
    assert out(capsys, TRAIN)["run_id"] == older
    assert f"the record of the run {run_id} is damaged; if it was this run, it is not resumed" in caplog.text


@pytest.mark.parametrize("how", [["resume"], ["train", "--resume"]])
def test_resume_next_to_a_run_at_work_names_it(place, capsys, how):
    older = cut_at(9)
    with pytest.raises(KeyboardInterrupt), STORE.start(settings={}, rail="fake") as alive:
        error = refused(capsys, how)
        assert error["code"] == "STATE_RUN_ACTIVE"
        process = f"process {os.getpid()} on {platform.node()}"
        assert error["message"] == f"the run {alive.run_id} is being trained right now by {process}"
        assert f"backprop show-run {alive.run_id}" in error["fix"]
        assert f"kill -INT {os.getpid()}" in error["fix"]
        assert f"backprop resume {older}" in error["fix"]
        STORE.update(alive.run_id, lambda record: setattr(record, "host", "elsewhere"))
        assert "--take-over" in refused(capsys, how)["fix"]
        raise KeyboardInterrupt


def test_after_the_clock_went_back_the_last_run_is_resumed(place, capsys, monkeypatch):
    first = cut_at(9)
    run_id = cut_at(8, resume=False)
    newer, older = STORE.folder(run_id), STORE.folder(run_id).with_name("19990101-000000-aaaaaa")
    newer.rename(older)
    file = older / "run.json"
    told = json.loads(file.read_text()) | {"run_id": older.name, "created_at": "1999-01-01T00:00:00+00:00"}
    file.write_text(json.dumps(told))
    assert [row["run_id"] for row in out(capsys, ["list-runs"])["runs"]] == [older.name, first]
    assert out(capsys, ["resume"])["run_id"] == older.name


@pytest.mark.parametrize("code", [code for code, kind in registered_codes().items() if "RUN" in kind.default_fix])
def test_no_printed_hint_says_run_where_it_means_a_run(place, capsys, code):
    failure = registered_codes()[code]("it went wrong")
    with rails.use(FakeRail(fail_at=2, failure=failure)):
        assert run([*TRAIN, "--no-resume"]) != 0
    (row, *_) = STORE.list_runs()
    hint = next(line for line in capsys.readouterr().err.splitlines() if line.startswith("  Fix:"))
    assert row["run_id"] in hint
    assert "RUN" not in hint
    assert row["run_id"] in STORE.load(row["run_id"]).error["fix"]
