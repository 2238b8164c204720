"""Checkpoints are whole or absent, whatever happens while they are saved."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import orjson
import pytest
from odd_disks import small_disk

from bp_runs import checkpoint_store as checkpoint
from bp_runs import files
from bp_runs.checkpoint_store import MANIFEST_FILE, CheckpointFolder
from bp_runs.errors import CheckpointInvalidError, DiskFullError, OutputNotWritableError
from bp_runs.save import SaveSchedule
from bp_runs.spec import RunFolders, Settings, TrainingSpec, TrainSpec


def save(folder: CheckpointFolder, step: int, content: bytes = b"w", **more) -> None:
    with folder.save(run_id="r", rail="fake", step=step, need=1, **more) as partial:
        (partial / "weights").write_bytes(content)
        (partial / "deep").mkdir()
        (partial / "deep" / "state").write_bytes(b"s" * step)


def steps(folder: CheckpointFolder) -> list[int]:
    return [c.step for c in folder.read()]


def test_a_checkpoint_is_read_back(tmp_path):
    folder = CheckpointFolder(tmp_path)
    assert folder.newest_whole() == (None, {})
    save(folder, 3, facts={"halvings": 1}, score=0.5, reason="stop")
    newest, damaged = folder.newest_whole()
    assert (newest.step, newest.sequence, newest.score, newest.reason) == (3, 1, 0.5, "stop")
    assert (newest.facts, newest.bytes, damaged) == ({"halvings": 1}, 4, {})
    assert set(newest.files) == {"weights", "deep/state"}


def test_the_last_the_best_and_the_protected_stay(tmp_path):
    folder = CheckpointFolder(tmp_path, keep=2)
    for step, score in enumerate((None, 9.0, 1.0, 5.0, 4.0, 3.0), start=1):
        save(folder, step, score=score)
        if step == 1:
            folder.protect(1)
    assert steps(folder) == [6, 5, 3, 1]
    with pytest.raises(CheckpointInvalidError, match="no checkpoint of step 4"):
        folder.protect(4)


@pytest.mark.parametrize("damage", ["flipped", "short", "missing", "manifest", "manifest torn", "no manifest"])
def test_a_damaged_one_is_passed_over(tmp_path, damage):
    folder = CheckpointFolder(tmp_path)
    save(folder, 1)
    save(folder, 2, b"abc")
    bad = folder.read()[0].path
    manifest = bad / MANIFEST_FILE
    match damage:
        case "flipped":
            (bad / "weights").write_bytes(b"abd")
        case "short":
            (bad / "weights").write_bytes(b"ab")
        case "missing":
            (bad / "deep" / "state").unlink()
        case "manifest":
            manifest.write_bytes(orjson.dumps(orjson.loads(manifest.read_bytes()) | {"step": 9}))
        case "manifest torn":
            manifest.write_bytes(manifest.read_bytes()[:-20])
        case "no manifest":
            manifest.unlink()
    newest, damaged = folder.newest_whole()
    assert newest.step == 1
    assert list(damaged) == [bad.name]
    shutil.rmtree(newest.path)
    with pytest.raises(CheckpointInvalidError) as caught:
        folder.newest_whole()
    assert bad.name in caught.value.cause


def damage(checkpoint) -> bytes:
    """Flip a bit of its weights; returns them as they were."""
    whole = (checkpoint.path / "weights").read_bytes()
    (checkpoint.path / "weights").write_bytes(bytes([whole[0] ^ 1, *whole[1:]]))
    return whole


def test_no_whole_checkpoint_goes_for_a_damaged_one(tmp_path):
    folder = CheckpointFolder(tmp_path, keep=2)
    for step in (1, 2):
        save(folder, step)
    damage(folder.read()[0])
    _, found = folder.newest_whole()
    folder.note_damage(found)
    assert steps(folder) == [1]
    assert list(folder.read_damaged().values()) == ["weights is not what was saved"]
    save(folder, 3)
    assert steps(folder) == [3, 1]
    assert [c.sequence for c in folder.read()] == [3, 1]


def test_of_damaged_ones_the_last_stays_and_none_where_room_is_short(tmp_path):
    folder = CheckpointFolder(tmp_path, keep=9)
    for step in range(1, 5):
        save(folder, step, score=float(step))
    folder.protect(1)
    for found in folder.read()[1:]:
        damage(found)
    (folder.read()[1].path / MANIFEST_FILE).write_bytes(b"{")
    whole = folder.read()[0].path
    os.replace(whole, tmp_path / "aside")
    with pytest.raises(CheckpointInvalidError):
        folder.newest_whole()
    os.replace(tmp_path / "aside", whole)
    folder.note_damage({c.path.name: c.damage() for c in folder.read() if c.damage()})
    save(folder, 5)
    assert steps(folder) == [5, 4]
    assert [name[:11] for name in folder.read_damaged()] == ["step-000003", "step-000001"]
    with pytest.raises(DiskFullError), folder.save(run_id="r", rail="f", step=6, need=2**62):
        pytest.fail("nothing may be written")
    assert steps(folder) == [5]
    assert [name[:11] for name in folder.read_damaged()] == ["step-000001"], "protected"


def test_a_checkpoint_that_was_mended_counts_again(tmp_path):
    folder = CheckpointFolder(tmp_path)
    save(folder, 1)
    only = folder.read()[0]
    before = damage(only)
    folder.note_damage({only.path.name: "x"})
    with pytest.raises(CheckpointInvalidError):
        folder.newest_whole()
    (only.path / "weights").write_bytes(before)
    newest, found = folder.newest_whole()
    assert (newest, found) == (only, {})
    folder.note_damage(found)
    assert steps(folder) == [1]


def test_neither_names_nor_clocks_say_which_is_the_newest(tmp_path, monkeypatch):
    folder = CheckpointFolder(tmp_path)
    save(folder, 5)
    monkeypatch.setattr(checkpoint, "utc_now", lambda: "1999-01-01T00:00:00.000+00:00")
    save(folder, 6)
    newest, _ = folder.newest_whole()
    assert newest.step == 6
    os.replace(newest.path, newest.path.with_name("aaa"))
    os.utime(newest.path.with_name("aaa"), (0, 0))
    assert folder.newest_whole()[0].step == 6


def test_a_failed_write_leaves_the_earlier_ones(tmp_path):
    folder = CheckpointFolder(tmp_path)
    save(folder, 1)
    with pytest.raises(ZeroDivisionError), folder.save(run_id="r", rail="f", step=2, need=1) as partial:
        (partial / "weights").write_bytes(b"half")
        _ = 1 / 0
    assert steps(folder) == [1]
    assert len(os.listdir(folder.path)) == 1


def test_what_a_killed_save_left_is_swept_away(tmp_path):
    folder = CheckpointFolder(tmp_path)
    save(folder, 1)
    for leftover in (".step-000002-aaaaaa.partial", ".step-000000-bbbbbb.old"):
        (folder.path / leftover).mkdir()
    assert steps(folder) == [1]
    save(folder, 2)
    assert len(os.listdir(folder.path)) == 2


def test_every_byte_is_on_the_disk_before_the_name_is(tmp_path, monkeypatch):
    done = []

    def note(name, real):
        def call(*arguments):
            seen = os.readlink(f"/proc/self/fd/{arguments[0]}") if name == "fsync" else str(arguments[1])
            done.append((name, Path(seen).name))
            return real(*arguments)

        return call

    if not Path("/proc/self/fd").exists():
        pytest.skip("who is fsynced is read from /proc")
    folder = CheckpointFolder(tmp_path)
    save(folder, 1)
    for name in ("fsync", "replace"):
        monkeypatch.setattr(os, name, note(name, getattr(os, name)))
    save(folder, 2)
    published = next(i for i, (name, seen) in enumerate(done) if name == "replace" and seen.startswith("step-"))
    before, after = [seen for name, seen in done[:published] if name == "fsync"], done[published + 1 :]
    assert {"weights", "state", "deep"} <= set(before)
    assert any(MANIFEST_FILE in seen for seen in before)
    assert before[-1].endswith(".partial")
    assert after[0] == ("fsync", "checkpoints")


def test_room_is_looked_for_before_anything_is_written(tmp_path):
    folder = CheckpointFolder(tmp_path, keep=3)
    for step in (1, 2, 3):
        save(folder, step)
    with (
        pytest.raises(DiskFullError, match="a checkpoint needs"),
        folder.save(run_id="r", rail="f", step=4, need=2**62),
    ):
        pytest.fail("nothing may be written")
    assert steps(folder) == [3], "older ones went to make room; the newest stays"


def test_a_full_disk_keeps_what_was_saved_and_says_one_code(tmp_path):
    with small_disk(tmp_path / "disk", "1m") as disk:
        folder = CheckpointFolder(disk)
        save(folder, 1, b"x" * 300_000)
        with pytest.raises(DiskFullError) as caught:  # the estimate was too low: it shows in the middle of a file
            save(folder, 2, b"y" * 900_000)
        assert caught.value.code == "STATE_DISK_FULL"
        newest, damaged = folder.newest_whole()
        assert (newest.step, damaged) == (1, {})
        assert [p.name for p in folder.path.iterdir()] == [newest.path.name]
        save(folder, 3, b"z" * 300_000)
        assert steps(folder) == [3, 1]


def test_a_file_where_the_folder_should_be_has_its_code(tmp_path):
    (tmp_path / "checkpoints").write_text("mine")
    with pytest.raises(OutputNotWritableError):
        save(CheckpointFolder(tmp_path), 1)
    assert (tmp_path / "checkpoints").read_text() == "mine"


def test_a_disk_of_one_s_own_quota_is_told_alike(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(122, "Disk quota exceeded")

    folder = CheckpointFolder(tmp_path)
    save(folder, 1)
    monkeypatch.setattr(files.os, "fsync", refuse)
    with pytest.raises(DiskFullError):
        save(folder, 2)
    assert steps(folder) == [1]


def is_traceable() -> bool:
    return sys.platform == "linux" and Path("/dev/shm").is_dir()


@pytest.mark.skipif(not is_traceable(), reason="system calls are counted with Linux' ptrace")
@pytest.mark.parametrize("every", [37, pytest.param(1, marks=pytest.mark.slow)])
def test_a_kill_between_any_two_system_calls_loses_nothing(every):
    folder = Path("/dev/shm") / f"bp-dying-{os.getpid()}-{every}"
    folder.mkdir()
    try:
        script = Path(__file__).with_name("dying.py")
        done = subprocess.run([sys.executable, script, folder, str(every)], capture_output=True, text=True, check=False)
        if "Operation not permitted" in done.stderr:
            pytest.skip("ptrace is not allowed here")
        assert done.returncode == 0, done.stderr
        assert int(done.stdout.split()[-1]) > 1000 / every
    finally:
        shutil.rmtree(folder)


@pytest.mark.parametrize(
    ("steps", "minutes", "due"),
    [(0, 0.0, []), (4, 0.0, [4, 8]), (0, 5.0, [5]), (4, 5.0, [4, 8]), (6, 5.0, [5, 6]), (0, 2.0, [2, 4, 6, 8])],
)
def test_a_schedule_saves_by_steps_and_by_minutes(tmp_path, steps, minutes, due):
    """One step takes a minute; the last of nine is never saved."""
    now = [100.0]
    training = TrainingSpec(steps=9, save_steps=steps, save_minutes=minutes)
    spec = TrainSpec.build(
        Settings(training=training), RunFolders(run_id="r", output=tmp_path, run=tmp_path), base=tmp_path
    )
    schedule, saved = SaveSchedule(spec, clock=lambda: now[0]), []
    for step in range(1, 10):
        now[0] += 60.0
        if schedule.is_due(step):
            saved.append(step)
            schedule.saved()
    assert saved == due
