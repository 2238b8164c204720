"""The queue: command lines that wait their turn, and how each went.

One file, ``<home>/queue/queue.json``, always whole; one log and one lock a job next to it. A job runs in a process of
its own (`backpropagate.cli.job`), so whatever ends it (an error, the kernel's OOM killer, a crash of a driver) ends
neither the queue nor its file, and whatever ends the queue's process ends no job.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Literal, TypeAlias

import msgspec
from filelock import FileLock, Timeout

from backpropagate import system
from backpropagate.errors import JobNotFoundError, QueueBusyError, QueueInvalidError
from bp_runs.files import coded_disk_errors, publish_json
from bp_runs.record import utc_now
from bp_runs.redact import redact

State: TypeAlias = Literal["waiting", "running", "done", "failed", "stopped", "lost"]
"""stopped: by Ctrl-C, its work kept. lost: its process vanished more often than it is tried again."""

MOST_TRIES = 2
"""A job that takes the machine down with it must not do so every morning."""
STOPPED = 130
LOOK_SECONDS = 1.0
"""Patience for a lock that another process may hold only to see whether it is held."""
_SCHEMA = "backpropagate.queue/1"


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """A command line and how it went."""

    id: int
    argv: tuple[str, ...]
    """Without ``backprop``."""
    cwd: str
    """Folder that it runs in."""
    environ: dict[str, str] = field(default_factory=dict)
    """The settings that stood in the environment when it was added."""
    added_at: str
    state: State = "waiting"
    tries: int = 0
    pid: int | None = None
    """The process that works at it, or did."""
    started_at: str | None = None
    ended_at: str | None = None
    exit_status: int | None = None
    error: str | None = None
    """``[CODE]: message`` as the job told it."""


class Queue:
    """The jobs of one home folder; safe to be used by several processes at once.

    Raises (all methods):
        QueueInvalidError: The file is not a queue.
        DiskFullError, OutputNotWritableError: It cannot be written; the old one stays.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._file = folder / "queue.json"
        self._lock = FileLock(folder / ".queue.lock")
        self._runner = FileLock(folder / ".runner.lock")

    @classmethod
    def of_home(cls, environ: Mapping[str, str]) -> Queue:
        """The user's own queue."""
        return cls(system.program_home(environ) / "queue")

    def jobs(self) -> list[Job]:
        """All jobs, oldest first."""
        try:
            text = self._file.read_bytes()
        except FileNotFoundError:
            return []
        try:
            return msgspec.json.decode(text, type=_File).jobs
        except msgspec.DecodeError as error:
            raise QueueInvalidError(f"{self._file} is not a queue", cause=str(error)) from error

    def add(self, argv: Sequence[str], cwd: Path, environ: Mapping[str, str]) -> Job:
        """Put a command line at the end."""
        with self._edit() as jobs:
            number = max((job.id for job in jobs), default=0) + 1
            job = Job(id=number, argv=tuple(argv), cwd=str(cwd), environ=dict(environ), added_at=utc_now())
            jobs.append(job)
        return job

    def remove(self, number: int) -> Job:
        """Take a job out.

        Raises:
            JobNotFoundError: There is none, or it is running.
        """
        with self._edit() as jobs:
            found = next((job for job in jobs if job.id == number), None)
            if found is None:
                raise JobNotFoundError(f"there is no job {number}")
            if found.state == "running" and (self.is_run() or self.is_at_work(found)):
                raise JobNotFoundError(f"job {number} is running", fix="Stop it first: Ctrl-C where the queue runs")
            jobs.remove(found)
            self._lock_file(number).unlink(missing_ok=True)
        return found

    def remove_ended(self) -> int:
        """Take out all jobs that are done, failed, stopped or lost; returns how many."""
        with self._edit() as jobs:
            gone = [job for job in jobs if job.state not in ("waiting", "running")]
            jobs[:] = [job for job in jobs if job not in gone]
            for job in gone:
                self._lock_file(job.id).unlink(missing_ok=True)
        return len(gone)

    def move(self, number: int, by: int) -> None:
        """Move a waiting job by so many places among those that wait; negative: earlier.

        Raises:
            JobNotFoundError: No such job waits.
        """
        with self._edit() as jobs:
            places = [place for place, job in enumerate(jobs) if job.state == "waiting"]
            order = [jobs[place] for place in places]
            at = next((i for i, job in enumerate(order) if job.id == number), None)
            if at is None:
                raise JobNotFoundError(f"no job {number} waits")
            order.insert(max(0, at + by), order.pop(at))
            for place, job in zip(places, order, strict=True):
                jobs[place] = job

    def is_run(self) -> bool:
        """Whether some process works through the queue now."""
        return _is_held(self._runner)

    def is_at_work(self, job: Job) -> bool:
        """Whether the job's process lives, started by whoever works through the queue now or by one that is gone."""
        return self._lock_file(job.id).exists() and _is_held(self.lock_of(job.id))

    def lock_of(self, number: int) -> FileLock:
        """What the job's process holds for as long as it lives."""
        return FileLock(self._lock_file(number))

    def _lock_file(self, number: int) -> Path:
        return self.folder / f".job-{number}.lock"

    def log_of(self, job: Job) -> Path:
        """Where the job's output goes."""
        return self.folder / f"{job.id}.log"

    @contextlib.contextmanager
    def lead(self) -> Iterator[None]:
        """Be the one process that works through the queue.

        Raises:
            QueueBusyError: Another process does.
        """
        with coded_disk_errors(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
        try:
            self._runner.acquire(timeout=LOOK_SECONDS)
        except Timeout as error:
            raise QueueBusyError(f"another process works through {self._file}") from error
        try:
            yield
        finally:
            self._runner.release()

    def begin(self, number: int, pid: int) -> Job | None:
        """Called by a job's process, which holds the job's lock: the job, or None where it is not to be run."""
        with self._edit() as jobs:
            for place, job in enumerate(jobs):
                if job.id == number and job.state == "running":
                    jobs[place] = replace(job, pid=pid)
                    return jobs[place]
        return None

    def settle(self, job: Job) -> Job | None:
        """A job whose process is gone: the job if it ended; else None, and it waits again or is given up as lost."""
        with self._edit() as jobs:
            for place, found in enumerate(jobs):
                if found.id != job.id:
                    continue
                if found.state != "running":
                    return found
                lost = found.tries >= MOST_TRIES
                error = f"its process vanished {found.tries} times" if lost else None
                jobs[place] = replace(found, state="lost" if lost else "waiting", ended_at=utc_now(), error=error)
        return None

    def take(self) -> Job | None:
        """The oldest job that waits, running from now on; None where none waits."""
        with self._edit() as jobs:
            for place, job in enumerate(jobs):
                if job.state == "waiting":
                    begun = replace(job, state="running", tries=job.tries + 1, started_at=utc_now(), ended_at=None)
                    jobs[place] = begun
                    return begun
        return None

    def note(self, ended: Job) -> Job:
        """Write down how a job ended."""
        with self._edit() as jobs:
            jobs[:] = [replace(ended, pid=job.pid) if job.id == ended.id else job for job in jobs]
        return ended

    @contextlib.contextmanager
    def _edit(self) -> Iterator[list[Job]]:
        with coded_disk_errors(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
        with self._lock:
            jobs = self.jobs()
            yield jobs
            publish_json(self._file, {"schema": _SCHEMA, "jobs": [asdict(job) for job in jobs]})


def _is_held(lock: FileLock) -> bool:
    try:
        with lock.acquire(timeout=0):
            return False
    except (Timeout, OSError):
        return True


class _File(msgspec.Struct):
    """The queue's file."""

    jobs: list[Job]


def end_of(job: Job, status: int, error: str | None) -> Job:
    """The job as it ended, by the exit status of its process."""
    state: State = "done" if status == 0 else "stopped" if status == STOPPED else "failed"
    if error is None and status < 0:
        error = f"ended by signal {-status}"
    return replace(job, state=state, exit_status=status, ended_at=utc_now(), error=error and redact(error))


def settings_in(environ: Mapping[str, str]) -> dict[str, str]:
    """The variables that are settings, which a job keeps; the home stays whoever's runs the queue."""
    return {k: v for k, v in environ.items() if k.startswith("BACKPROPAGATE_") and k != "BACKPROPAGATE_HOME"}
