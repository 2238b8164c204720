"""Every line of a run's log says which run it belongs to, whatever becomes of the run; and none holds a secret."""

import io
import json
import logging
import re
import threading
from pathlib import Path

import pytest

from backpropagate import Trainer, rails
from backpropagate.cli.app import run
from backpropagate.logs import ConsoleFormatter, JsonFormatter
from bp_runs.errors import DiskFullError
from bp_runs.events import StepDone
from bp_runs.redact import MASK
from bp_runs.store import RunStore
from bp_runs.testing import FakeRail

pytestmark = pytest.mark.usefixtures("own_logs")
CONSOLE = re.compile(r"\d\d:\d\d:\d\d (DEBUG|INFO|WARNING|ERROR) ([\w.]+) \[([^\]]*)\] (.*)")


@pytest.fixture
def train(pico_model, chat_file, tmp_path, monkeypatch):
    """The words of a real training of six steps, with a validation and a checkpoint."""
    monkeypatch.chdir(tmp_path)
    few = ["--steps", "6", "--eval-share", "0.25", "--eval-min-rows", "1", "--eval-steps", "3", "--save-steps", "3"]
    asked = ["--sample-prompt", "who are you", "--sample-tokens", "3", "--report-to", "none"]
    return ["train", "--data", str(chat_file), "--model", str(pico_model), *few, *asked]


def newest(output="output") -> str:
    return RunStore(Path(output)).list_runs()[0]["run_id"]


def of_the_run(lines: list[dict]) -> list[dict]:
    """Lines from the run's beginning on; those before stand outside any run, and say so."""
    begin = next(place for place, line in enumerate(lines) if line["message"] == "the run begins")
    assert {line["run_id"] for line in lines[:begin]} <= {"-"}
    return lines[begin:]


def read_json(text: str) -> list[dict]:
    return [json.loads(line) for line in text.splitlines()]  # whatever is no JSON line fails here


def test_each_line_of_a_real_run_as_json_lines(train, capsys):
    assert run([*train, "--log-level", "DEBUG", "--log-format", "json", "--log-file", "log.jsonl"]) == 0
    shown, kept = capsys.readouterr().err, Path("log.jsonl").read_text()
    lines = of_the_run(read_json(shown))
    assert read_json(kept)[-1] == lines[-1]
    assert {line["run_id"] for line in lines} == {newest()}
    assert {line["run_id"] for line in of_the_run(read_json(kept))} == {newest()}
    assert [line["step"] for line in lines if line.get("event") == "step"] == [1, 2, 3, 4, 5, 6]
    assert {"data", "model", "eval", "checkpoint", "adapter", "sample"} <= {line.get("event") for line in lines}
    assert lines[-1]["message"] == "the run ends"
    assert {line["level"] for line in lines} == {"DEBUG", "INFO"}, "a notice's own level takes no line's place"


def test_each_line_of_a_real_run_on_the_console(train, capsys):
    assert run([*train, "--verbose"]) == 0
    lines = [CONSOLE.fullmatch(line) for line in capsys.readouterr().err.splitlines()]
    assert all(lines), "a line that is no log line"
    lines = of_the_run([{"run_id": line[3], "message": line[4]} for line in lines])
    assert {line["run_id"] for line in lines} == {newest()}
    said = " ".join(line["message"] for line in lines)
    assert "data: " in said
    assert "step: " not in said, "steps are for DEBUG"


def test_each_line_of_a_real_run_that_fails(train, capsys):
    assert run([*train, "--lr", "1e30", "--log-level", "DEBUG", "--log-format", "json", "--log-file", "l.jsonl"]) == 2
    shown = of_the_run(read_json(capsys.readouterr().err))
    kept = of_the_run(read_json(Path("l.jsonl").read_text()))
    assert {line["run_id"] for line in shown + kept} == {newest()}
    for last in (shown[-1], kept[-1]):
        assert last["level"] == "ERROR"
        assert last["error"]["code"] == "RUNTIME_TRAINING_DIVERGED"
    assert shown[-1]["error"]["details"]["run_id"] == newest()


def test_an_error_is_told_once_on_the_console(train, capsys):
    with rails.use(FakeRail(fail_at=3, failure=DiskFullError("no room"))):
        assert run([*train, "--verbose"]) == 2
    assert capsys.readouterr().err.count("no room") == 1


def test_the_error_s_document_names_the_run(train, capsys):
    with rails.use(FakeRail(fail_at=3, failure=DiskFullError("no room"))):
        assert run([*train, "--json"]) == 2
    assert json.loads(capsys.readouterr().out)["error"]["details"]["run_id"] == newest()


