import os
import subprocess
import sys
import threading
import time

import orjson
import pytest
from fake_runs import fake_run
from filelock import FileLock

from bp_runs import paths
from bp_runs.adapter import changed_files, read_adapter_folder
from bp_runs.diff import diff_runs
from bp_runs.errors import (
    AdapterInvalidError,
    OutputNotWritableError,
    OutputTakenError,
    RecordInvalidError,
    RunNotFoundError,
    TrainingDivergedError,
)
from bp_runs.metrics import read_new_events
from bp_runs.record import RunRecord
from bp_runs.store import RunStore
from bp_runs.testing import FakeRail
from bp_runs.writer import RunWriter


def test_a_run_is_recorded_from_start_to_end(tmp_path):
    store = RunStore(tmp_path / "out")
    run_id = fake_run(tmp_path / "out")
    record = store.load(run_id)
    assert record.status == "completed"
    assert record.result["steps"] == 5
    assert record.data["read"] == 1
    assert record.settings["lora.r"] == {"value": 16, "source": "default"}
    events = store.read_metrics(run_id)
    assert [e["loss"] for e in events if e["event"] == "step"] == [4 / (s + 1) for s in range(1, 6)]
    adapter = read_adapter_folder(tmp_path / "out" / "lora")
    assert adapter.run_id == run_id
    assert changed_files(adapter.path) == []


def test_a_later_run_leaves_the_earlier_adapter_intact(tmp_path):
    output = tmp_path / "out"
    first = fake_run(output)
    second = fake_run(output)
    assert read_adapter_folder(output / "lora").run_id == second
    assert read_adapter_folder(paths.run_folder(output, first) / "lora").run_id == first


def test_failures_keep_their_kind(tmp_path):
    output = tmp_path / "out"
    good = fake_run(output)
    with pytest.raises(TrainingDivergedError):
        fake_run(output, rail=FakeRail(fail_at=3, failure=TrainingDivergedError("loss is nan")))
    with pytest.raises(ZeroDivisionError), RunStore(output).start(settings={}, rail="fake"):
        _ = 1 / 0
    with RunStore(output).start(settings={}, rail="fake"):
        pass
    statuses = [row["status"] for row in RunStore(output).list_runs()]
    assert sorted(statuses) == ["completed", "diverged", "failed", "failed"]
    assert read_adapter_folder(output / "lora").run_id == good
    codes = {row["error"] for row in RunStore(output).list_runs()}
    assert codes == {None, "RUNTIME_TRAINING_DIVERGED", "RUNTIME_BUG"}


def test_a_stop_keeps_the_adapter(tmp_path):
    run_id = fake_run(tmp_path / "out", stop=lambda: True)
    record = RunStore(tmp_path / "out").load(run_id)
    assert (record.status, record.result["steps"]) == ("stopped", 1)


@pytest.mark.parametrize("damage", [b"", b"{", b"[]", b'{"runs": [{}]}', None])
def test_the_index_is_rebuilt(tmp_path, damage):
    output = tmp_path / "out"
    ids = {fake_run(output) for _ in range(3)}
    index = paths.index_file(output)
    index.unlink() if damage is None else index.write_bytes(damage)
    assert {row["run_id"] for row in RunStore(output).list_runs()} == ids
    fake_run(output)
    assert len(orjson.loads(index.read_bytes())["runs"]) == 4


def test_a_torn_last_line_is_left_out(tmp_path):
    run_id = fake_run(tmp_path / "out")
    file = paths.run_folder(tmp_path / "out", run_id) / paths.METRICS_FILE
    whole = RunStore(tmp_path / "out").read_metrics(run_id)
    file.write_bytes(file.read_bytes() + b'{"event": "st')
    assert RunStore(tmp_path / "out").read_metrics(run_id) == whole


def test_new_events_are_read_once_and_torn_ones_when_they_are_whole(tmp_path):
    file = tmp_path / "metrics.jsonl"
    assert read_new_events(file) == ([], 0)
    file.write_bytes(b'{"event":"step","step":1}\n\n[1]\n{"event":"st')
    events, offset = read_new_events(file)
    assert [event["step"] for event in events] == [1]
    assert read_new_events(file, offset) == ([], offset)
    with file.open("ab") as opened:
        opened.write(b'ep","step":2}\nnonsense\n')
    events, offset = read_new_events(file, offset)
    assert [event["step"] for event in events] == [2]
    assert offset == file.stat().st_size


