"""The JSON documents that ``--json`` prints, by kind: what a script may rely on.

A document is ``{"schema": "backpropagate.<kind>/1", …}``. Keys may be added under the same number; one that is taken
away or changes its meaning raises the number. JSON Schemas are made from this module (docs/reference/schemas), and the
tests hold every document that any of them prints to its schema.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypedDict

from bp_runs.errors import RunStatus


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


class Train(TypedDict):
    """`backprop train`, `resume` and `replay`."""

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


class Export(TypedDict):
    """`backprop export`."""

    path: str
    format: str
    quantization: str | None
    bytes: int
    tensors: int
    seconds: float
    sha256: str
    parity: dict[str, Any] | None
    ollama: str | None
    run_id: str | None


class ScoreCardBody(TypedDict):
    """losses[i][j]: held-out loss, in nats, on run j + 1's data after run i + 1."""

    runs: list[str]
    names: list[str]
    losses: list[list[float]]
    before_merge: list[float]
    before_run: list[float]
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
    score_card: ScoreCardBody
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


class PlannedTensor(TypedDict):
    """A tensor of a GGUF that is planned."""

    name: str
    source: str | None
    type: str
    shape: list[int]
    bytes: int
    is_changed: bool


class ExportPlan(TypedDict):
    """`backprop export --dry-run`."""

    path: str
    tensors: list[PlannedTensor]
    bytes: int
    free_bytes: int
    seconds: float


class Imatrix(TypedDict):
    """`backprop imatrix`."""

    path: str
    tensors: int
    chunks: int
    tokens: int


class Push(TypedDict):
    """`backprop push`."""

    repo: str
    url: str
    commit: str
    files: list[str]
    bytes: int
    run_id: str | None


class PushPlan(TypedDict):
    """`backprop push --dry-run`."""

    repo: str
    files: list[str]
    card: str


class Chat(TypedDict):
    """`backprop chat --prompt`."""

    target: str
    prompt: str
    answer: str


class OllamaRegister(TypedDict):
    """`backprop ollama register`."""

    name: str
    host: str
    version: str
    template: str
    stop: list[str]
    is_raw: bool
    answer: str | None


class OllamaRow(TypedDict):
    """A model that Ollama has."""

    name: str
    bytes: int
    digest: str


class OllamaList(TypedDict):
    """`backprop ollama list`."""

    models: list[OllamaRow]


class OllamaRemoved(TypedDict):
    """`backprop ollama rm`."""

    removed: str


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


class RunRow(TypedDict):
    """A run in the index."""

    run_id: str
    kind: str
    parent: str | None
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
    status: RunStatus
    created_at: str
    ended_at: str | None
    sessions: list[dict[str, Any]]
    progress: dict[str, Any]
    tags: list[str]
    note: str
    command: list[str]
    rail: str
    settings: dict[str, dict[str, Any]]
    model: dict[str, Any]
    data: dict[str, Any]
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
    """`backprop show-run`."""

    record: Record
    metrics: list[dict[str, Any]]
    checkpoints: list[SavedCheckpoint]


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


class RunsProtected(TypedDict):
    """`backprop runs protect`."""

    run_id: str
    step: int
    checkpoint: str


class RunsImported(TypedDict):
    """`backprop runs import`: runs that were added, and those that were there."""

    imported: list[str]
    known: list[str]


class Drop(TypedDict):
    """A row that is not trained on."""

    row: int
    code: str
    reason: str


class Validate(TypedDict):
    """`backprop validate`: read = trained + truncated + dropped."""

    data: str
    sha256: str
    read: int
    trained: int
    truncated: int
    dropped: int
    tokens: int
    trained_tokens: int
    rejected: list[Drop]


class Piece(TypedDict):
    """Text of neighbouring tokens that share a fate."""

    text: str
    trained: bool
    special: bool
    truncated: bool


class PreviewRow(TypedDict):
    """A row, piece by piece."""

    row: int
    tokens: int
    trained_tokens: int
    rejected: dict[str, str] | None
    pieces: list[Piece]


class DataPreview(TypedDict):
    """`backprop data preview`."""

    data: str
    rows: list[PreviewRow]


class DataReport(TypedDict):
    """`backprop data report`."""

    path: str
    rows: int
    usable: int
    rejected: dict[str, Any]
    formats: dict[str, int]
    exact: dict[str, Any]
    near: dict[str, Any]
    lengths: dict[str, Any]


