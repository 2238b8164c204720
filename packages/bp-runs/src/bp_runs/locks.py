"""A lock between processes, on disks that know locks and on those that do not."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import TYPE_CHECKING

from bp_runs.errors import OutputLockedError
from bp_runs.files import coded_disk_errors

if TYPE_CHECKING:
    from filelock import BaseFileLock

_NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP)


def acquire(file: Path, seconds: float) -> BaseFileLock:
    """Hold ``file`` until the caller releases the lock, or its process ends.

    A disk may know no locks: NFS without its daemon, Lustre without ``flock``, some FUSE disks. There a marker beside
    the file stands in, which names its process and is taken over when that is gone; one of another machine is not.

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
