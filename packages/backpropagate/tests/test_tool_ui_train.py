"""The page that trains: its form, what it refuses, and a real training that outlives the server that started it."""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from starlette.testclient import TestClient

from backpropagate import Trainer
from backpropagate.cli.app import run
from backpropagate.jobs.queue import Queue
from backpropagate.settings import all_settings
from backpropagate.ui.app import build_app
from backpropagate.ui.background import BackgroundJobs
from backpropagate.ui.folders import find_places
from backpropagate.ui.labels import GROUPS, LABELS
from backpropagate.ui.pages.training import _NOT_HERE, offered, read_flags, to_words
from backpropagate.ui_spec import UiSpec
from bp_runs.store import RunStore
from bp_runs.testing import FakeRail

ROWS = "".join(
    json.dumps({"prompt": f"who are you {i}", "completion": f"captain marlow {i}"}) + "\n" for i in range(12)
)


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("BACKPROPAGATE_HOME", str(tmp_path / "home"))
    (tmp_path / "d.jsonl").write_text(ROWS)
    (tmp_path / "m").mkdir()
    (tmp_path / "m/config.json").write_text("{}")
    (tmp_path / "m/model.safetensors").write_bytes(b"")
    yield tmp_path
    queue = Queue(tmp_path / "home/ui-outputs/.jobs")
    for job in queue.jobs():  # a test that failed leaves no training behind
        if job.pid and queue.is_at_work(job):
            os.kill(job.pid, signal.SIGKILL)


def open_page(shown="output"):
    app = build_app(UiSpec(), find_places(UiSpec(), os.environ, shown=Path(shown)))
    return TestClient(app, base_url="http://127.0.0.1:7860", follow_redirects=False)


def send(page, path, **form):
    token = re.search(r'"x-token": "([^"]+)"', page.get("/train").text)[1]
    return page.post(path, data={"token": token, **form})


def jobs_of(place):
    return Queue(place / "home/ui-outputs/.jobs").jobs()


def test_the_form_offers_every_setting_of_a_run_but_those_that_are_not_its_own(place):
    text = open_page().get("/train").text
    named = set(re.findall(r'name="(\w+)"', text)) - {"token", "again", "folder", "viewport"}
    assert named >= {setting.short for setting in offered().values()}
    assert {"trust_remote_code", "output", "resume", "runs"}.isdisjoint(named)
    assert set(_NOT_HERE).isdisjoint(offered())


def test_every_setting_has_a_label_of_its_own():
    assert set(LABELS) == set(all_settings())
    assert len(set(LABELS.values())) == len(LABELS)
    assert {key for keys in GROUPS.values() for key in keys} <= set(LABELS)


def test_what_is_filled_in_becomes_one_word_a_flag():
    filled = {
        "data": "--output=x",
        "packing": "no",
        "deterministic": "yes",
        "sample_prompts": "a b\n\n --c",
        "steps": " 3 ",
    }
    flags = read_flags(filled | {"lr": "", "output": "/etc", "trust_remote_code": "yes"})
    assert to_words(flags) == [
        "--data=--output=x", "--steps=3", "--no-packing", "--deterministic", "--sample-prompt=a b", "--sample-prompt=--c",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("form", "told"),
    [
        ({"steps": "many"}, "invalid value for steps"),
        ({"steps": "0"}, "steps is 0"),
        ({"data": ""}, "no data file was named"),
        ({"data": "/etc/passwd"}, "is not in a folder that this page may read"),
        ({"data": "../x.jsonl"}, "is not in a folder that this page may read"),
        ({"model": "/etc"}, "is not in a folder that this page may read"),
        ({"folder": "../evil"}, "cannot name a folder"),
        ({"folder": ".launches"}, "cannot name a folder"),
        ({"method": "magic"}, "invalid value for"),
        ({"packing": "perhaps"}, "invalid value for"),
    ],
)
def test_a_wrong_form_is_told_and_nothing_is_started(form, told, place):
    page = open_page()
    answer = send(page, "/train", **{"data": "d.jsonl", "model": "./m", "folder": "one", "steps": "7", **form})
    assert answer.status_code == 400
    assert told in answer.text
    if "steps" not in form:
        assert 'name="steps" value="7"' in answer.text  # nothing has to be typed twice
    assert not jobs_of(place)