class DataRewritten(TypedDict):
    """`backprop data split`, `clean` and `convert`: rows written by file."""

    read: int
    written: dict[str, int]
    dropped: int
    dropped_by_code: dict[str, int]
    rejected: str | None


class JobRow(TypedDict):
    """A job of the queue."""

    id: int
    argv: list[str]
    cwd: str
    state: str
    tries: int
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


class SettingRow(TypedDict):
    """One setting."""

    key: str
    value: Any
    source: str
    default: Any
    help: str
    choices: list[str]
    flags: list[str]
    variable: str


class ConfigShow(TypedDict):
    """`backprop config show`."""

    file: str | None
    settings: list[SettingRow]


class RailRow(TypedDict):
    """A rail and what it says of this machine."""

    name: str
    usable: bool
    why: str
    device: str
    memory: int | None


class Info(TypedDict):
    """`backprop info`."""

    machine: dict[str, Any]
    versions: dict[str, str]
    rails: list[RailRow]
    home: str
    offline: bool
    settings: dict[str, Any]


class CheckRow(TypedDict):
    """What one check found."""

    name: str
    state: str
    message: str
    fix: str | None


class Doctor(TypedDict):
    """`backprop doctor`; failed: names of the checks without which training does not work."""

    checks: list[CheckRow]
    failed: list[str]


class ErrorRow(TypedDict):
    """A code of the catalogue."""

    code: str
    when: str
    way_out: str
    exit_status: int


class Errors(TypedDict):
    """`backprop errors`."""

    errors: list[ErrorRow]


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
    """Longest rows in tokens by a card's GiB, for one way to train."""

    model: str
    mode: str
    preset: str
    longest: dict[str, int | None]


class EstimateVramTable(TypedDict):
    """`backprop estimate-vram --table`."""

    cards_gib: list[int]
    rows: list[LongestRow]


class ErrorBody(TypedDict):
    """What went wrong."""

    code: str
    message: str
    cause: str | None
    way_out: str
    exit_status: int
    details: dict[str, Any]


class Error(TypedDict):
    """What every command prints instead of its own document when it fails."""

    error: ErrorBody


DOCUMENTS: Mapping[str, type] = {
    "train": Train,
    "quickstart": Quickstart,
    "export": Export,
    "multi-run": MultiRun,
    "merge": Merge,
    "chat": Chat,
    "export-plan": ExportPlan,
    "imatrix": Imatrix,
    "push": Push,
    "push-plan": PushPlan,
    "ollama-register": OllamaRegister,
    "ollama-list": OllamaList,
    "ollama-rm": OllamaRemoved,
    "eval": Eval,
    "list-runs": ListRuns,
    "show-run": ShowRun,
    "resume": Train,
    "replay": Train,
    "diff-runs": DiffRuns,
    "export-runs": ExportRuns,
    "runs-rm": RunsRemoved,
    "runs-tag": RunsTagged,
    "runs-note": RunsNoted,
    "runs-protect": RunsProtected,
    "runs-import": RunsImported,
    "validate": Validate,
    "data-preview": DataPreview,
    "data-report": DataReport,
    "data-split": DataRewritten,
    "data-clean": DataRewritten,
    "data-convert": DataRewritten,
    "queue-add": QueueAdd,
    "queue-run": QueueRun,
    "queue-list": QueueList,
    "queue-rm": QueueRm,
    "config-show": ConfigShow,
    "config-explain": SettingRow,
    "models": Models,
    "estimate-vram": EstimateVram,
    "estimate-vram-table": EstimateVramTable,
    "doctor": Doctor,
    "info": Info,
    "errors": Errors,
    "error": Error,
}
"""The body of each kind of document."""


def build_schema(kind: str) -> dict[str, Any]:
    """The JSON Schema (2020-12) of a kind of document, ``schema`` key included.

    Raises:
        KeyError: There is no such kind.
    """
    import msgspec

    (body,), definitions = msgspec.json.schema_components([DOCUMENTS[kind]])
    name = body["$ref"].rpartition("/")[2]
    whole = dict(definitions.pop(name))
    whole["properties"] = {"schema": {"const": f"backpropagate.{kind}/1"}, **whole["properties"]}
    whole["required"] = ["schema", *whole["required"]]
    head = {"$schema": "https://json-schema.org/draft/2020-12/schema", "$id": f"backpropagate.{kind}.1.json"}
    return {**head, **whole, **({"$defs": definitions} if definitions else {})}
