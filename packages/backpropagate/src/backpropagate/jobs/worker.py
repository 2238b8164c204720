"""Work through the queue: start the process of each job, `backpropagate.cli.job`, and wait for it."""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from backpropagate.errors import QueueBusyError
from backpropagate.jobs.queue import STOPPED, Job, Queue, end_of, settings_in
from bp_runs.record import utc_now

TURNED_AWAY = 75
"""Exit status of a process that finds another one at the job, or the job not to be run; sysexits' EX_TEMPFAIL."""

_POLL_SECONDS = 0.2

# A group of its own: Ctrl-C at the terminal reaches the queue, and it hands it on once.
OWN_GROUP: dict[str, Any] = {"start_new_session": True} if os.name != "nt" else {}


def run_queue(queue: Queue, say: Callable[[str, Job], None]) -> list[Job]:
    """Work through the queue until nothing waits, jobs added meanwhile included; returns the jobs that ran.

    A job that was running when its process or the machine went down is tried once more. One that outlived the process
    that worked through the queue before is waited for. Ctrl-C lets the running job save and end, and then stops; jobs
    that wait stay.

    Args:
        say: Called with ``started``, ``found at work`` or ``ended``, and the job.

    Raises:
        QueueBusyError: Another process works through it.
    """
    with queue.lead():
        ended: list[Job] = []
        for left in queue.jobs():
            if left.state == "running":
                ended += _wait_out(queue, left, say)
        while not (ended and ended[-1].state == "stopped") and (job := queue.take()) is not None:
            say("started", job)
            done = run_job(queue, job)
            if done is None:
                ended += _wait_out(queue, job, say)
                continue
            ended.append(queue.note(done))
            say("ended", done)
        return ended


def _wait_out(queue: Queue, job: Job, say: Callable[[str, Job], None]) -> list[Job]:
    """Wait for a job that another worker left behind; returns it if it came to its end."""
    if queue.is_at_work(job):
        say("found at work", job)
        _wait_for_lock(queue, job)
    ended = queue.settle(job)
    if ended is None:
        return []
    say("ended", ended)
    return [ended]


def _wait_for_lock(queue: Queue, job: Job) -> None:
    """Until the job's process is gone; the first Ctrl-C is handed on to it, so that it saves."""
    interrupted = False
    while True:
        try:
            with queue.lock_of(job.id).acquire(poll_interval=_POLL_SECONDS):
                return
        except KeyboardInterrupt:
            pid = next((found.pid for found in queue.jobs() if found.id == job.id), None)
            if interrupted or pid is None or pid <= 1 or os.name == "nt":
                raise
            interrupted = True
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGINT)


def run_job(queue: Queue, job: Job) -> Job | None:
    """Run a job to its end in a process of its own; None where another process is at it."""
    environ = {**_without_settings(os.environ), **job.environ}
    log = queue.log_of(job)
    # Logs hold prompts and paths: they are for this user's eyes only.
    with os.fdopen(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), "ab") as out:
        out.write(f"--- {utc_now()} backprop {shlex.join(job.argv)}\n".encode())
        out.flush()
        begin = out.tell()
        try:
            streams: dict[str, Any] = {"stdin": subprocess.DEVNULL, "stdout": out, "stderr": out}
            child = subprocess.Popen(command_of(queue, job), cwd=job.cwd, env=environ, **streams, **OWN_GROUP)  # noqa: S603  # our own program
        except OSError as error:
            return end_of(job, 1, f"cannot start in {job.cwd}: {error.strerror}")
        status = wait(child)
    if status == TURNED_AWAY:
        return None
    return end_of(job, status, None if status in (0, STOPPED) else last_error(log, begin))


def command_of(queue: Queue, job: Job) -> list[str]:
    """The command line of a job's process."""
    return [sys.executable, "-m", "backpropagate.cli.job", str(queue.folder.resolve()), str(job.id)]


def wait(child: subprocess.Popen[bytes]) -> int:
    """The exit status; the first Ctrl-C lets the job save, the second one ends it."""
    interrupted = False
    while True:
        try:
            status = child.wait()
            return STOPPED if interrupted and status not in (0, TURNED_AWAY) else status
        except KeyboardInterrupt:
            if interrupted:
                child.kill()
            elif OWN_GROUP:
                child.send_signal(signal.SIGINT)
            interrupted = True


def last_error(log: Path, begin: int) -> str | None:
    """The last line of the log, from byte ``begin`` on, that starts with a code."""
    with log.open("rb") as file:
        file.seek(max(begin, log.stat().st_size - 2**16))
        lines = file.read().decode(errors="replace").splitlines()
    return next((line for line in reversed(lines) if line.startswith("[") and "]: " in line), None)


def _without_settings(environ: Mapping[str, str]) -> dict[str, str]:
    kept = settings_in(environ)
    return {k: v for k, v in environ.items() if k not in kept}


def run_all(queue: Queue) -> None:
    """Run every job that waits, one after another, those added meanwhile included; nothing if another process does."""
    with contextlib.suppress(QueueBusyError):
        # A job added between the last look and the release of the queue would wait for nobody: look once more.
        while run_queue(queue, lambda _what, _job: None) or any(job.state == "waiting" for job in queue.jobs()):
            pass
