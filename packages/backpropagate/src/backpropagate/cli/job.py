"""The process of a queue's job, ``python -m backpropagate.cli.job FOLDER NUMBER``; without a number, of all jobs.

It holds the job's own lock for as long as it lives and records how it ended, so that a job that outlives whoever
started it is neither started twice nor forgotten.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from filelock import Timeout

from backpropagate.cli.app import run
from backpropagate.cli.error_output import prepare_process
from backpropagate.jobs.queue import LOOK_SECONDS, STOPPED, Queue, end_of
from backpropagate.jobs.worker import TURNED_AWAY, last_error, run_all


def work(queue: Queue, number: int) -> int:
    """Be the process of a job: hold its lock, run its command, record how it ended; returns the exit status."""
    try:
        lock = queue.lock_of(number).acquire(timeout=LOOK_SECONDS)
    except Timeout:
        return TURNED_AWAY
    with lock:
        job = queue.begin(number, os.getpid())
        if job is None:
            return TURNED_AWAY
        log = queue.log_of(job)
        begin = log.stat().st_size if log.exists() else 0
        prepare_process()
        sys.argv = ["backprop", *job.argv]
        status = run(job.argv)
        sys.stdout.flush()
        sys.stderr.flush()
        error = last_error(log, begin) if status not in (0, STOPPED) and log.exists() else None
        queue.note(end_of(job, status, error))
    return status


def main(argv: Sequence[str]) -> int:
    """Entry point: the queue's folder, and a job's number for one job."""
    folder, *number = argv
    queue = Queue(Path(folder))
    if number:
        return work(queue, int(number[0]))
    run_all(queue)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