def test_a_damaged_record_is_named_and_the_others_are_listed(tmp_path):
    output = tmp_path / "out"
    bad, good = fake_run(output), fake_run(output)
    (paths.run_folder(output, bad) / "run.json").write_bytes(b"\x00")
    with pytest.raises(RecordInvalidError):
        RunStore(output).load(bad)
    paths.index_file(output).unlink()
    rows = {row["run_id"]: row["status"] for row in RunStore(output).list_runs()}
    assert rows == {bad: "failed", good: "completed"}


def test_partial_ids(tmp_path):
    output = tmp_path / "out"
    ids = [fake_run(output) for _ in range(2)]
    assert RunStore(output).find(ids[0][-6:]) == ids[0]
    for wrong in ("zzz", ""):
        with pytest.raises(RunNotFoundError):
            RunStore(output).find(wrong)
    with pytest.raises(RunNotFoundError, match="2 runs match"):
        RunStore(output).find(os.path.commonprefix(ids))


def test_an_id_that_is_taken_is_drawn_again(tmp_path, monkeypatch):
    drawn = iter(["20260101-000000-aaaaaa"] * 3 + ["20260101-000000-bbbbbb"])
    monkeypatch.setattr(paths, "new_run_id", lambda: next(drawn))
    store = RunStore(tmp_path)
    with store.start(settings={}, rail="one") as one, store.start(settings={}, rail="other") as other:
        assert [one.run_id[-6:], other.run_id[-6:]] == ["aaaaaa", "bbbbbb"]
    assert [store.load(run.run_id).rail for run in (one, other)] == ["one", "other"]
    assert not store.add_finished(RunRecord(run_id=one.run_id, rail="third"), [])
    assert store.load(one.run_id).rail == "one"


def test_free_memory_is_no_difference():
    one, other = (
        RunRecord(
            run_id=str(free),
            hardware={"cores": 2, "device_memory": free},
            model={"name": "m", "mode": f"lora ({free} GiB free)", "dtype": "float32"},
        )
        for free in (3, 4)
    )
    found = diff_runs(one, other, [], [])
    assert (found.hardware, found.model) == ({}, {})
    other.model["mode"] = "qlora (4 GiB free)"
    assert diff_runs(one, other, [], []).model == {"mode": ("lora", "qlora")}


def test_reading_makes_no_folders(tmp_path):
    assert RunStore(tmp_path / "none").list_runs() == []
    assert not (tmp_path / "none").exists()


def test_an_output_that_is_a_file(tmp_path):
    (tmp_path / "out").write_text("mine")
    with pytest.raises(OutputNotWritableError):
        RunStore(tmp_path / "out").start(settings={}, rail="fake")
    assert (tmp_path / "out").read_text() == "mine"


def test_secrets_do_not_reach_the_disk(tmp_path):
    secret = "hf_" + "a1B2" * 8
    settings = {"model.name": {"value": f"https://me:{secret}@x.y/z", "source": "flag"}}
    with RunStore(tmp_path).start(settings=settings, rail="fake", command=["backprop", "--token=" + secret]) as run:
        pass
    for file in tmp_path.rglob("*"):
        assert not file.is_file() or secret.encode() not in file.read_bytes()
    assert RunStore(tmp_path).load(run.run_id).settings["model.name"]["source"] == "flag"


def start_python(code: str, *arguments: str) -> subprocess.Popen:
    return subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import sys, time\nfrom pathlib import Path\nfrom bp_runs import RunStore\n" + code,
            *arguments,
        ]
    )


HANG = """
run = RunStore(Path(sys.argv[1])).start(settings={}, rail="fake")
time.sleep(60)
"""


def test_a_killed_run_is_interrupted_at_the_next_look(tmp_path):
    process = start_python(HANG, str(tmp_path))
    store = RunStore(tmp_path)
    deadline = time.monotonic() + 30
    while not store.list_runs() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert [row["status"] for row in store.list_runs()] == ["running"]
    process.kill()
    process.wait()
    assert [row["status"] for row in store.list_runs()] == ["interrupted"]
    assert store.load(store.list_runs()[0]["run_id"]).ended_at


MANY = """
for _ in range(20):
    with RunStore(Path(sys.argv[1])).start(settings={}, rail="fake"):
        pass
"""


