"""Commands that the page starts: jobs of a queue in the page's folder, run one at a time.

Each runs in a process of its own (`backpropagate.cli.job`), so closing the page or the server ends none of them,
and a new server finds them again. Several training runs at once on one GPU would only fail; the next one waits.
"""

from __future__ import annotations

import os
import platform
import shlex
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from backpropagate.errors import JobNotFoundError
from backpropagate.jobs.queue import Job, Queue, settings_in
from bp_runs.errors import PathUnusableError, RunActiveError
from bp_runs.process import is_own_process
from bp_runs.record import RunRecord
from bp_runs.redact import redact
from bp_runs.store import RunStore

FOLDER = ".jobs"
_TAIL = 16 * 2**10  # bytes of a log that are shown
_LOOKED_AT = 20  # newest runs among which a job's own is looked for
CAN_STOP = os.name != "nt"
"""Whether another process can be asked to finish its step; Windows can only end it."""

# A session of its own: closing the terminal or the server does not reach it.
_APART: dict[str, Any] = (
    {"start_new_session": True}
    if CAN_STOP
    else {
        "creationflags": getattr(subprocess, "CREATE_NEW_PROCESS_GROUP", 0) | getattr(subprocess, "DETACHED_PROCESS", 0)
    }
)


def command_line(job: Job) -> str:
    """What to type in a shell to do the same, secrets masked."""
    return redact(f"backprop {shlex.join(job.argv)}")


def output_of(job: Job) -> Path | None:
    """The output folder that a job's run is recorded in; None for commands without a run."""
    if job.argv[0] not in ("train", "replay", "resume", "multi-run"):
        return None
    return next((Path(word.removeprefix("--output=")) for word in job.argv if word.startswith("--output=")), None)


@dataclass(slots=True)
class BackgroundJobs:
    """The jobs of the page's folder."""

    own: Path
    """The folder that the page writes in."""
    _runners: list[subprocess.Popen[bytes]] = field(default_factory=list)
    _asked: set[tuple[str, int, str | None]] = field(default_factory=set)
    """Processes that were asked to stop, with their runs: a resumed run is another process."""

    @property
    def queue(self) -> Queue:
        """Where the jobs are."""
        return Queue(self.own / FOLDER)

    def start(self, argv: Sequence[str]) -> Job:
        """Add ``backprop`` with these words, in the server's folder and with its settings; run it when it is its turn.

        Raises:
            PathUnusableError: The queue's process cannot be started.
            DiskFullError, OutputNotWritableError: There is no room for the job.
        """
        environ = {k: v for k, v in settings_in(os.environ).items() if not k.startswith("BACKPROPAGATE_UI__")}
        job = self.queue.add(argv, Path.cwd(), environ)
        self.run_queue()
        return job

    def run_queue(self) -> None:
        """Start the process that works through the queue, unless there is one.

        Raises:
            PathUnusableError: It cannot be started.
        """
        self.reap()
        queue = self.queue
        if queue.is_run() or not any(job.state in ("waiting", "running") for job in queue.jobs()):
            return
        environ = {k: v for k, v in os.environ.items() if not k.startswith("BACKPROPAGATE_UI__")}
        command = [sys.executable, "-m", "backpropagate.cli.job", str(queue.folder)]
        streams: dict[str, Any] = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.DEVNULL)
        try:
            runner = subprocess.Popen(command, env=environ, **streams, **_APART)  # noqa: S603  # our own program
        except OSError as error:
            raise PathUnusableError("the queue's process cannot be started", cause=error.strerror) from error
        self._runners.append(runner)

    def newest(self, count: int = 10) -> list[Job]:
        """The newest ones first."""
        return self.queue.jobs()[::-1][:count]

    def find(self, number: str) -> Job:
        """The job of an address.

        Raises:
            JobNotFoundError: There is none.
        """
        for job in self.queue.jobs():
            if str(job.id) == number:
                return job
        raise JobNotFoundError(f"there is no job {number[:20]!r}")

    def is_alive(self, job: Job) -> bool:
        """Whether the job waits or works."""
        return job.state == "waiting" or (
            job.state == "running" and (self.queue.is_run() or self.queue.is_at_work(job))
        )

    def log_of(self, job: Job) -> str:
        """The last lines that the job printed, secrets masked."""
        try:
            with self.queue.log_of(job).open("rb") as file:
                file.seek(max(0, file.seek(0, os.SEEK_END) - _TAIL))
                return redact(file.read().decode(errors="replace"))
        except OSError:
            return ""

    def run_of(self, job: Job) -> str | None:
        """The id of the run that the job's process records; None before it is there."""
        output = output_of(job)
        if output is None or job.pid is None or job.started_at is None:
            return None
        store = RunStore(output)
        rows = store.list_runs()
        for row in rows[:_LOOKED_AT] + [row for row in rows[_LOOKED_AT:] if row["status"] == "running"]:
            sessions = store.load(row["run_id"]).sessions
            if any(s["pid"] == job.pid and s["at"] >= job.started_at for s in sessions):
                return str(row["run_id"])
        return None

    def cancel(self, job: Job) -> None:
        """Remove a job that waits; ask one that works to save and end.

        Raises:
            JobNotFoundError: It has ended.
        """
        if job.state == "running" and job.pid and self.queue.is_at_work(job) and CAN_STOP:
            if job.pid > 1:
                os.kill(job.pid, signal.SIGTERM)
            return
        if job.state != "waiting":
            raise JobNotFoundError(f"job {job.id} has ended")
        self.queue.remove(job.id)

    def is_asked(self, record: RunRecord) -> bool:
        """Whether this server has asked the run's present process to stop."""
        return _process(record) in self._asked

    def stop(self, record: RunRecord) -> None:
        """Ask a run's process to finish its step and save; asked again, it ends at once, as Ctrl-C twice.

        Raises:
            RunActiveError: It runs elsewhere, or cannot be asked on this system.
        """
        if record.host != platform.node():
            raise RunActiveError(f"the run {record.run_id} is running on {record.host}")
        if not CAN_STOP:
            raise RunActiveError("Windows cannot ask another process to save", fix="Press Ctrl-C where it runs.")
        if record.status == "running" and is_own_process(record.pid, record.process_started):
            os.kill(record.pid, signal.SIGTERM)
            self._asked.add(_process(record))

    def reap(self) -> None:
        """Forget the queue's processes that have ended."""
        self._runners = [runner for runner in self._runners if runner.poll() is None]


def _process(record: RunRecord) -> tuple[str, int, str | None]:
    return record.run_id, record.pid, record.process_started
