"""The command line from end to end on the fake rail: milliseconds, and every contract but training is real."""

import json
import os
import signal
from pathlib import Path

import pytest

import bp_export
from backpropagate import Trainer, rails
from backpropagate.cli.app import COMMANDS, run
from backpropagate.cli.errors import load_codes
from backpropagate.cli.plots import loss_plot
from bp_runs.errors import TrainingDivergedError
from bp_runs.store import RunStore
from bp_runs.testing import FakeRail


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A working folder with a data file and a model folder that the fake rail does not look into."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "d.jsonl").write_text('{"text": "a"}\n{"text": "b"}\n')
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "config.json").write_text("{}")
    (tmp_path / "m" / "model.safetensors").write_bytes(b"")
    return tmp_path


@pytest.fixture
def fake():
    with rails.use(FakeRail()):
        yield


TRAIN = ["train", "--data", "d.jsonl", "--model", "./m"]


def out(capsys, argv) -> dict:
    assert run([*argv, "--json"]) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    return json.loads(captured.out)


def test_train_list_show_export(place, fake, capsys):
    trained = out(capsys, [*TRAIN, "--steps", "20", "--lora-r", "4", "--sample-prompt", "hi"])
    assert trained["schema"] == "backpropagate.train/1"
    assert trained["status"] == "completed"
    rows = out(capsys, ["list-runs"])["runs"]
    assert [r["run_id"] for r in rows] == [trained["run_id"]]
    shown = out(capsys, ["show-run", trained["run_id"][-6:]])
    assert shown["record"]["settings"]["lora.r"] == {"value": 4, "source": "flag"}
    assert shown["record"]["settings"]["training.batch_size"]["source"] == "default"
    assert shown["record"]["command"][0] == "backprop"
    assert {"python", "bp-runs", "backpropagate"} <= shown["record"]["versions"].keys()
    assert sum(m["event"] == "step" for m in shown["metrics"]) == 20
    exported = out(capsys, ["export", "output/lora", "--format", "lora", "--output", "copy"])
    assert exported["run_id"] == trained["run_id"]
    artifacts = out(capsys, ["show-run", trained["run_id"]])["record"]["artifacts"]
    assert [a["kind"] for a in artifacts] == ["adapter", "lora"]


def test_plain_output_tells_the_loss_and_the_next_command(place, fake, capsys):
    assert run([*TRAIN, "--steps", "30"]) == 0
    text = capsys.readouterr().out
    assert "step      30/30" in text
    assert text.count("  step ") <= 13
    assert "backprop export" in text
    assert run(["show-run", "20"]) == 0
    assert "└───" in capsys.readouterr().out
    assert run(["list-runs"]) == 0
    assert "completed" in capsys.readouterr().out


def test_a_failed_run_is_told_recorded_and_leaves_the_adapter(place, capsys):
    with rails.use(FakeRail()):
        assert run(TRAIN) == 0
    before = (place / "output/lora/run.json").read_bytes()
    capsys.readouterr()
    with rails.use(FakeRail(fail_at=2, failure=TrainingDivergedError("the loss is nan at step 2"))):
        assert run(TRAIN) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("[RUNTIME_TRAINING_DIVERGED]: the loss is nan at step 2\n")
    assert "Fix:" in captured.err
    assert "Traceback" not in captured.err
    assert (place / "output/lora/run.json").read_bytes() == before
    assert [r["status"] for r in RunStore(place / "output").list_runs()] == ["diverged", "completed"]


class InterruptingRail(FakeRail):
    """Sends its own process Ctrl-C at steps 2 … ``until``."""

    until = 2

    def train(self, spec, emit, stop):
        def watch(event):
            emit(event)
            if event.kind == "step" and 2 <= event.step <= self.until:
                os.kill(os.getpid(), signal.SIGINT)

        return FakeRail.train(self, spec, watch, stop if self.until == 2 else lambda: False)


class TwiceInterruptingRail(InterruptingRail):
    until = 3


no_signals = pytest.mark.skipif(os.name == "nt", reason="os.kill ends the process on Windows")


