"""A faster start: what can be done while Python imports frameworks, which takes most of the time to the first step.

Imports hold one core. Meanwhile a thread creates the GPU's context and another has the kernel read the weights from
disk; both hardly need Python.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil

_RAM_SHARE = 0.7
"""Of the free system RAM that weights may take; larger ones would push each other out."""


@contextlib.contextmanager
def importing(base: Path | None = None) -> Iterator[None]:
    """While the context lasts, import what training needs.

    Frameworks leave millions of objects that stay, and looking for garbage among them takes a sixth of the time; so
    Python does not look meanwhile.

    Args:
        base: The model's folder, whose weights will be loaded soon.
    """
    if base is not None:
        _start(_read_ahead, base)
    _start(_open_gpu)
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _start(work: Callable[..., object], *arguments: object) -> None:
    threading.Thread(target=work, args=arguments, daemon=True).start()


def _open_gpu() -> bool:
    """Create the first GPU's primary context, which torch will use; returns whether there is one.

    By the driver's own functions, which run without Python's lock; torch's would hold it and stop the imports.
    """
    try:
        driver = ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
    except OSError:
        return False
    device, context = ctypes.c_int(), ctypes.c_void_p()
    return bool(
        driver.cuInit(0) == 0
        and driver.cuDeviceGet(ctypes.byref(device), 0) == 0
        and driver.cuDevicePrimaryCtxRetain(ctypes.byref(context), device) == 0
    )


def _read_ahead(base: Path) -> None:
    """Have the kernel read the model's weights into its page cache, if they fit the free RAM; Linux alone."""
    if not hasattr(os, "posix_fadvise"):
        return
    with contextlib.suppress(OSError):  # loading meets the same error, and names it
        files = sorted(base.glob("*.safetensors"))
        if sum(file.stat().st_size for file in files) > _RAM_SHARE * psutil.virtual_memory().available:
            return
        for file in files:
            with file.open("rb") as opened:
                os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_WILLNEED)
