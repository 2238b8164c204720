"""Locks between processes, and whether the process named in a record is still alive.

A process id alone proves nothing: the system reuses it. A record therefore also holds when the process started.
"""

from __future__ import annotations

import errno
import os
import platform
from pathlib import Path
from typing import TYPE_CHECKING

from bp_runs.errors import OutputLockedError
from bp_runs.files import coded_disk_errors

if TYPE_CHECKING:
    from filelock import BaseFileLock

_NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP)

_QUERY_LIMITED_INFORMATION = 0x1000  # Windows' PROCESS_QUERY_LIMITED_INFORMATION
_BIRTH_FIELD = 19  # of /proc/<pid>/stat after the name: start in clock ticks since boot


def process_birth(pid: int) -> str | None:
    """When a process of this machine started, as text to compare for equality; None where it is gone or unknown.

    Linux gives the boot's id and the ticks since then, which no change of the clock moves.
    """
    if pid <= 0:
        return None
    find = {"Linux": _birth_on_linux, "Windows": _birth_on_windows}.get(platform.system(), _birth_by_ps)
    return find(pid)


def is_same_process(pid: int, birth: str | None) -> bool:
    """Whether the process with this id is alive and is the one that started at ``birth`` (see `process_birth`).

    A record can hold anything, so nothing is sent to a process that fails this test: ids of 1 and below mean groups,
    every process of the user, or init, and an unknown birth proves nothing.
    """
    return pid > 1 and birth is not None and process_birth(pid) == birth


def is_own_process(pid: int, birth: str | None) -> bool:
    """As `is_same_process`, and the process belongs to this user, as far as the system tells."""
    if not is_same_process(pid, birth):
        return False
    try:
        return Path(f"/proc/{pid}").stat().st_uid == os.geteuid()
    except (OSError, AttributeError):  # no /proc, or Windows: the kernel itself checks who may signal whom
        return True


def _birth_on_linux(pid: int) -> str | None:
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        return None
    fields = stat.rpartition(")")[2].split()  # the name before may hold spaces
    state, ticks = fields[0], fields[_BIRTH_FIELD]
    return None if state in "ZX" else f"{boot}:{ticks}"


def _birth_by_ps(pid: int) -> str | None:
    import subprocess
    from shutil import which

    program = which("ps")
    if program is None:
        return None
    found = subprocess.run(  # noqa: S603  # a number and fixed words
        [program, "-o", "lstart=", "-p", str(pid)], capture_output=True, text=True, check=False
    )
    return found.stdout.strip() or None


def _birth_on_windows(pid: int) -> str | None:
    import ctypes

    kernel = ctypes.windll.kernel32  # type: ignore[attr-defined]  # on Windows only
    process = kernel.OpenProcess(_QUERY_LIMITED_INFORMATION, False, pid)
    if not process:
        return None
    times = [ctypes.c_ulonglong() for _ in range(4)]  # created, ended, kernel, user
    got = kernel.GetProcessTimes(process, *(ctypes.byref(t) for t in times))
    kernel.CloseHandle(process)
    return str(times[0].value) if got and not times[1].value else None


def acquire_lock(file: Path, seconds: float) -> BaseFileLock:
    """Hold ``file`` until the caller releases the lock, or its process ends.

    A disk may know no locks: NFS without its daemon, Lustre without ``flock``, some FUSE disks. There a marker next to
    the file is in, which names its process and is taken over when that is gone; one of another machine is not.

    Args:
        seconds: How long to wait for whoever holds it; 0: not at all, negative: as long as it takes.

    Raises:
        OutputLockedError: It is held.
        OutputNotWritableError, DiskFullError: The file cannot be made.
    """
    from filelock import FileLock, SoftFileLock, Timeout  # a list of runs that are done needs none

    marker = file.with_name(f"{file.name}.held")
    try:
        with coded_disk_errors(file):
            try:
                lock: BaseFileLock = FileLock(file, timeout=seconds, fallback_to_soft=False)
                lock.acquire()
            except OSError as error:
                if error.errno not in _NO_LOCKS:
                    raise
                lock = SoftFileLock(marker, timeout=seconds)
                lock.acquire()
    except Timeout as error:
        gone = f"; if nothing runs on any machine, delete {marker}" if marker.exists() else ""
        fix = f"{OutputLockedError.default_fix}{gone}" if gone else None
        raise OutputLockedError(f"{file} has been held for {seconds:.0f} seconds", fix=fix) from error
    return lock
