"""How the queue starts the process of a job, `backpropagate.cli.job`, and waits for it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from backpropagate.jobs.queue import STOPPED, Job, Queue, end_of, settings_in
from bp_runs.record import utc_now

TURNED_AWAY = 75
"""Exit status of a process that finds another one at the job, or the job not to be run; sysexits' EX_TEMPFAIL."""

# A group of its own: Ctrl-C at the terminal reaches the queue, and it hands it on once.
OWN_GROUP: dict[str, Any] = {"start_new_session": True} if os.name != "nt" else {}


def run_job(queue: Queue, job: Job) -> Job | None:
    """Run a job to its end in a process of its own; None where another process is at it."""
    environ = {**_without_settings(os.environ), **job.environ}
    log = queue.log_of(job)
    with log.open("ab") as out:
        out.write(f"--- {utc_now()} backprop {' '.join(job.argv)}\n".encode())
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
    return end_of(job, status, None if status in (0, STOPPED) else told_error(log, begin))


def command_of(queue: Queue, job: Job) -> list[str]:
    """The command line of a job's process."""
    return [sys.executable, "-m", "backpropagate.cli.job", str(queue.folder.resolve()), str(job.id)]


def wait(child: subprocess.Popen[bytes]) -> int:
    """The exit status; the first Ctrl-C lets the job save, the second one ends it."""
    asked = False
    while True:
        try:
            status = child.wait()
            return STOPPED if asked and status not in (0, TURNED_AWAY) else status
        except KeyboardInterrupt:
            if asked:
                child.kill()
            elif OWN_GROUP:
                child.send_signal(signal.SIGINT)
            asked = True


def told_error(log: Path, begin: int) -> str | None:
    """The last line of the log, from byte ``begin`` on, that starts with a code."""
    with log.open("rb") as file:
        file.seek(max(begin, log.stat().st_size - 2**16))
        lines = file.read().decode(errors="replace").splitlines()
    return next((line for line in reversed(lines) if line.startswith("[") and "]: " in line), None)


def _without_settings(environ: Mapping[str, str]) -> dict[str, str]:
    kept = settings_in(environ)
    return {k: v for k, v in environ.items() if k not in kept}
