"""Output folders on a disk that knows no locks: NFS without its daemon, some FUSE disks."""

import errno
import subprocess
import sys
import time

import pytest

pytest.importorskip("fcntl")
import fcntl

from bp_runs import process
from bp_runs.errors import OutputLockedError, OutputNotWritableError, RunActiveError
from bp_runs.store import RunStore

WITHOUT = """
import fcntl, sys, time
from pathlib import Path
from bp_runs.store import RunStore

def refuse(*_):
    raise OSError(int(sys.argv[2]), "no locks here")

fcntl.flock = refuse
with RunStore(Path(sys.argv[1])).start(settings={}, rail="fake") as run:
    print(run.run_id, flush=True)
    time.sleep(60)
"""


@pytest.fixture(params=["ENOLCK", "ENOSYS", "EOPNOTSUPP"])
def unknown(request, monkeypatch):
    """A disk that answers so to every lock; the error's number."""
    number = getattr(errno, request.param)

    def refuse(*_):
        raise OSError(number, "no locks here")

    monkeypatch.setattr(fcntl, "flock", refuse)
    return number


def test_runs_are_kept_apart_and_a_kill_is_noticed(tmp_path, unknown):
    command = [sys.executable, "-c", WITHOUT, str(tmp_path), str(unknown)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        run_id = process.stdout.readline().strip()
        store = RunStore(tmp_path)
        assert [row["status"] for row in store.list_runs()] == ["running"]
        with pytest.raises(RunActiveError):
            store.reopen(run_id, from_step=0, checkpoint=None)
        process.kill()
    assert [row["status"] for row in store.list_runs()] == ["interrupted"]
    with store.reopen(run_id, from_step=0, checkpoint=None) as run:
        assert store.load(run.run_id).status == "running"
    assert store.load(run_id).status == "failed"
    store.update(run_id, lambda record: record.tags.append("kept"))
    assert store.list_runs()[0]["tags"] == ["kept"]
    assert not list(tmp_path.rglob("*.held"))


def test_what_another_machine_left_is_named(tmp_path, unknown):
    marker = tmp_path / "lock.held"
    marker.write_text("4711\nelsewhere\n")
    began = time.monotonic()
    with pytest.raises(OutputLockedError) as caught:
        process.acquire_lock(tmp_path / "lock", 0.2)
    assert str(marker) in caught.value.fix
    assert time.monotonic() - began < 5
    marker.unlink()
    process.acquire_lock(tmp_path / "lock", 0).release()


def test_other_errors_of_the_disk_stay_what_they_are(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(errno.EIO, "broken")

    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OutputNotWritableError):
        process.acquire_lock(tmp_path / "file" / "lock", 0)
    monkeypatch.setattr(fcntl, "flock", refuse)
    with pytest.raises(OSError, match="broken"):
        process.acquire_lock(tmp_path / "lock", 0)
