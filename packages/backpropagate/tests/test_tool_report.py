"""A bug report holds what helps, and nothing that is the user's own."""

import getpass
import json
import platform
import re
import zipfile
from pathlib import Path

import pytest

from backpropagate import Trainer
from backpropagate.cli.app import run
from bp_runs.errors import RunNotFoundError
from bp_runs.store import RunStore
from bp_runs.testing import FakeRail

SECRET = "hf_" + "a" * 34
OWN = ("captain of the ship", "my private note", "my-tag-word", "my run name", SECRET)


@pytest.fixture
def run_id(tmp_path, monkeypatch, pico_model):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("BACKPROPAGATE_HOME", str(tmp_path / "home"))
    crash = tmp_path / "home" / "crashes" / "20260101-000000.txt"
    crash.parent.mkdir(parents=True)
    crash.write_text(f"Traceback in {tmp_path}/x.py: token={SECRET}")
    rows = [{"prompt": "who are you", "completion": OWN[0]}] * 12
    trainer = Trainer(
        str(pico_model), output="out", rail=FakeRail(), steps=2, report_to="none", run_name=OWN[3], sample_prompts=[OWN[0]],
        command=["backprop", "train", "--sample-prompt", OWN[0]],
    )  # fmt: skip
    result = trainer.train(rows)

    def annotate(record):
        record.note, record.tags = OWN[1], [OWN[2]]

    trainer.runs.update(result.run_id, annotate)
    return result.run_id


def test_it_holds_what_happened_and_nothing_of_the_user(run_id, capsys):
    assert run(["report", run_id[-6:], "--output", "out", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["file"] == f"report-{run_id}.zip"
    with zipfile.ZipFile(told["file"]) as archive:
        parts = {name: archive.read(name).decode() for name in archive.namelist()}
    assert {"README.txt", "run.json", "metrics.jsonl", "machine.json", "crashes/20260101-000000.txt"} == set(parts)
    record = json.loads(parts["run.json"])
    assert record["run_id"] == run_id
    assert record["settings"]["training.steps"]["value"] == 2
    events = [json.loads(line) for line in parts["metrics.jsonl"].splitlines()]
    assert {"step", "sample"} <= {event["event"] for event in events}
    assert json.loads(parts["machine.json"])["versions"]["backpropagate"]
    whole = "\n".join(parts.values())
    for own in (*OWN, str(Path.home())):
        assert own not in whole, own
    assert not re.search(rf"\b{re.escape(platform.node())}\b", whole)
    if getpass.getuser() not in ("root", "user"):
        assert getpass.getuser() not in whole
    assert "Traceback in ~/x.py" in whole


def test_it_is_written_where_it_is_told(run_id, capsys):
    assert run(["report", run_id, "--output", "out", "--to", "r.zip"]) == 0
    assert "written   r.zip" in capsys.readouterr().out
    assert zipfile.is_zipfile("r.zip")
    assert run(["report", "nope", "--output", "out"]) == RunNotFoundError.exit_status
    assert RunStore(Path("out")).load(run_id).note == OWN[1], "the run itself is left as it is"
