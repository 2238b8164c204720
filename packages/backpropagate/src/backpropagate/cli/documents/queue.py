"""Documents of `backprop queue`."""

from __future__ import annotations

from typing import TypedDict


class JobRow(TypedDict):
    """A job of the queue."""

    id: int
    argv: list[str]
    cwd: str
    state: str
    tries: int
    pid: int | None
    added_at: str
    started_at: str | None
    ended_at: str | None
    exit_status: int | None
    error: str | None


class QueueAdd(TypedDict):
    """`backprop queue add`."""

    job: JobRow


class QueueRun(TypedDict):
    """`backprop queue run`: the jobs that were run, and how many ended in each state."""

    jobs: list[JobRow]
    states: dict[str, int]


class QueueList(TypedDict):
    """`backprop queue list`; running: whether a process works through the queue."""

    jobs: list[JobRow]
    running: bool


class QueueRm(TypedDict):
    """`backprop queue rm`."""

    removed: int