@pytest.fixture
def _at_a_terminal():
    """Ctrl-C acts; a shell lets what it starts in the background ignore it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@no_signals
@pytest.mark.usefixtures("_at_a_terminal")
def test_ctrl_c_twice_ends_at_once_and_is_recorded(place, capsys):
    with rails.use(TwiceInterruptingRail()):
        assert run([*TRAIN, "--steps", "50", "--json"]) == 130
    assert json.loads(capsys.readouterr().out)["error"]["code"] == "RUNTIME_INTERRUPTED"
    [row] = RunStore(place / "output").list_runs()
    assert row["status"] == "interrupted"
    assert not (place / "output/lora").exists()


@no_signals
def test_a_stopped_run_does_not_replace_a_finished_adapter(place, capsys):
    with rails.use(FakeRail()):
        first = out(capsys, [*TRAIN, "--steps", "3"])
    with rails.use(InterruptingRail()):
        assert run([*TRAIN, "--steps", "50", "--json"]) == 130
    stopped = json.loads(capsys.readouterr().out)
    assert json.loads((place / "output/lora/run.json").read_text())["run_id"] == first["run_id"]
    assert Path(stopped["adapter"]).parent.name == stopped["run_id"]
    assert (Path(stopped["adapter"]) / "adapter_config.json").is_file()


def test_a_screen_that_breaks_does_not_cost_the_run(place):
    shown = []

    def show(event):
        shown.append(event)
        raise BrokenPipeError

    result = Trainer("./m", output="o", rail=FakeRail()).train("d.jsonl", steps=3, on_event=show)
    assert (result.record.status, len(shown)) == ("completed", 1)


def test_a_foreign_lora_folder_stops_before_training(place, fake, capsys):
    mine = place / "output/lora/notes.txt"
    mine.parent.mkdir(parents=True)
    mine.write_text("mine")
    assert run(TRAIN) == 1
    assert capsys.readouterr().err.startswith("[INPUT_OUTPUT_TAKEN]")
    assert mine.read_text() == "mine"
    assert not (place / "output/runs").exists()


def test_the_output_folder_is_a_setting_for_every_command(place, fake, capsys, monkeypatch):
    monkeypatch.setenv("BACKPROPAGATE_TRAINING__OUTPUT_DIR", "elsewhere")
    run_id = out(capsys, TRAIN)["run_id"]
    assert [r["run_id"] for r in out(capsys, ["list-runs"])["runs"]] == [run_id]
    assert out(capsys, ["show-run", run_id])["record"]["cwd"] == str(place)


def test_defaults_of_a_caller_are_no_flags(place):
    trainer = Trainer("./m", output="o", rail=FakeRail(), defaults={"steps": 2, "lora_r": 4})
    record = trainer.train("d.jsonl", lora_r=5).record
    assert record.settings["training.steps"] == {"value": 2, "source": "default"}
    assert record.settings["lora.r"] == {"value": 5, "source": "flag"}


@no_signals
def test_ctrl_c_once_saves_and_says_so(place, capsys):
    before = signal.getsignal(signal.SIGINT)
    with rails.use(InterruptingRail()):
        assert run([*TRAIN, "--steps", "50"]) == 130
    assert "stopped after 2 steps" in capsys.readouterr().out
    assert RunStore(place / "output").list_runs()[0]["status"] == "stopped"
    assert (place / "output/lora/adapter_config.json").is_file()
    assert signal.getsignal(signal.SIGINT) is before


def test_settings_from_file_and_environment_are_recorded_with_their_source(place, fake, capsys, monkeypatch):
    (place / "backpropagate.toml").write_text("[training]\nsteps = 3\nseed = 7\n")
    monkeypatch.setenv("BACKPROPAGATE_TRAINING__STEPS", "4")
    run_id = out(capsys, TRAIN)["run_id"]
    settings = out(capsys, ["show-run", run_id])["record"]["settings"]
    assert settings["training.steps"] == {"value": 4, "source": "env"}
    assert settings["training.seed"] == {"value": 7, "source": "toml"}
    assert settings["data.path"] == {"value": "d.jsonl", "source": "flag"}


def test_three_lines_of_python(place):
    trainer = Trainer("./m", output="o", rail=FakeRail())
    result = trainer.train("d.jsonl", steps=3)
    exported = trainer.export("lora", output="copy")
    assert result.outcome.steps == 3
    assert exported.run_id == result.run_id
    assert (place / "copy/adapter_model.safetensors").is_file()


@pytest.mark.parametrize(
    ("argv", "code", "status", "near"),
    [
        (["trian"], "INPUT_COMMAND_LINE", 1, "train"),
        (["train", "--stpes", "3"], "INPUT_COMMAND_LINE", 1, "--steps"),
        (["train", "--steps", "many"], "INPUT_COMMAND_LINE", 1, "--steps"),
        (["train", "--dtype", "int3"], "INPUT_COMMAND_LINE", 1, "bfloat16"),
        (["train"], "INPUT_DATA_MISSING", 1, ""),
        (["train", "--data", "none.jsonl"], "INPUT_DATASET_NOT_FOUND", 1, "none.jsonl"),
        (["train", "--data", "d.jsonl", "--model", "./none"], "INPUT_MODEL_NOT_FOUND", 1, "./none"),
        (["train", "--data", "d.jsonl", "--model", "d.jsonl"], "INPUT_MODEL_INVALID", 1, "d.jsonl"),
        (["train", "--data", "d.jsonl", "--model", "."], "INPUT_MODEL_INVALID", 1, "config.json"),
        (["train", "--data", "d.jsonl", "--model", "no-such-owner/model"], "DEP_HUB_UNREACHABLE", 2, "offline"),
        (["train", "--data", "d.jsonl", "--model", "a b/c!"], "INPUT_MODEL_NOT_FOUND", 1, ""),
        ([*TRAIN, "--backend", "tpu"], "CONFIG_UNKNOWN_BACKEND", 1, "fake"),
        (["train", "--data", "~no-such-user/d.jsonl"], "INPUT_PATH_UNUSABLE", 1, "no-such-user"),
        (["train", "--data", "d" * 300], "INPUT_PATH_UNUSABLE", 1, "too long"),
        (["list-runs", "--output", "~no-such-user"], "INPUT_PATH_UNUSABLE", 1, "no-such-user"),
        ([*TRAIN, "--seed", "-1"], "CONFIG_INVALID_SETTING", 1, "seed"),
        ([*TRAIN, "--lora-r", "0"], "CONFIG_INVALID_SETTING", 1, "lora.r"),
        ([*TRAIN, "--output", "d.jsonl"], "INPUT_OUTPUT_NOT_WRITABLE", 1, "d.jsonl"),
        (["show-run", "zzz"], "INPUT_RUN_NOT_FOUND", 1, "zzz"),
        (["export", "none"], "INPUT_RUN_NOT_FOUND", 1, "there is no folder none, and no run matches"),
        (["export", "m", "--format", "merged", "--ollama"], "CONFIG_INVALID_SETTING", 1, "gguf"),
        (["errors", "INPUT_NONE"], "INPUT_COMMAND_LINE", 1, ""),
    ],
)  # fmt: skip
def test_bad_input_has_a_code_a_fix_and_leaves_runs_alone(place, fake, capsys, argv, code, status, near):
    assert run(TRAIN) == 0
    capsys.readouterr()
    before = {p: p.read_bytes() for p in (place / "output").rglob("*") if p.is_file()}
    assert run(argv) == status
    plain = capsys.readouterr()
    assert plain.err.startswith(f"[{code}]: ")
    assert "  Fix:   " in plain.err
    assert "Traceback" not in plain.err
    assert near in plain.err
    assert run([*argv, "--json"]) == status
    error = json.loads(capsys.readouterr().out)["error"]
    assert (error["code"], error["exit_status"]) == (code, status)
    assert code in load_codes()
    after = {p: p.read_bytes() for p in (place / "output").rglob("*") if p.is_file()}
    assert after == before


def test_an_unusable_rail_says_why(place, capsys):
    with rails.use(FakeRail(usable=False)):
        assert run(TRAIN) == 2
    assert "told so by the test" in capsys.readouterr().err
    assert not (place / "output").exists()


def test_a_bug_keeps_its_traceback_in_a_file(place, capsys, monkeypatch):
    class Broken(FakeRail):
        def train(self, spec, emit, stop):
            raise ZeroDivisionError("secret hf_" + "a1B2" * 8)

    with rails.use(Broken()):
        assert run(TRAIN) == 2
    error = capsys.readouterr().err
    assert error.startswith("[RUNTIME_BUG]: ZeroDivisionError")
    file = next((Path(os.environ["BACKPROPAGATE_HOME"]) / "crashes").glob("*.txt"))
    assert "Traceback" in file.read_text()
    assert "hf_a1" not in error + file.read_text()
    assert RunStore(place / "output").list_runs()[0]["status"] == "failed"


def test_help_fits_80_columns_and_shows_an_example(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    for command in COMMANDS:
        assert run([*command.name.split(), "--help"]) == 0
        text = capsys.readouterr().out
        assert command.example.split()[1] in text
        assert max(map(len, text.splitlines())) <= 80


def test_codes_are_explained(capsys):
    assert run(["errors", "input_data_missing"]) == 0
    assert "exit 1" in capsys.readouterr().out
    listed = out(capsys, ["errors"])["errors"]
    assert len(listed) == len(load_codes()) > 30


def test_info_names_rails_and_versions(fake, capsys):
    found = out(capsys, ["info"])
    assert found["rails"][0]["name"] == "fake"
    assert found["versions"]["backpropagate"]
    assert found["kernels"] == bp_export.quant.describe_kernels()
    assert run(["info"]) == 0
    assert "told so by the test" in capsys.readouterr().out


def test_loss_plot():
    assert loss_plot([1.0]) == ""
    lines = loss_plot([4.0, 2.0, 1.0], height=4).splitlines()
    assert "4.00 │█" in lines[0]
    assert lines[-1].endswith("step 3")
    assert len(loss_plot([float(i) for i in range(500)]).splitlines()[0]) < 80


@pytest.mark.parametrize(("given", "address"), [("", None), ("0.0.0.0:11500", "http://127.0.0.1:11500")])
def test_ollama_s_own_variable_names_the_server(given, address):
    from backpropagate.exporting import read_ollama_host

    assert read_ollama_host({"OLLAMA_HOST": given}) == address


def test_what_is_no_address_of_ollama_is_refused(monkeypatch, capsys):
    monkeypatch.setenv("OLLAMA_HOST", "ftp://box")
    assert run(["ollama", "list"]) == 1
    assert "invalid value for OLLAMA_HOST" in capsys.readouterr().err


def test_an_export_survives_a_record_that_cannot_be_written(place, fake, capsys):
    out(capsys, [*TRAIN, "--steps", "2"])
    (place / "output/.run_history.lock").unlink()
    (place / "output/.run_history.lock").mkdir()
    assert run(["export", "--format", "lora", "--output", "copy"]) == 0
    assert (place / "copy/adapter_config.json").is_file()
