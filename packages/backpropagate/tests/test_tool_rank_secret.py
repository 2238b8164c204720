"""Ranks of one launch share a token through a private file; strangers and earlier launches do not matter."""

import os
import stat
import subprocess
import sys
import threading

import orjson
import psutil
import pytest

from backpropagate.distributed import secret as rank_secret
from backpropagate.distributed.secret import given_secret, publish_secret, read_secret, remove_secret
from backpropagate.errors import RanksTokenError

LAUNCH = "127.0.0.1:29500"
posix = pytest.mark.skipif(os.name != "posix", reason="Windows gives each user a folder of its own")


@pytest.fixture
def environ(tmp_path):
    return {"XDG_RUNTIME_DIR": str(tmp_path)}


def file_of(environ):
    return rank_secret._file(LAUNCH, environ)


def leave(environ, pid, start):
    """What another rank 0 would have left."""
    file_of(environ).write_bytes(orjson.dumps({"token": "old", "main_process": [pid, start]}))


def test_all_ranks_have_rank_0s_token_and_process(environ):
    secret = publish_secret(LAUNCH, environ)
    assert read_secret(LAUNCH, environ) == secret
    assert len(secret.token) == 64
    assert secret.main_process == (os.getpid(), psutil.Process().create_time())
    assert secret.token not in repr(secret)
    assert publish_secret("127.0.0.1:29501", environ).token != secret.token


@posix
def test_only_this_user_can_read_it(environ):
    publish_secret(LAUNCH, environ)
    assert stat.S_IMODE(file_of(environ).stat().st_mode) == 0o600
    assert stat.S_IMODE(file_of(environ).parent.stat().st_mode) == 0o700


def test_without_a_runtime_folder_a_temporary_one_is_taken(tmp_path, monkeypatch):
    monkeypatch.setattr(rank_secret.tempfile, "tempdir", str(tmp_path))
    secret = publish_secret(LAUNCH, {"XDG_RUNTIME_DIR": str(tmp_path / "none")})
    assert read_secret(LAUNCH, {}) == secret
    assert [folder.name.partition("-")[0] for folder in tmp_path.iterdir()] == ["backpropagate"]


@posix
def test_a_folder_that_others_can_enter_is_refused(environ, tmp_path):
    (tmp_path / "backpropagate").mkdir(mode=0o700)
    (tmp_path / "backpropagate").chmod(0o750)
    with pytest.raises(RanksTokenError, match="isn't private") as caught:
        publish_secret(LAUNCH, environ)
    assert "export BACKPROPAGATE_RANKS_TOKEN=$(openssl rand -hex 32)" in caught.value.fix


@posix
def test_a_link_in_the_folders_place_is_refused(environ, tmp_path):
    (tmp_path / "elsewhere").mkdir(mode=0o700)
    (tmp_path / "backpropagate").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(RanksTokenError, match="isn't private"):
        read_secret(LAUNCH, environ)


def test_a_folder_that_cannot_be_made_is_refused(environ, tmp_path):
    (tmp_path / "backpropagate").write_text("a file")
    with pytest.raises(RanksTokenError):
        read_secret(LAUNCH, environ)


def test_a_rank_waits_for_rank_0_and_passes_over_what_an_earlier_launch_left(environ):
    with subprocess.Popen([sys.executable, "-c", ""]) as gone:
        born = psutil.Process(gone.pid).create_time()
    leave(environ, gone.pid, born)
    found = [rank_secret._read(file_of(environ))]
    for damaged in (b"", b"[]", b"{}", b'{"main_process": [1]}'):
        file_of(environ).write_bytes(damaged)
        found.append(rank_secret._read(file_of(environ)))
    assert found == [None] * 5
    leave(environ, gone.pid, born)
    found.clear()
    waiting = threading.Thread(target=lambda: found.append(read_secret(LAUNCH, environ)))
    waiting.start()
    secret = publish_secret(LAUNCH, environ)
    waiting.join(timeout=10)
    assert found == [secret]


def test_rank_0_does_not_take_the_place_of_another_that_runs(environ):
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as running:
        leave(environ, running.pid, psutil.Process(running.pid).create_time())
        with pytest.raises(RanksTokenError, match=f"process {running.pid} trains at the same address") as caught:
            publish_secret(LAUNCH, environ)
        running.communicate()
    assert "export MASTER_PORT=" in caught.value.fix


def test_a_rank_whose_rank_0_never_comes_ends_by_a_code(environ, monkeypatch):
    monkeypatch.setattr(rank_secret, "_PATIENCE", 0.1)
    with pytest.raises(RanksTokenError, match="left no token"):
        read_secret(LAUNCH, environ)


def test_the_file_is_removed_at_the_end(environ):
    publish_secret(LAUNCH, environ)
    remove_secret(LAUNCH, environ)
    remove_secret(LAUNCH, environ)
    assert not list(file_of(environ).parent.iterdir())


def test_the_users_token_is_taken_as_it_is():
    assert given_secret("0123456789abcdef").token == "0123456789abcdef"
    assert given_secret("0123456789abcdef").main_process is None
