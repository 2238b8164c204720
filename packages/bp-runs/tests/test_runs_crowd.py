"""Many processes and odd clocks in one output folder: nothing is lost."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import orjson
import pytest
from fake_runs import fake_run

from bp_runs import index, paths, record
from bp_runs.events import StepDone
from bp_runs.store import RunStore

MANY = """
import sys
from pathlib import Path
from bp_runs.events import Notice
from bp_runs.store import RunStore

store = RunStore(Path(sys.argv[1]))
for number in range(int(sys.argv[2])):
    with store.start(settings={}, rail="fake") as run:
        run.emit(Notice(message=f"{sys.argv[3]} {number}"))
"""


@pytest.fixture
def memory(tmp_path):
    """A folder in memory where there is one: what many fsyncs cost is not what is tested."""
    if not Path("/dev/shm").is_dir():
        yield tmp_path
        return
    folder = Path("/dev/shm") / f"bp-crowd-{os.getpid()}"
    folder.mkdir()
    yield folder
    shutil.rmtree(folder)


@pytest.mark.parametrize("records", [60, pytest.param(500, marks=pytest.mark.slow)])
def test_eight_processes_lose_no_record(memory, records):
    command = [sys.executable, "-c", MANY, memory, str(records)]
    processes = [subprocess.Popen([*command, str(number)]) for number in range(8)]
    assert [process.wait() for process in processes] == [0] * 8
    store = RunStore(memory)
    rows = store.list_runs()
    assert len({row["run_id"] for row in rows}) == len(rows) == 8 * records
    assert {row["status"] for row in rows} == {"failed"}
    told = {e["message"] for row in rows for e in store.read_metrics(row["run_id"]) if e["event"] == "notice"}
    assert told == {f"{process} {number}" for process in range(8) for number in range(records)}
    found, is_whole = index.read_rows(memory)
    assert is_whole
    paths.index_file(memory).unlink()
    paths.journal_file(memory).unlink(missing_ok=True)
    assert index.read_rows(memory)[0] == found


def test_a_large_index_grows_by_a_journal_that_tears_and_is_lost(memory, monkeypatch):
    monkeypatch.setattr(index, "_WRITTEN_WHOLE", 0)
    monkeypatch.setattr(index, "_JOURNAL_SHARE", 0)
    ids = [fake_run(memory / "out") for _ in range(12)]
    journal = paths.journal_file(memory / "out")
    assert len({orjson.loads(line)["run_id"] for line in journal.read_bytes().split()}) == 12
    journal.write_bytes(journal.read_bytes()[:-40])
    assert {row["run_id"]: row["status"] for row in RunStore(memory / "out").list_runs()} == dict.fromkeys(
        ids, "completed"
    )
    fake_run(memory / "out")
    journal.unlink(missing_ok=True)
    assert len(RunStore(memory / "out").list_runs()) == 13


def test_a_clock_that_goes_backwards_loses_nothing(tmp_path, monkeypatch):
    store = RunStore(tmp_path / "out")
    first = fake_run(tmp_path / "out")
    for module in (record, sys.modules["bp_runs.store"], sys.modules["bp_runs.writer"]):
        monkeypatch.setattr(module, "utc_now", lambda: "1999-01-01T00:00:00.000+00:00")
    second = fake_run(tmp_path / "out")
    assert {row["run_id"] for row in store.list_runs()} == {first, second}
    store.update(first, lambda found: found.tags.append("later"))
    assert {row["run_id"]: row["tags"] for row in store.list_runs()} == {first: ["later"], second: []}
    with store.reopen(second, from_step=0, checkpoint=None) as run:
        run.emit(StepDone(step=1, steps=2, loss=1.0, learning_rate=1.0, grad_norm=None, tokens=1, tokens_per_second=1.0, memory_bytes=1))  # fmt: skip
    assert [e["step"] for e in store.read_metrics(second) if e["event"] == "step"] == [1]


def test_a_change_behind_the_index_is_seen(tmp_path):
    run_id = fake_run(tmp_path / "out")
    store = RunStore(tmp_path / "out")
    folder = store.folder(run_id)
    found = record.read_record(folder)
    found.note, found.tags = "by hand", ["x"]
    record.write_record(folder, found)
    assert store.list_runs()[0]["tags"] == ["x"]


def test_the_newest_are_listed_without_a_look_at_the_others(tmp_path):
    store = RunStore(tmp_path)
    ids = [f"20260101-00000{number}-aaaaaa" for number in range(8)]
    for number, run_id in enumerate(ids):
        store.add_finished(record.RunRecord(run_id=run_id, created_at=f"2026-01-0{number + 1}", status="completed"), [])

    def listed(count):
        rows, total = store.list_newest(count)
        assert rows == store.list_runs()[:count]
        assert total == len(index.run_ids(tmp_path))
        return [row["run_id"] for row in rows]

    assert listed(3) == ids[:4:-1]
    assert listed(99) == ids[::-1]
    stale = paths.run_folder(tmp_path, ids[0])
    record.write_record(stale, record.RunRecord(run_id=ids[0], created_at="2026-01-01", tags=["old"]))
    rows = paths.index_file(tmp_path).read_bytes()
    assert [row["run_id"] for row in store.list_newest(3)[0]] == ids[:4:-1]
    assert paths.index_file(tmp_path).read_bytes() == rows, "nobody looked at the oldest"
    shutil.rmtree(paths.run_folder(tmp_path, ids[7]))
    os.replace(paths.run_folder(tmp_path, ids[6]), tmp_path / "aside")
    assert [row["run_id"] for row in store.list_newest(3)[0]] == ids[5:2:-1]
    os.replace(tmp_path / "aside", paths.run_folder(tmp_path, ids[6]))
    running = record.RunRecord(run_id=ids[5], created_at="2026-01-06", status="running")
    running.begin_session(from_step=0, checkpoint=None)
    running.process_started = "another boot:1"
    record.write_record(paths.run_folder(tmp_path, ids[5]), running)
    (paths.run_folder(tmp_path, ids[4]) / paths.RECORD_FILE).write_bytes(b"{")
    found = {row["run_id"]: row["status"] for row in store.list_newest(3)[0]}
    assert found == {ids[6]: "completed", ids[5]: "interrupted", ids[4]: "failed"}, "a damaged one keeps its place"
    assert {row["run_id"]: row["error"] for row in store.list_runs()}[ids[4]] == "STATE_RECORD_INVALID"
