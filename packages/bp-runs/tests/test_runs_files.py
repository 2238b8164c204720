import contextlib
import errno
import os

import pytest

from bp_runs import files
from bp_runs.errors import DiskFullError, OutputNotWritableError


def test_publish_replaces_whole_and_leaves_nothing_beside(tmp_path):
    file = tmp_path / "a.json"
    files.publish_json(file, {"x": float("nan")})
    assert file.read_text() == '{\n  "x": null\n}\n'
    files.publish_bytes(file, b"new")
    assert file.read_bytes() == b"new"
    assert os.listdir(tmp_path) == ["a.json"]


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_full_disk_keeps_the_old_file(tmp_path, monkeypatch, call):
    file = tmp_path / "a"
    files.publish_bytes(file, b"old")

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, call, full)
    with pytest.raises(DiskFullError):
        files.publish_bytes(file, b"new")
    assert file.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["a"]


def test_publish_folder_swaps_or_vanishes(tmp_path):
    target = tmp_path / "lora"
    for word in ("one", "two"):
        with files.publish_folder(target) as partial:
            (partial / "w").write_text(word)
    assert (target / "w").read_text() == "two"
    with pytest.raises(KeyboardInterrupt), files.publish_folder(target) as partial:
        (partial / "w").write_text("three")
        raise KeyboardInterrupt
    assert (target / "w").read_text() == "two"
    assert os.listdir(tmp_path) == ["lora"]


def test_a_failed_swap_brings_the_old_folder_back(tmp_path, monkeypatch):
    target = tmp_path / "lora"
    with files.publish_folder(target) as partial:
        (partial / "w").write_text("old")
    real = os.replace

    def fail_second(source, goal):
        if str(source).endswith(".partial"):
            raise OSError(errno.EIO, "broken")
        real(source, goal)

    monkeypatch.setattr(os, "replace", fail_second)
    with pytest.raises(OSError, match="broken"), files.publish_folder(target) as partial:
        (partial / "w").write_text("new")
    assert (target / "w").read_text() == "old"


@pytest.mark.parametrize("refusals", [3, 99])
def test_windows_is_asked_again_while_somebody_reads(tmp_path, monkeypatch, refusals):
    waits, asked = [], []
    real = os.replace

    def busy(source, goal):
        asked.append(source)
        if len(asked) <= refusals:
            raise PermissionError(errno.EACCES, "The process cannot access the file", str(source))
        real(source, goal)

    with files.publish_folder(tmp_path / "lora") as partial:
        (partial / "w").write_text("old")
    monkeypatch.setattr(files, "_IS_WINDOWS", True)
    monkeypatch.setattr(files.time, "sleep", waits.append)
    monkeypatch.setattr(os, "replace", busy)
    refused = pytest.raises(OutputNotWritableError) if refusals > 50 else contextlib.nullcontext()
    with refused, files.publish_folder(tmp_path / "lora") as partial:
        (partial / "w").write_text("new")
    assert waits == sorted(waits)
    assert sum(waits) < 5
    assert len(waits) == min(refusals, 13)
    monkeypatch.setattr(os, "replace", real)
    assert (tmp_path / "lora" / "w").read_text() == ("old" if refusals > 50 else "new")


def test_a_file_where_the_folder_should_be(tmp_path):
    (tmp_path / "out").write_text("x")
    with pytest.raises(OutputNotWritableError) as caught:
        files.require_folder(tmp_path / "out")
    assert caught.value.exit_status == 1
    with pytest.raises(OutputNotWritableError):
        files.require_folder(tmp_path / "out" / "deeper")


def test_free_space_is_asked_of_the_nearest_existing_folder(tmp_path):
    files.require_free_space(tmp_path / "not" / "yet", 1, "a byte")
    with pytest.raises(DiskFullError, match="needs"):
        files.require_free_space(tmp_path / "not" / "yet", 2**62, "everything")


@pytest.mark.parametrize("has_new", [False, True])
def test_what_a_killed_process_left_aside_comes_back_or_goes(tmp_path, has_new):
    target = tmp_path / "lora"
    (tmp_path / ".lora.12ab34cd.old").mkdir()
    (tmp_path / ".lora.12ab34cd.old" / "w").write_text("old")
    (tmp_path / ".lora.12ab34cd.partial").mkdir()
    if has_new:
        target.mkdir()
        (target / "w").write_text("new")
    with pytest.raises(KeyboardInterrupt), files.publish_folder(target):
        raise KeyboardInterrupt
    assert (target / "w").read_text() == ("new" if has_new else "old")
    assert os.listdir(tmp_path) == ["lora"]
