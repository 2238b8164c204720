"""What happens while frameworks are imported."""

import gc
import os
import threading

import pytest

from bp_train_cuda import start


@pytest.fixture
def advised(monkeypatch):
    """Files whose reading was asked of the kernel."""
    found, plain = [], os.posix_fadvise

    def advise(descriptor, offset, length, advice):
        found.append((os.path.basename(os.readlink(f"/proc/self/fd/{descriptor}")), offset, length, advice))
        plain(descriptor, offset, length, advice)

    monkeypatch.setattr(os, "posix_fadvise", advise)
    return found


def wait_for_threads():
    for thread in threading.enumerate():
        if getattr(thread, "_target", None) in (start._read_ahead, start._open_gpu):
            thread.join()


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="needs Linux")
def test_weights_are_read_ahead_and_garbage_is_left_alone(pico_model, advised):
    with start.importing(pico_model):
        assert not gc.isenabled()
        wait_for_threads()
    assert gc.isenabled()
    assert advised == [("model.safetensors", 0, 0, os.POSIX_FADV_WILLNEED)]


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="needs Linux")
def test_weights_that_would_fill_the_ram_and_missing_ones_are_left(pico_model, advised, monkeypatch, tmp_path):
    start._read_ahead(tmp_path / "missing")
    monkeypatch.setattr(start, "_RAM_SHARE", 0.0)
    start._read_ahead(pico_model)
    assert not advised


def test_a_disabled_collector_stays_disabled():
    gc.disable()
    try:
        with pytest.raises(ImportError), start.importing():
            raise ImportError
        assert not gc.isenabled()
    finally:
        gc.enable()
    with pytest.raises(ImportError), start.importing():
        raise ImportError
    assert gc.isenabled()


def test_the_gpu_s_context_is_created_by_the_driver(monkeypatch):
    """As far as a machine without a GPU shows: the calls, and no error where the driver is missing or fails."""
    calls = []

    class Driver:
        def __init__(self, name):
            self.name = name

        def __getattr__(self, function):
            return lambda *_: calls.append(function) or failing.get(function, 0)

    def missing(name):
        raise OSError(name)

    monkeypatch.setattr(start.ctypes, "CDLL", missing)
    assert not start._open_gpu()
    monkeypatch.setattr(start.ctypes, "CDLL", Driver)
    for failing, done in (({"cuInit": 100}, ["cuInit"]), ({}, ["cuInit", "cuDeviceGet", "cuDevicePrimaryCtxRetain"])):
        calls.clear()
        assert start._open_gpu() == (not failing)
        assert calls == done
