"""Documents of commands that train, merge and evaluate, and of what they need."""

from __future__ import annotations

from typing import Any, TypedDict

from bp_runs.errors import RunStatus


class RowCounts(TypedDict):
    """What became of every row that was read: each is in one of the five counts after ``read``."""

    read: int
    visited: int
    truncated: int
    not_reached: int
    held_out: int
    dropped: int
    passes: float


class Outcome(TypedDict):
    """How a training ended; losses in nats, seconds of the loop alone."""

    adapter: str
    steps: int
    first_loss: float
    final_loss: float
    tokens: int
    seconds: float
    peak_memory: int
    stopped: bool
    eval_loss: float | None
    best_step: int | None
    rows: RowCounts | None


class Train(TypedDict):
    """`backprop train`, `resume`, `replay` and `extend`."""

    run_id: str
    status: RunStatus
    adapter: str
    result: Outcome


class SaidAnswer(TypedDict):
    """One prompt answered before the training, after it, and by the GGUF."""

    prompt: str
    before: str
    after: str
    gguf: str


class Quickstart(TypedDict):
    """`backprop quickstart`."""

    run_id: str
    status: RunStatus
    adapter: str
    gguf: str
    result: Outcome
    answers: list[SaidAnswer]
    losses: list[float]
    seconds: dict[str, float]


class ModelRow(TypedDict):
    """A base model; needed: bytes by mode for 2 rows of 2,048 tokens at rank 16, empty where no rail can say."""

    name: str
    model: str
    licence: str
    restriction: str
    note: str
    parameters: int | None
    needed_bytes: dict[str, int]


class Models(TypedDict):
    """`backprop models`."""

    models: list[ModelRow]


class SupportRow(TypedDict):
    """A class of models; stages: by name passed, failed, rejected or not tested, empty if never tried."""

    architecture: str
    gguf: str
    stages: dict[str, str]
    reasons: dict[str, str]
    versions: dict[str, str]


class ModelsSupported(TypedDict):
    """`backprop models --supported`."""

    classes: list[SupportRow]


class CertificateStage(TypedDict):
    """A stage of a certificate."""

    name: str
    state: str
    note: str
    fix: str


class CertificateDocument(TypedDict):
    """`backprop models --certify`."""

    architecture: str
    stages: list[CertificateStage]
    versions: dict[str, str]
    passed: bool


class Download(TypedDict):
    """`backprop download`; bytes: on disk, what was removed too."""

    model: str
    folder: str
    bytes: int
    removed: bool


class EstimateVram(TypedDict):
    """`backprop estimate-vram`; in use: the highest sum of the parts at one time."""

    model: str
    mode: str
    parameters: int
    trained: int
    parts_bytes: dict[str, int]
    in_use_bytes: int
    beside_bytes: int
    needed_bytes: int
    paged_bytes: int
    memory_bytes: int | None
    fits: bool | None
    measured_runs: int


class LongestRow(TypedDict):
    """Longest rows in tokens by a GPU's GiB, for one way to train."""

    model: str
    mode: str
    preset: str
    longest: dict[str, int | None]


class EstimateVramTable(TypedDict):
    """`backprop estimate-vram --table`."""

    cards_gib: list[int]
    rows: list[LongestRow]


class ScorecardBody(TypedDict):
    """losses[i][j]: held-out loss, in nats, on run j + 1's data after run i + 1; scores: as losses, of the metric."""

    runs: list[str]
    names: list[str]
    losses: list[list[float]]
    merge: str | None
    before_merge: list[float]
    before_run: list[float]
    metric: str | None
    scores: list[list[float]]
    scores_before: list[float]
    average: float | None
    backward_transfer: float | None
    forgetting: float | None
    merge_cost: float | None


class MultiRun(TypedDict):
    """`backprop multi-run`; runs: those that were merged, rejected: those that the gate left out."""

    run_id: str
    status: RunStatus
    adapter: str
    runs: list[str]
    rejected: list[str]
    score_card: ScorecardBody
    result: Outcome


class Merge(TypedDict):
    """`backprop merge`; kept: share of the change's squared norm that the cut to rank kept."""

    path: str
    method: str
    paper: str
    adapters: list[str]
    weights: list[float] | None
    modules: int
    rank: int
    kept: float
    bytes: int
    notes: list[str]


class Measure(TypedDict):
    """One measure of two models; ``low`` and ``high`` bound the difference, null where one row tells nothing."""

    name: str
    base: float
    tuned: float
    low: float | None
    high: float | None
    rows: int
    verdict: str


class Eval(TypedDict):
    """`backprop eval`."""

    adapter: str
    against: str
    data: str
    part: str
    run_id: str | None
    rows: int
    verdict: str
    measures: list[Measure]
    answers: list[dict[str, str | None]]
    losses: dict[str, list[float]]
    blind: dict[str, Any] | None
    gate: dict[str, Any] | None