def test_a_traceback_s_lines_and_those_of_other_threads_belong_to_the_run(train, capsys, tmp_path):
    def on_event(event):
        if not isinstance(event, StepDone) or event.step != 3:
            return
        thread = threading.Thread(target=logging.getLogger("somebody").error, args=("from aside",))
        thread.start()
        thread.join()
        raise RuntimeError("a show that breaks")

    from backpropagate.logs import install_handlers

    install_handlers("INFO", file=str(tmp_path / "l.jsonl"))
    Trainer(train[4], output=tmp_path / "o", rail=FakeRail(), steps=5, report_to="none").train(
        train[2], on_event=on_event
    )
    text = capsys.readouterr().err
    lines = [CONSOLE.fullmatch(line) for line in text.splitlines()]
    before = [line for line in lines if line[3] == "-"]
    assert all("certif" in line[0] for line in before), "what is known of the model's class, before there is a run"
    assert {line[3] for line in lines if line not in before} == {newest(tmp_path / "o")}
    for said in ("from aside", "Traceback (most recent call last)", "RuntimeError: a show that breaks"):
        assert said in text
    written = read_json((tmp_path / "l.jsonl").read_text())[len(before) :]
    assert {line["run_id"] for line in written} == {newest(tmp_path / "o")}


def test_lines_of_a_multi_run_are_its_own_or_a_member_s(train, capsys, tmp_path):
    with rails.use(FakeRail()):
        assert (
            run(
                [
                    "multi-run",
                    *train[1:5],
                    "--runs",
                    "2",
                    "--steps",
                    "2",
                    "--log-level",
                    "DEBUG",
                    "--log-format",
                    "json",
                ]
            )
            == 0
        )
    lines = of_the_run(read_json(capsys.readouterr().err))
    rows = RunStore(Path("output")).list_runs()
    kinds = {row["run_id"]: row["kind"] for row in rows}
    assert {line["run_id"] for line in lines} == set(kinds)
    assert {kinds[line["run_id"]] for line in lines if line.get("event") == "step"} == {"train"}
    assert {kinds[line["run_id"]] for line in lines if "is taken in" in line["message"]} == {"multi-run"}


def test_a_run_that_fails_with_secrets_leaves_none_in_any_file(train, capsys, tmp_path, monkeypatch):
    """In its settings, its command, its rows' names, a chain of errors, notices and answers."""
    names = ("prompt", "name", "cause", "message", "chain", "detail", "notice")
    secrets = {name: f"hf_{name}" + "a1B2c3" * 5 for name in names}

    class Leaky(FakeRail):
        def train(self, spec, emit, stop):
            from bp_runs.events import Notice

            emit(Notice(message=f"asked with {secrets['notice']}", level="warning"))
            try:
                raise KeyError(secrets["chain"])
            except KeyError as error:
                cause, details = f"Bearer {secrets['cause']}", {"headers": {"token": secrets["detail"]}}
                raise DiskFullError(
                    f"no room at https://u:{secrets['message']}@x", cause=cause, details=details
                ) from error

    monkeypatch.setenv("BACKPROPAGATE_HOME", str(tmp_path / "home"))
    argv = [*train, "--sample-prompt", secrets["prompt"], "--run-name", secrets["name"], "--log-level", "DEBUG"]
    monkeypatch.setattr("sys.argv", ["backprop", *argv])
    with rails.use(Leaky()):
        assert run([*argv, "--log-file", "log.jsonl"]) == 2
        assert run([*argv, "--log-file", "log.jsonl", "--log-format", "json", "--json"]) == 2
    shown = capsys.readouterr()
    texts = {"stdout": shown.out, "stderr": shown.err}
    texts |= {str(file): file.read_text(errors="replace") for file in tmp_path.rglob("*") if file.is_file()}
    assert any("run.json" in name for name in texts)
    found = {(name, place) for name, secret in secrets.items() for place, text in texts.items() if secret in text}
    assert not found
    assert "[redacted]" in texts["stderr"]


def test_logs_of_a_chain_in_both_forms():
    secret = "hf_" + "a1B2c3" * 6
    for formatter in (ConsoleFormatter(), JsonFormatter()):
        stream = io.StringIO()
        handler = logging.StreamHandler(stream)
        handler.setFormatter(formatter)
        log = logging.getLogger("secrets-test")
        log.handlers[:] = [handler]
        log.propagate = False
        try:
            try:
                raise KeyError(secret)
            except KeyError as error:
                raise ValueError(f"with {secret}") from error
        except ValueError:
            log.exception("asked %s with %r", secret, {"token": secret})
        assert secret not in stream.getvalue()
        assert MASK in stream.getvalue()
        assert "ValueError" in stream.getvalue()
