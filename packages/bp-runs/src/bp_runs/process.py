"""Whether the process that a record names still lives: a number alone is given to the next process that comes."""

from __future__ import annotations

import platform
from pathlib import Path

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
