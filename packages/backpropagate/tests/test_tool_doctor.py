"""`backprop doctor` and `info`: every check says how to mend what it finds."""

import json
import os
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from backpropagate import doctor, rails
from backpropagate.cli.app import run
from backpropagate.cli.hint_wording import CommandLineWording
from bp_runs.errors import DiskFullError
from bp_runs.rail import Check, ChecksMachine, Finding
from bp_runs.testing import FakeRail
from bp_runs.wording import render


class CheckedRail(FakeRail):
    """A rail whose machine lacks things in every way a check can tell it."""

    def checks(self):
        def explode():
            raise RuntimeError("CUDA error: no kernel image is available\nlong tail")

        def refuse():
            raise DiskFullError("no room")

        return (
            Check("fine", lambda: Finding(state="ok", message="as it should be")),
            Check("broken", explode, "Install another driver."),
            Check("coded", refuse),
            Check("odd", lambda: Finding(state="warning", message="no triton", fix="pip install triton")),
        )


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OLLAMA_HOST", "127.0.0.1:9")  # the discard port: nothing answers
    return tmp_path


def test_what_a_check_raises_is_a_finding_with_a_fix(here, capsys):
    assert isinstance(CheckedRail(), ChecksMachine)
    with rails.use(CheckedRail()):
        assert run(["doctor", "--json"]) == 65
        found = {row["name"]: row for row in json.loads(capsys.readouterr().out)["checks"]}
        assert found["broken"] == {
            "name": "broken", "state": "failed", "fix": "Install another driver.",
            "message": "RuntimeError: CUDA error: no kernel image is available"}  # fmt: skip
        assert found["coded"]["fix"] == render(DiskFullError.default_fix, CommandLineWording())
        assert run(["doctor"]) == 65
    shown = capsys.readouterr()
    assert shown.err.startswith("[RUNTIME_DOCTOR_FAILED]: 2 of ")
    assert "FAILED  broken" in shown.out
    assert "Install another driver." in shown.out
    assert "do:" in shown.out


def test_a_machine_that_can_train_passes(here, capsys):
    with rails.use(FakeRail()):
        assert run(["doctor"]) == 0
    text = capsys.readouterr().out
    for name in ("settings", "disk", "page file", "llama.cpp", "certificates", "ollama", "hub", "rail fake"):
        assert f" {name} " in text
    assert "everything that training needs works" in text
    assert "ollama serve" in text or "Ollama" in text


def test_settings_that_cannot_be_read_are_a_failed_check_not_a_crash(here, capsys):
    (here / "backpropagate.toml").write_text("[lora]\nrank = 3\n")
    with rails.use(FakeRail()):
        assert run(["doctor", "--json"]) == 65
        found = json.loads(capsys.readouterr().out)
        assert found["failed"] == ["settings"]
        assert "did you mean 'lora.r'" in found["checks"][0]["message"]
        assert run(["info"]) == 0
    assert "lora.rank" in capsys.readouterr().out


def test_a_disk_that_cannot_be_written(here, monkeypatch):
    file = here / "file"
    file.write_text("")
    found = rails.run_check(doctor.own_checks({"BACKPROPAGATE_HOME": str(file)}, here)[1])
    assert found.state == "failed"
    assert found.fix


@pytest.mark.parametrize(("gib", "state"), [(8, "warning"), (48, "ok")])
def test_windows_page_file(gib, state):
    found = doctor.judge_page_file(gib * 2**30)
    assert found.state == state
    assert f"{gib} GiB" in found.message
    assert (found.fix is not None) == (state == "warning")


@pytest.fixture
def server():
    """A server on this machine that says yes to everything."""

    class Yes(BaseHTTPRequestHandler):
        def do_HEAD(self):
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_):
            pass

    with HTTPServer(("127.0.0.1", 0), Yes) as http:
        thread = threading.Thread(target=http.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{http.server_port}"
        http.shutdown()
        thread.join()


def test_the_hub(server, monkeypatch):
    from huggingface_hub import constants

    assert doctor.check_hub({"BACKPROPAGATE_OFFLINE": "1"}).state == "skipped"
    monkeypatch.setattr(constants, "ENDPOINT", server)
    found = doctor.check_hub({})
    assert (found.state, found.message.startswith("answers with 200")) == ("ok", True)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    found = doctor.check_hub({})
    assert found.state == "warning"
    assert "HTTPS_PROXY" in found.fix


def test_llama_cpp_is_loaded_for_real_and_a_broken_one_is_told(here, monkeypatch):
    assert doctor.check_llama_cpp().state == "ok"
    (here / "xllamacpp.py").write_text("raise ImportError('libgomp.so.1: cannot open shared object file')")
    monkeypatch.setenv("PYTHONPATH", str(here))
    found = doctor.check_llama_cpp()
    assert found.state == "warning"
    assert "libgomp" in found.message
    assert "{install:--force-reinstall xllamacpp}" in found.fix


def test_info_tells_what_was_set_and_no_secrets(here, monkeypatch, capsys):
    monkeypatch.setenv("BACKPROPAGATE_TRAINING__SAMPLE_PROMPTS", "say hf_" + "a1B2" * 8)
    with rails.use(FakeRail()):
        assert run(["info"]) == 0
        text = capsys.readouterr().out
        assert run(["info", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert list(found["settings"]) == ["training.sample_prompts"]
    assert "training.sample_prompts = " in text
    assert "hf_a1B2" not in text + json.dumps(found)
    assert os.environ["BACKPROPAGATE_HOME"] in text
