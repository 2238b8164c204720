"""Documents of commands that look at recorded runs and queued jobs, or change them."""

from __future__ import annotations

from typing import Any, NotRequired, TypedDict

from bp_runs.errors import RunStatus


class RunRow(TypedDict):
    """A run in the index."""

    run_id: str
    kind: str
    parent: str | None
    sequence: int
    status: RunStatus
    created_at: str
    ended_at: str | None
    rail: str
    model: str | None
    data: str | None
    steps: int | None
    steps_asked: int | None
    first_loss: float | None
    final_loss: float | None
    seconds: float | None
    error: str | None
    tags: list[str]
    title: NotRequired[str]


class ListRuns(TypedDict):
    """`backprop list-runs`."""

    runs: list[RunRow]
    total: int


class Record(TypedDict):
    """A run's record, run.json; its own ``schema`` has the number."""

    schema: str
    run_id: str
    kind: str
    parent: dict[str, Any] | None
    sequence: int
    status: RunStatus
    created_at: str
    ended_at: str | None
    sessions: list[dict[str, Any]]
    progress: dict[str, Any]
    tags: list[str]
    note: str
    title: str
    command: list[str]
    rail: str
    settings: dict[str, dict[str, Any]]
    base: dict[str, Any]
    model: dict[str, Any]
    data: dict[str, Any]
    plan: dict[str, Any]
    versions: dict[str, str]
    hardware: dict[str, Any]
    result: dict[str, Any]
    artifacts: list[dict[str, Any]]
    error: dict[str, Any] | None


class SavedCheckpoint(TypedDict):
    """A checkpoint of a run; score is the validation loss in nats."""

    step: int
    path: str
    saved_at: str
    reason: str
    score: float | None
    bytes: int
    protected: bool


class ShowRun(TypedDict):
    """`backprop show-run`; damaged: what is wrong with checkpoints that count no more, by their folders' names."""

    record: Record
    metrics: list[dict[str, Any]]
    checkpoints: list[SavedCheckpoint]
    damaged: dict[str, str]
    proof: NotRequired[Prove]
    evaluations: NotRequired[list[dict[str, Any]]]


class Prove(TypedDict):
    """`backprop prove`, and prove.json: losses in nats; largest differences are null where a loss is not finite."""

    run_id: str
    at: str
    steps: int
    recorded: list[float]
    replayed: list[float | None]
    largest: float | None
    largest_relative: float | None
    tolerance: float
    why: str
    passed: bool
    versions: dict[str, str]


class DiffRuns(TypedDict):
    """`backprop diff-runs`: pairs are of the first and the second run; a point of the curve is step and both losses."""

    runs: tuple[str, str]
    status: tuple[str, str]
    settings: dict[str, tuple[Any, Any]]
    data: dict[str, tuple[Any, Any]]
    model: dict[str, tuple[Any, Any]]
    versions: dict[str, tuple[Any, Any]]
    hardware: dict[str, tuple[Any, Any]]
    result: dict[str, tuple[Any, Any]]
    evaluation: dict[str, tuple[float | None, float | None]]
    curve: list[tuple[int, float | None, float | None]]
    first_different_step: int | None


class ExportRuns(TypedDict):
    """`backprop export-runs`: how many went into the file."""

    runs: int
    format: str
    file: str | None


class RunsRemoved(TypedDict):
    """`backprop runs rm`."""

    removed: list[str]


class RunsTagged(TypedDict):
    """`backprop runs tag`: the run's tags now."""

    run_id: str
    tags: list[str]


class RunsNoted(TypedDict):
    """`backprop runs note`."""

    run_id: str
    note: str


class RunsNamed(TypedDict):
    """`backprop runs name`."""

    run_id: str
    title: str


class RunsProtected(TypedDict):
    """`backprop runs protect`."""

    run_id: str
    step: int
    checkpoint: str


class Report(TypedDict):
    """`backprop report`: the zip that was written."""

    run_id: str
    file: str


class RunsImported(TypedDict):
    """`backprop runs import`: runs that were added, those that were there, and rows that are no runs."""

    imported: list[str]
    known: list[str]
    left_out: list[str]


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
