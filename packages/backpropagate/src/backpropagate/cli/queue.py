"""`backprop queue`: several runs one after another, continuing after errors."""

from __future__ import annotations

import os
import shlex
import signal
from collections import Counter
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter

from backpropagate.cli.flags import Json
from backpropagate.cli.output import print_json
from backpropagate.errors import CommandLineError, JobNotFoundError, QueuePartialError
from backpropagate.jobs.queue import Job, Queue, settings_in
from backpropagate.jobs.worker import run_queue


def add(*command: Annotated[str, Parameter(allow_leading_hyphen=True)]) -> int:
    """Put a command at the end of the queue; it is checked now and run later, in this folder.

    Parameters
    ----------
    command: str
        The command with its flags, as after ``backprop``: train --data week1.jsonl
    """
    as_json = "--json" in command
    words = [word for word in command if word != "--json"]
    _check(words)
    job = Queue.of_home(os.environ).add(words, Path.cwd(), settings_in(os.environ))
    if as_json:
        print_json("queue-add", {"job": _body(job)})
        return 0
    print(f"  job {job.id}     backprop {shlex.join(job.argv)}")  # noqa: T201
    print("  next      backprop queue run")  # noqa: T201
    return 0


def _check(words: list[str]) -> None:
    """Reject now what would fail later."""
    from backpropagate.cli.app import build_app

    if not words:
        raise CommandLineError("no command to queue", fix="Name it: backprop queue add train --data my_data.jsonl")
    if words[0] == "queue" or words[0].startswith("-"):
        raise CommandLineError(f"{words[0]!r} cannot be queued", fix="Queue a command such as train or export.")
    build_app().parse_args(words, exit_on_error=False, print_error=False)


def run(*, json: Json = False) -> int:
    """Work through the queue; a job that fails does not stop the next one.

    Ctrl-C lets the running job save what it has and stops; start it again and it continues with the next.
    When the terminal is closed the queue ends, and the running job trains on in its own process.
    """
    if (hangup := getattr(signal, "SIGHUP", None)) and signal.getsignal(hangup) is not signal.SIG_IGN:
        signal.signal(hangup, signal.SIG_DFL)  # a job has its own session, which no closed terminal reaches
    queue = Queue.of_home(os.environ)
    ended = run_queue(queue, lambda what, job: None if json else _say(queue, what, job))
    states = Counter(job.state for job in ended)
    if json:
        print_json("queue-run", {"jobs": [_body(job) for job in ended], "states": dict(states)})
    elif not ended:
        print("  nothing waits; add something: backprop queue add train --data my_data.jsonl")  # noqa: T201
    else:
        print(f"  queue     {', '.join(f'{count} {state}' for state, count in states.items())}")  # noqa: T201
    if states["stopped"]:
        return 130
    if json:
        return QueuePartialError.exit_status if states["failed"] else 0
    if failed := [job for job in ended if job.state == "failed"]:
        names = ", ".join(f"{job.id} ({job.error or f'exit {job.exit_status}'})" for job in failed)
        raise QueuePartialError(f"{len(failed)} of {len(ended)} jobs failed: {names}")
    return 0


def _say(queue: Queue, what: str, job: Job) -> None:
    if what == "started":
        print(f"  job {job.id}     backprop {shlex.join(job.argv)}", flush=True)  # noqa: T201
        return
    if what == "found at work":
        print(f"  job {job.id}     is still at work, begun at {job.started_at}; waiting for it", flush=True)  # noqa: T201
        return
    told = f": {job.error}" if job.error else ""
    print(f"            {job.state}{told}; log: {queue.log_of(job)}", flush=True)  # noqa: T201


def list_(*, json: Json = False) -> int:
    """List the jobs: waiting, running, done, failed, stopped, lost."""
    queue = Queue.of_home(os.environ)
    jobs, is_run = queue.jobs(), queue.is_run()
    if json:
        print_json("queue-list", {"jobs": [_body(job) for job in jobs], "running": is_run})
        return 0
    for job in jobs:
        is_gone = job.state == "running" and not is_run and not queue.is_at_work(job)
        state = "cut off" if is_gone else job.state
        print(f"  {job.id:>3}  {state:<8} backprop {shlex.join(job.argv)}  ({job.cwd})")  # noqa: T201
        if job.error:
            print(f"       {job.error}; log: {queue.log_of(job)}")  # noqa: T201
    if not jobs:
        print("  the queue is empty; add something: backprop queue add train --data my_data.jsonl")  # noqa: T201
    return 0


def rm(*jobs: int, ended: Annotated[bool, Parameter(negative="")] = False, json: Json = False) -> int:
    """Take jobs out of the queue.

    Parameters
    ----------
    jobs: int
        Their numbers, as `backprop queue list` shows them.
    ended: bool
        Remove all finished jobs.
    """
    queue = Queue.of_home(os.environ)
    if not jobs and not ended:
        raise JobNotFoundError("no job was named")
    for number in jobs:
        queue.remove(number)
    gone = len(jobs) + (queue.remove_ended() if ended else 0)
    if json:
        print_json("queue-rm", {"removed": gone})
    else:
        print(f"  removed   {gone}")  # noqa: T201
    return 0


def _body(job: Job) -> dict[str, Any]:
    return {
        "id": job.id,
        "argv": list(job.argv),
        "cwd": job.cwd,
        "state": job.state,
        "tries": job.tries,
        "pid": job.pid,
        "added_at": job.added_at,
        "started_at": job.started_at,
        "ended_at": job.ended_at,
        "exit_status": job.exit_status,
        "error": job.error,
    }
