"""The queue: command lines that wait for the night, and how each went.

One file, ``<home>/queue/queue.json``, always whole; one log a job beside it. A job runs in a process of its own, so
whatever ends it (an error, the kernel's OOM killer, a crash of a driver) ends neither the queue nor its file.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, TypeAlias

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
_STOPPED = 130
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
            if found.state == "running" and self.is_run():
                raise JobNotFoundError(f"job {number} is running", way_out="Stop it first: Ctrl-C where the queue runs")
            jobs.remove(found)
        return found

    def remove_ended(self) -> int:
        """Take out all jobs that are done, failed, stopped or lost; returns how many."""
        with self._edit() as jobs:
            kept = [job for job in jobs if job.state in ("waiting", "running")]
            gone = len(jobs) - len(kept)
            jobs[:] = kept
        return gone

    def is_run(self) -> bool:
        """Whether some process works through the queue now."""
        try:
            with self._runner.acquire(timeout=0):
                return False
        except (Timeout, OSError):
            return True

    def log_of(self, job: Job) -> Path:
        """Where the job's output goes."""
        return self.folder / f"{job.id}.log"

    def run(self, say: Callable[[str, Job], None]) -> list[Job]:
        """Work through the queue until nothing waits, jobs added meanwhile included; returns the jobs that were run.

        A job that was running when its process or the machine went down is tried once more. Ctrl-C lets the running
        job save and end, and then stops; jobs that wait stay.

        Args:
            say: Told ``started`` and ``ended`` with the job.

        Raises:
            QueueBusyError: Another process works through it.
        """
        with coded_disk_errors(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
        try:
            self._runner.acquire(timeout=0)
        except Timeout as error:
            raise QueueBusyError(f"another process works through {self._file}") from error
        try:
            self._settle()
            ended: list[Job] = []
            while (job := self._take()) is not None:
                say("started", job)
                ended.append(self._note(_run(job, self.log_of(job))))
                say("ended", ended[-1])
                if ended[-1].state == "stopped":
                    break
            return ended
        finally:
            self._runner.release()

    def _settle(self) -> None:
        """Jobs that a runner left behind wait again, or are given up."""
        with self._edit() as jobs:
            for place, job in enumerate(jobs):
                if job.state == "running":
                    lost = job.tries >= MOST_TRIES
                    error = f"its process vanished {job.tries} times" if lost else None
                    jobs[place] = replace(job, state="lost" if lost else "waiting", ended_at=utc_now(), error=error)

    def _take(self) -> Job | None:
        with self._edit() as jobs:
            for place, job in enumerate(jobs):
                if job.state == "waiting":
                    begun = replace(job, state="running", tries=job.tries + 1, started_at=utc_now(), ended_at=None)
                    jobs[place] = begun
                    return begun
        return None

    def _note(self, ended: Job) -> Job:
        with self._edit() as jobs:
            jobs[:] = [ended if job.id == ended.id else job for job in jobs]
        return ended

    @contextlib.contextmanager
    def _edit(self) -> Iterator[list[Job]]:
        with coded_disk_errors(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
        with self._lock:
            jobs = self.jobs()
            yield jobs
            publish_json(self._file, {"schema": _SCHEMA, "jobs": [asdict(job) for job in jobs]})


class _File(msgspec.Struct):
    """The queue's file."""

    jobs: list[Job]


def _run(job: Job, log: Path) -> Job:
    """Run a job to its end in a process of its own."""
    command = [sys.executable, "-m", "backpropagate", *job.argv]
    environ = {**_without_settings(os.environ), **job.environ}
    with log.open("ab") as out:
        out.write(f"--- {utc_now()} backprop {' '.join(job.argv)}\n".encode())
        out.flush()
        begin = out.tell()
        try:
            child = subprocess.Popen(  # noqa: S603  # our own program, and the words that the user gave it
                command, cwd=job.cwd, env=environ, stdin=subprocess.DEVNULL, stdout=out, stderr=out, **_OWN_GROUP
            )
        except OSError as error:
            return _end(job, 1, f"cannot start in {job.cwd}: {error.strerror}")
        status = _wait(child)
    return _end(job, status, None if status in (0, _STOPPED) else _told_error(log, begin))


# A group of its own: Ctrl-C at the terminal reaches us, and we hand it on once.
_OWN_GROUP: dict[str, Any] = {"start_new_session": True} if os.name != "nt" else {}


def _wait(child: subprocess.Popen[bytes]) -> int:
    """The exit status; the first Ctrl-C lets the job save, the second one ends it."""
    asked = False
    while True:
        try:
            status = child.wait()
            return _STOPPED if asked and status != 0 else status
        except KeyboardInterrupt:
            if asked:
                child.kill()
            elif _OWN_GROUP:
                child.send_signal(signal.SIGINT)
            asked = True


def _end(job: Job, status: int, error: str | None) -> Job:
    state: State = "done" if status == 0 else "stopped" if status == _STOPPED else "failed"
    if error is None and status < 0:
        error = f"ended by signal {-status}"
    return replace(job, state=state, exit_status=status, ended_at=utc_now(), error=error and redact(error))


def _told_error(log: Path, begin: int) -> str | None:
    """The last line of the log that starts with a code."""
    with log.open("rb") as file:
        file.seek(max(begin, log.stat().st_size - 2**16))
        lines = file.read().decode(errors="replace").splitlines()
    return next((line for line in reversed(lines) if line.startswith("[") and "]: " in line), None)


def settings_in(environ: Mapping[str, str]) -> dict[str, str]:
    """The variables that are settings, which a job keeps; the home stays whoever's runs the queue."""
    return {k: v for k, v in environ.items() if k.startswith("BACKPROPAGATE_") and k != "BACKPROPAGATE_HOME"}


def _without_settings(environ: Mapping[str, str]) -> dict[str, str]:
    kept = settings_in(environ)
    return {k: v for k, v in environ.items() if k not in kept}
