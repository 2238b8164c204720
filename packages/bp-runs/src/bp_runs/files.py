"""Files that are either whole or absent: write next to, fsync, rename."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import orjson

from bp_runs.errors import DiskFullError, OutputNotWritableError

_IS_WINDOWS = os.name == "nt"
_WAITS = tuple(0.01 * 1.5**turn for turn in range(13))  # seconds; 3.9 in all
_FULL = (errno.ENOSPC, errno.EDQUOT)
_DENIED = (
    errno.EACCES,
    errno.EPERM,
    errno.EROFS,
    errno.EBUSY,
    errno.ENOTDIR,
    errno.EEXIST,
    errno.EISDIR,
    errno.ENAMETOOLONG,
)


@contextlib.contextmanager
def coded_disk_errors(path: Path) -> Iterator[None]:
    """Turn the disk's own errors about ``path`` into coded ones.

    Raises:
        DiskFullError: No space or quota left.
        OutputNotWritableError: No permission, read-only, or a file stands where a folder should.
    """
    try:
        yield
    except OSError as error:
        if error.errno in _FULL:
            raise DiskFullError(f"no room left while writing {path}", cause=str(error)) from error
        if error.errno in _DENIED:
            raise OutputNotWritableError(f"cannot write {path}", cause=str(error)) from error
        raise


def require_folder(path: Path) -> Path:
    """Create ``path`` where it is missing and prove that files can be written in it.

    Raises:
        OutputNotWritableError: It cannot be created or written.
        DiskFullError: There is no room for even one small file.
    """
    probe = path / f".write-probe-{os.getpid()}"
    try:
        with coded_disk_errors(path):
            path.mkdir(parents=True, exist_ok=True)
            try:
                probe.write_bytes(b"x")
            finally:
                probe.unlink(missing_ok=True)
    except OSError as error:  # a file system that holds no ordinary files, such as /proc
        raise OutputNotWritableError(f"cannot write in {path}", cause=str(error)) from error
    return path


def require_free_space(folder: Path, need: int, what: str) -> None:
    """Reject before the work starts when ``folder``'s disk has less than ``need`` bytes free.

    Raises:
        DiskFullError: Too little room.
    """
    existing = next(p for p in (folder, *folder.absolute().parents) if p.exists())
    free = shutil.disk_usage(existing).free
    if free < need:
        raise DiskFullError(
            f"{what} needs {need / 2**20:,.0f} MiB in {folder}, and {free / 2**20:,.0f} MiB are free",
            details={"need_bytes": need, "free_bytes": free},
        )


def fsync_folder(folder: Path) -> None:
    """Make a rename inside ``folder`` durable; a no-op where folders cannot be opened (Windows)."""
    if _IS_WINDOWS:
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def rename(source: Path, target: Path) -> None:
    """`os.replace` of a file or folder.

    Windows rejects it while anybody reads: a virus scanner, an indexer, a process that looks at the runs. There it is
    tried again, with longer and longer waits, for some four seconds.
    """
    for wait in _WAITS if _IS_WINDOWS else ():
        try:
            os.replace(source, target)
        except PermissionError:
            time.sleep(wait)
        else:
            return
    os.replace(source, target)


def publish_bytes(path: Path, data: bytes, *, durable: bool = True) -> None:
    """Write ``data`` to ``path`` so that a reader sees the old file or the new one, never a part.

    Args:
        durable: Wait for the disk, so that it holds after a power cut too; not needed for what can be rebuilt.

    Raises:
        DiskFullError, OutputNotWritableError: As `coded_disk_errors`; the old file stays.
    """
    partial = _beside(path, "partial")
    with coded_disk_errors(path):
        try:
            with partial.open("wb") as file:
                file.write(data)
                file.flush()
                if durable:
                    os.fsync(file.fileno())
            rename(partial, path)
        finally:
            partial.unlink(missing_ok=True)
        if durable:
            fsync_folder(path.parent)


@contextlib.contextmanager
def publish_file(path: Path) -> Iterator[Path]:
    """Yield a path next to ``path`` to write a large file to; on success it takes ``path``'s place, else it vanishes.

    Raises:
        DiskFullError, OutputNotWritableError: As `coded_disk_errors`; the old file stays.
    """
    partial = _beside(path, "partial")
    with coded_disk_errors(path):
        try:
            yield partial
            fsync_file(partial)
            rename(partial, path)
        finally:
            partial.unlink(missing_ok=True)
        fsync_folder(path.parent)


def publish_json(path: Path, data: Any) -> None:
    """`publish_bytes` of ``data`` as indented JSON; NaN and infinities become null."""
    publish_bytes(path, orjson.dumps(data, option=orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE))


@contextlib.contextmanager
def publish_folder(path: Path) -> Iterator[Path]:
    """Yield an empty folder next to ``path``; on success it takes ``path``'s place, else it vanishes.

    A folder that stood at ``path`` is moved aside first and removed last, so one of the two is always whole; what a
    killed process left aside is brought back or swept away by the next call. Callers that may meet at one ``path``
    must hold a lock.
    """
    partial, old = _beside(path, "partial"), _beside(path, "old")
    with coded_disk_errors(path):
        _recover(path)
        partial.mkdir(parents=True)
        try:
            yield partial
            for file in partial.rglob("*"):
                if file.is_file():
                    fsync_file(file)
            fsync_folder(partial)
            _swap_in(partial, path, old)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


def _beside(path: Path, kind: str) -> Path:
    """A hidden name next to ``path`` that nobody else uses."""
    return path.with_name(f".{path.name}.{os.urandom(4).hex()}.{kind}")


def _recover(path: Path) -> None:
    """Undo what a process left that was killed between its two renames."""
    for old in sorted(path.parent.glob(f".{path.name}.*.old")):
        if not path.exists():
            rename(old, path)
    for kind in ("old", "partial"):
        for leftover in path.parent.glob(f".{path.name}.*.{kind}"):
            shutil.rmtree(leftover, ignore_errors=True)


def _swap_in(partial: Path, path: Path, old: Path) -> None:
    if path.exists():
        rename(path, old)
    try:
        rename(partial, path)
    except OSError:
        if old.exists():
            rename(old, path)
        raise
    fsync_folder(path.parent)


def fsync_file(path: Path) -> None:
    """Make a file's bytes durable."""
    with path.open("rb+") as file:
        os.fsync(file.fileno())


def sha256_file(path: Path) -> str:
    """Hex SHA-256 of a file's bytes, read in blocks."""
    import hashlib  # most commands hash nothing

    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