def test_processes_share_an_output_folder(tmp_path):
    processes = [start_python(MANY, str(tmp_path)) for _ in range(4)]
    assert [p.wait() for p in processes] == [0] * 4
    index = orjson.loads(paths.index_file(tmp_path).read_bytes())["runs"]
    assert len({row["run_id"] for row in index}) == 80


def test_a_mended_record_is_seen_again(tmp_path):
    output = tmp_path / "out"
    bad, _ = fake_run(output), fake_run(output)
    file = paths.run_folder(output, bad) / "run.json"
    good = file.read_bytes()
    file.write_bytes(good[:50])
    paths.index_file(output).unlink()
    assert {r["run_id"]: r["error"] for r in RunStore(output).list_runs()}[bad] == "STATE_RECORD_INVALID"
    fake_run(output)
    file.write_bytes(good)
    assert {r["run_id"]: r["status"] for r in RunStore(output).list_runs()}[bad] == "completed"


@pytest.mark.parametrize("change", [{"settings": []}, {"result": None}, {"run_id": "other"}, {"status": 3}])
def test_a_record_of_another_shape_is_invalid(tmp_path, change):
    run_id = fake_run(tmp_path / "out")
    file = paths.run_folder(tmp_path / "out", run_id) / "run.json"
    file.write_bytes(orjson.dumps(orjson.loads(file.read_bytes()) | change))
    with pytest.raises(RecordInvalidError):
        RunStore(tmp_path / "out").load(run_id)
    paths.index_file(tmp_path / "out").unlink()
    assert RunStore(tmp_path / "out").list_runs()[0]["error"] == "STATE_RECORD_INVALID"


def test_a_lora_folder_of_the_user_s_is_never_replaced(tmp_path):
    mine = tmp_path / "out" / "lora" / "src" / "model.py"
    mine.parent.mkdir(parents=True)
    mine.write_text("precious")
    with pytest.raises(OutputTakenError):
        fake_run(tmp_path / "out")
    assert mine.read_text() == "precious"
    assert RunStore(tmp_path / "out").list_runs() == []


def test_an_edit_of_the_published_adapter_does_not_reach_the_run(tmp_path):
    run_id = fake_run(tmp_path / "out")
    with (tmp_path / "out/lora/adapter_config.json").open("a") as file:
        file.write(" ")
    assert changed_files(tmp_path / "out/lora") == ["adapter_config.json"]
    assert changed_files(paths.run_folder(tmp_path / "out", run_id) / "lora") == []


def test_a_run_on_another_machine_is_left_alone(tmp_path):
    with RunStore(tmp_path).start(settings={}, rail="fake") as run:
        record = RunStore(tmp_path).load(run.run_id)
    record.host, record.status = "elsewhere", "running"
    RunStore(tmp_path).save(record)
    assert RunStore(tmp_path).list_runs()[0]["status"] == "running"


def test_an_output_that_is_a_file_has_no_runs(tmp_path):
    (tmp_path / "f").write_text("x")
    assert RunStore(tmp_path / "f").list_runs() == []


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("adapter_config.json", b'{"base_model_name_or_path": "x", "r": 4, "lora_alpha": null}'),
        ("adapter_config.json", None),
        ("adapter_config.json", b"{"),
        ("adapter_config.json", b"[]"),
        ("adapter_config.json", b"{}"),
        ("adapter_config.json", b'{"peft_type": "IA3"}'),
        ("adapter_model.safetensors", None),
    ],
)
def test_incomplete_adapters_are_refused(tmp_path, name, content):
    fake_run(tmp_path / "out")
    file = tmp_path / "out" / "lora" / name
    file.unlink()
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(AdapterInvalidError):
        read_adapter_folder(tmp_path / "out" / "lora")


def test_a_changed_adapter_file_is_noticed(tmp_path):
    fake_run(tmp_path / "out")
    weights = tmp_path / "out" / "lora" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x01")
    assert changed_files(weights.parent) == ["adapter_model.safetensors"]


def test_a_new_run_waits_for_whoever_looks_at_it(tmp_path):
    store = RunStore(tmp_path)
    store.add_finished(RunRecord(run_id="20260101-000000-abcdef"), [])
    folder = store.folder("20260101-000000-abcdef")
    look = FileLock(folder / paths.LOCK_FILE, thread_local=False)
    look.acquire()
    threading.Timer(0.2, look.release).start()
    with RunWriter(store, folder, RunRecord(run_id="20260101-000000-abcdef")) as writer:
        writer.fail(TrainingDivergedError("x"))
