"""Data sets by name from the command line to the run's record, on the fake rail."""

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from backpropagate import rails
from backpropagate.cli.app import run
from backpropagate.ui.folders import find_places
from backpropagate.ui.local_models import find_local_models
from backpropagate.ui_spec import UiSpec
from bp_runs.testing import FakeRail

FAKE = Path(__file__).parents[2] / "bp-data" / "tests" / "fake_hub.py"
_spec = importlib.util.spec_from_file_location("bp_data_fake_hub", FAKE)
fake_hub = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(fake_hub)

TRAIN = """
import sys
from backpropagate import rails
from backpropagate.cli.app import run
from backpropagate.ui.folders import find_places
from backpropagate.ui.local_models import find_local_models
from backpropagate.ui_spec import UiSpec
from bp_runs.testing import FakeRail

with rails.use(FakeRail()):
    sys.exit(run(sys.argv[1:]))
"""


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("BACKPROPAGATE_HOME", str(tmp_path / "home"))
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "config.json").write_text("{}")
    (tmp_path / "m" / "model.safetensors").write_bytes(b"")
    for name in ("train", "test"):
        (tmp_path / "chats" / "data").mkdir(parents=True, exist_ok=True)
        (tmp_path / "chats" / "data" / f"{name}.jsonl").write_text(json.dumps({"prompt": "Q", "completion": name}))
    return tmp_path


def test_a_run_records_the_commit_of_its_data_set(place):
    with fake_hub.serve() as (url, _):
        environ = {**os.environ, "HF_ENDPOINT": url, "HF_HOME": str(place / "hf"), "HF_HUB_OFFLINE": "0"}
        argv = ["train", "--data", "owner/chats", "--subset", "de", "--model", "./m", "--steps", "2", "--json"]
        done = subprocess.run(
            [sys.executable, "-c", TRAIN, *argv], env=environ, capture_output=True, text=True, timeout=240, check=False
        )
    assert done.returncode == 0, done.stderr
    run_id = json.loads(done.stdout)["run_id"]
    record = json.loads((place / "output" / "runs" / run_id / "run.json").read_text())
    assert record["data"]["path"] == "owner/chats"
    assert record["data"]["revision"] == fake_hub.NEW
    assert record["data"]["read"] == 1
    assert record["settings"]["data.subset"] == {"value": "de", "source": "flag"}
    assert str(place) not in json.dumps(record["data"])


def test_a_folder_with_splits_is_reported_and_trained_by_split(place, capsys, caplog):
    with rails.use(FakeRail()):
        assert run(["train", "--data", "./chats", "--split", "test", "--model", "./m", "--steps", "1", "--json"]) == 0
    capsys.readouterr()
    assert run(["data", "convert", "./chats", "--split", "test", "--to", "messages", "-o", "o.jsonl"]) == 0
    assert '"test"' in (place / "o.jsonl").read_text()
    assert run(["data", "report", "./chats", "--json"]) == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out[captured.out.index("{") :])["rows"] == 1, "without a split, not the test file"
    assert "not read: data/test.jsonl (for tests or validation, by its name)" in caplog.text


@pytest.mark.parametrize(
    ("argv", "code"),
    [
        (["chats/data/test.jsonl", "--split", "test"], "CONFIG_INVALID_SETTING"),
        (["./chats", "--data-revision", "main"], "CONFIG_INVALID_SETTING"),
        (["./chats", "--split", "dev"], "INPUT_DATASET_PART_UNKNOWN"),
        (["missing.jsonl"], "INPUT_DATASET_NOT_FOUND"),
        (["owner/chats", "--offline"], "DEP_DATASET_UNREACHABLE"),
    ],
)
def test_what_cannot_be_found_is_told(place, capsys, argv, code):
    assert run(["data", "report", *argv]) in (1, 2)
    assert f"[{code}]" in capsys.readouterr().err


DOWNLOAD = """
import json, sys
from backpropagate import downloads
from backpropagate.cli import output
from backpropagate.cli.app import run

downloads._REPORT_SECONDS = 0.05
output.ByteLines.every = 0.0
for words in json.loads(sys.argv[1]):
    print(json.dumps(run(words)), flush=True)
"""


def test_a_model_is_downloaded_with_progress_listed_and_removed(place, monkeypatch, capsys):
    """Against a Hub on this machine; in one process, since importing the Hub's library is most of the time."""
    weights = {"config.json": b"{}", "model.safetensors": b"w" * 3_000_000, "original/model.safetensors": b"twice"}
    monkeypatch.setitem(fake_hub.FILES, fake_hub.NEW, fake_hub.FILES[fake_hub.NEW] | weights)
    monkeypatch.setenv("HF_HOME", str(place / "hf"))
    calls = [["download", "owner/chats", "--json"], ["download", "owner/chats"], ["download", "owner/none"],
             ["download", "owner/gated"], ["download", "owner/other", "--offline"]]  # fmt: skip
    with fake_hub.serve(delay=0.3) as (url, _):
        environ = {**os.environ, "HF_ENDPOINT": url, "HF_HUB_OFFLINE": "0"}
        words = [sys.executable, "-c", DOWNLOAD, json.dumps(calls)]
        done = subprocess.run(words, env=environ, capture_output=True, text=True, timeout=240, check=False)
    document, _, rest = done.stdout.partition("\n}\n")
    found = json.loads(document + "}")
    assert [int(line) for line in rest.splitlines() if line.strip().isdigit()] == [0, 0, 1, 2, 2], done.stderr
    for code in ("INPUT_MODEL_NOT_FOUND", "DEP_HUB_ACCESS", "DEP_HUB_UNREACHABLE"):
        assert f"[{code}]" in done.stderr
    assert re.search(r"^ +\d+%  \d\.\d MiB of 2\.9 MiB$", done.stderr, re.MULTILINE), done.stderr
    folder = Path(found["folder"])
    assert (folder / "model.safetensors").stat().st_size == 3_000_000
    assert not (folder / "original").exists()
    places = find_places(UiSpec(), os.environ, shown=Path("output"))
    (model,) = [m for m in find_local_models(places, os.environ) if m.source == "Hub cache"]
    assert (model.name, model.folder, model.removal) == ("owner/chats", folder, "owner/chats")
    assert model.size >= 3_000_000
    assert run(["download", "owner/chats", "--remove", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["bytes"] >= 3_000_000
    assert not folder.exists()
    for name in ("owner/chats", "./m", "../m", "owner/../../m"):
        assert run(["download", name, "--remove"]) == 1, name
        assert "[INPUT_MODEL_NOT_FOUND]" in capsys.readouterr().err
    assert (place / "m/config.json").exists()
