"""A full disk; an output folder, a run folder or an index that cannot be written: one code, and nothing is lost."""

import subprocess
import sys

import pytest
from fake_runs import fake_run
from odd_disks import read_only, small_disk
from test_runs_checkpoint import save, steps
from test_runs_resume import interrupted, step

from bp_runs import index, paths
from bp_runs.checkpoint_store import CheckpointFolder
from bp_runs.errors import DiskFullError, OutputNotWritableError
from bp_runs.store import RunStore


def contents(folder):
    return {p.relative_to(folder): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_an_output_folder_that_cannot_be_written(tmp_path):
    output = tmp_path / "out"
    run_id = fake_run(output)
    store = RunStore(output)
    before, rows = contents(output), store.list_runs()
    with read_only(output):
        for attempt in (
            lambda: store.start(settings={}, rail="fake"),
            lambda: store.update(run_id, lambda record: record.tags.append("x")),
            lambda: store.remove(run_id),
            lambda: store.publish_adapter(run_id),
            store.rebuild_index,
        ):
            with pytest.raises(OutputNotWritableError) as caught:
                attempt()
            assert caught.value.code == "INPUT_OUTPUT_NOT_WRITABLE"
        assert store.list_runs() == rows
        assert store.load(run_id).status == "completed"
    assert contents(output) == before


def test_a_run_folder_that_cannot_be_written(tmp_path):
    store = RunStore(tmp_path)
    run_id = interrupted(store)
    folder = CheckpointFolder(store.folder(run_id))
    save(folder, 3)
    before = contents(tmp_path)
    with read_only(store.folder(run_id)):
        with pytest.raises(OutputNotWritableError):
            store.reopen(run_id, from_step=3, checkpoint=None)
        with pytest.raises(OutputNotWritableError):
            save(folder, 4)
        assert store.list_runs()[0]["status"] == "interrupted"
    assert contents(tmp_path) == before


def test_a_disk_that_turns_read_only_during_a_run(tmp_path):
    store = RunStore(tmp_path)
    with pytest.raises(OutputNotWritableError), store.start(settings={}, rail="fake") as run:
        folder = CheckpointFolder(run.folders.run)
        run.emit(step(1))
        save(folder, 1)
        run.emit(step(2))
        with read_only(run.folders.run):
            save(folder, 2)
    assert steps(folder) == [1]
    assert folder.newest_whole()[1] == {}
    record = store.load(run.run_id)
    assert (record.status, record.error["code"]) == ("failed", "INPUT_OUTPUT_NOT_WRITABLE")
    assert [e["step"] for e in store.read_metrics(run.run_id)] == [1, 2]


def test_an_index_that_cannot_be_replaced_costs_no_run(tmp_path):
    output = tmp_path / "out"
    first = fake_run(output)
    before = paths.index_file(output).read_bytes()
    with read_only(paths.index_file(output)):
        second = fake_run(output)
        assert {row["run_id"]: row["status"] for row in RunStore(output).list_runs()} == dict.fromkeys(
            (first, second), "completed"
        )
        RunStore(output).remove(first)
        assert [row["run_id"] for row in RunStore(output).list_runs()] == [second]
        assert paths.index_file(output).read_bytes() == before
    assert [row["run_id"] for row in RunStore(output).list_runs()] == [second]
    assert index.read_rows(output)[1], "written anew at the next look"


FILL = """
import sys
from pathlib import Path
from bp_runs.errors import CodedError
from bp_runs.events import Notice
from bp_runs.store import RunStore

try:
    with RunStore(Path(sys.argv[1])).start(settings={}, rail="fake") as run:
        for number in range(100_000):
            run.emit(Notice(message=f"{number} " + "x" * 500))
except CodedError as error:
    print(run.run_id, error.code)
"""


def test_a_run_that_fills_the_disk(tmp_path):
    with small_disk(tmp_path / "disk", "256k") as disk:
        store = RunStore(disk / "out")
        done = subprocess.run([sys.executable, "-c", FILL, store.output], capture_output=True, text=True, check=True)
        run_id, code = done.stdout.split()
        assert code == "STATE_DISK_FULL"
        assert [row["status"] for row in store.list_runs()] == ["interrupted"], "told, though it cannot be written"
        with pytest.raises(DiskFullError):
            store.start(settings={}, rail="fake")
        told = [e["message"].split()[0] for e in store.read_metrics(run_id)]
        assert told == [str(number) for number in range(len(told))]
        assert len(told) > 100
        assert [path.name for path in (store.output / "runs").iterdir()] == [run_id]
        (store.folder(run_id) / paths.METRICS_FILE).write_bytes(b"")
        assert [row["status"] for row in store.list_runs()] == ["interrupted"]
        with store.start(settings={}, rail="fake"):
            pass
        assert len(store.list_runs()) == 2