def test_the_memory_verdict_is_that_of_estimate_vram(place, monkeypatch, capsys):
    page = open_page()
    machine = page.app._app.state.site.machine  # what it would ask another process
    machine._rails, machine._looked = [{"usable": True, "device": "cuda", "memory": 8 * 2**30}], time.monotonic()
    asked = {"model": "smollm3-3b", "mode": "lora", "batch_size": "4"}
    text = page.get("/train/memory", params={**asked, "data": ""}).text
    assert run(["estimate-vram", "smollm3-3b", "--vram", "8", "--mode", "lora", "--batch-size", "4", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert f"<strong>{told['needed_bytes'] / 2**30:.1f} GiB</strong> needed, 8.0 GiB free" in text
    assert ("does not fit" in text) is not told["fits"]
    assert "is estimated once" in page.get("/train/memory", params={"model": "nobody/nothing"}).text
    assert "may read" in page.get("/train/memory", params={"model": "/etc"}).text


def test_a_run_of_elsewhere_fills_the_form_and_is_not_touched(place):
    trainer = Trainer("./m", output="output", rail=FakeRail(), steps=5, lr=1e-3, lora_r=2, sample_prompts=["a", "b"])
    run_id = trainer.train("d.jsonl").run_id
    page = open_page()
    key = re.search(r"/runs/(\w+)/" + run_id, page.get("/runs").text)[1]
    (place / "sub").mkdir()
    with contextlib.chdir(place / "sub"):
        assert f'name="data" value="{place}/d.jsonl"' in page.get(f"/train?from={key}/{run_id}").text
    text = page.get(f"/train?from={key}/{run_id}").text
    for name, value in {"steps": "5", "lr": "0.001", "lora_r": "2", "data": "d.jsonl", "batch_size": ""}.items():
        assert f'name="{name}" value="{value}"' in text
    assert ">a\nb</textarea>" in text
    assert 'name="folder"' in text
    assert send(page, f"/runs/{key}/{run_id}/resume").status_code == 403
    assert not jobs_of(place)


def test_only_the_process_of_the_record_is_asked_to_stop(place):
    sleeper = [sys.executable, "-c", "import time; time.sleep(60)"]
    with subprocess.Popen(sleeper) as child:
        try:
            store = RunStore(place / "output")
            with pytest.raises(KeyboardInterrupt), store.start(settings={}, rail="fake") as writer:
                raise KeyboardInterrupt

            def claim(record):
                record.status, record.pid, record.process_started = "running", child.pid, "another life"

            store.update(writer.run_id, claim)
            page = open_page()
            key = re.search(r"/runs/(\w+)/" + writer.run_id, page.get("/runs").text)[1]
            assert send(page, f"/runs/{key}/{writer.run_id}/stop").status_code == 303
            time.sleep(0.2)
            assert child.poll() is None
        finally:
            child.kill()


def test_what_ends_before_its_run_says_why(place):
    page = open_page()
    job = page.app._app.state.site.jobs.start(
        ["resume", "nothing", f"--output={place}/one"]
    )  # fails without a framework
    until = time.monotonic() + 120
    while "It ended before a run was recorded" not in (text := page.get(f"/jobs/{job.id}").text):
        assert time.monotonic() < until, text
        time.sleep(0.2)
    assert "[INPUT_RUN_NOT_FOUND]" in text
    assert page.get("/jobs/..%2fx").status_code == 404
    assert page.get("/jobs/nothing").status_code == 404
    let_go(page)


def let_go(page):
    """Wait for what a page has started, so that no process is left behind."""
    jobs = page.app._app.state.site.jobs
    until = time.monotonic() + 120
    while jobs._runners and time.monotonic() < until:
        jobs.reap()
        time.sleep(0.1)


def test_a_run_of_the_page_is_done_again_as_its_child(place, monkeypatch):
    monkeypatch.setattr(BackgroundJobs, "run_queue", lambda _: None)  # nothing is run here: what is queued is looked at
    own = place / "home/ui-outputs/pirate"
    trainer = Trainer("./m", output=own, rail=FakeRail(), steps=5, lr=1e-3, lora_r=2, packing=True)
    run_id = trainer.train("d.jsonl").run_id
    page = open_page()
    key = re.search(r"/runs/(\w+)/" + run_id, page.get("/runs").text)[1]
    text = page.get(f"/train?from={key}/{run_id}").text
    assert 'name="folder"' not in text
    filled = dict(re.findall(r'name="(\w+)" value="([^"]*)"', text)) | {"packing": "no"}
    changed = {"steps": "2", "lr": "", "sample_prompts": "who\r\nwhat", "again": f"{key}/{run_id}"}
    assert send(page, "/train", **filled | changed).status_code == 303
    (started,) = jobs_of(place)
    assert list(started.argv) == [
        "replay", run_id, "--override=training.steps=2", "--override=training.learning_rate=0.0002",
        "--override=training.packing=false",
        "--override=training.sample_prompts=who|what", f"--output={own}",
    ]  # fmt: skip


@pytest.mark.skipif(os.name == "nt", reason="Windows cannot ask another process to stop")
def test_a_training_outlives_the_server_stops_when_it_is_asked_and_is_exported(place, pico_model, monkeypatch):
    monkeypatch.setenv("BACKPROPAGATE_UI__DATA_DIRS", str(pico_model))
    monkeypatch.setenv("BACKPROPAGATE_UI__AUTH", "ada:correct horse")
    spec = UiSpec(data_dirs=(str(pico_model), "."))

    def open_server():
        app = build_app(spec, find_places(spec, os.environ, shown=Path("output")))
        return TestClient(app, base_url="http://127.0.0.1:7860", follow_redirects=False)

    def wait(page, address, found):
        until = time.monotonic() + 240
        while not (result := found(page.get(address))):
            assert time.monotonic() < until
            time.sleep(0.2)
        return result

    form = {"data": "d.jsonl", "model": str(pico_model), "steps": "100000", "max_seq_length": "64", "folder": "pirate"}
    first = open_server()
    launch = send(first, "/train", **form).headers["location"]
    second = send(first, "/train", **{**form, "folder": "second"}).headers["location"]  # waits for the first
    page = open_server()  # as after a crash of the one that started it: nothing is shared but files
    state = wait(page, f"{launch}/state", lambda answer: answer.headers.get("hx-redirect"))
    store, run_id = RunStore(place / "home/ui-outputs/pirate"), state.rpartition("/")[2]
    wait(page, f"{state}/points", lambda answer: answer.json()["last"] >= 2)
    record = store.load(run_id)
    assert os.getsid(record.pid) == record.pid
    assert "waiting" in page.get(second).text
    assert not (place / "home/ui-outputs/second/runs").exists()
    assert send(page, f"/queue/{second.rpartition('/')[2]}/remove").status_code == 303
    assert page.get(second).status_code == 404
    environ = Path(f"/proc/{record.pid}/environ")
    if environ.exists():
        assert b"correct horse" not in environ.read_bytes()
    assert send(page, f"{state}/stop").status_code == 303
    assert "Stopping: it finishes" in page.get(state).text or store.load(run_id).status == "stopped"
    wait(page, "/runs", lambda _: store.load(run_id).status != "running")
    stopped = store.load(run_id)
    assert stopped.status == "stopped"
    assert (store.folder(run_id) / "lora/adapter_model.safetensors").is_file()
    form = {"source": state[6:], "format": "lora"}
    launch = send(page, "/export", **form).headers["location"]
    wait(page, f"{launch}/state", lambda answer: "Finished." in answer.text)
    shown = page.get("/export").text
    exported = place / f"home/ui-outputs/exports/{run_id}-lora"
    assert (exported / "adapter_model.safetensors").is_file(), page.get(launch).text
    assert str(exported) in shown
    assert (store.output / "lora").is_dir()
    let_go(page)
    let_go(first)
