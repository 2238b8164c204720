"""What happens in a run, as small values: a rail emits them; the store, the screen and trackers read them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from bp_runs.plan import Event, RowCounts, RunPlanned

__all__ = [
    "AdapterSaved",
    "CheckpointSaved",
    "DataReady",
    "Emit",
    "EvalDone",
    "Event",
    "ModelLoaded",
    "Notice",
    "Resumed",
    "RowCounts",
    "RunPlanned",
    "SampleAnswer",
    "StepDone",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelLoaded(Event):
    """The base model is in memory and has its adapter."""

    kind = "model"
    name: str
    revision: str | None
    """The commit that was loaded; None for a local folder."""
    config_sha256: str
    parameters: int
    trainable: int
    """Parameters that the adapter trains."""
    mode: str
    """What was trained: ``lora``, ``qlora`` or ``full``, with the reason where it was chosen for the user."""
    dtype: str
    device: str
    """With the reason, as in ``cpu (no CUDA device)``."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DataReady(Event):
    """The rows are tokenized, masked and counted: read = whole + truncated + dropped.

    The counts say what can be trained on. What the steps get to is in `RunPlanned` and in the outcome.
    """

    kind = "data"
    path: str
    sha256: str
    revision: str | None = None
    """The Hub commit of a data set; None for files of the user's."""
    template: str
    """Name of the chat template's source."""
    template_sha256: str
    read: int
    whole: int
    """Rows that can be trained on whole."""
    truncated: int
    """Rows that can be trained on without their end."""
    dropped: int
    heldout: int = 0
    """Rows, of those trained and truncated, that only measure the validation loss."""
    tokens: int
    trained_tokens: int
    """Tokens that are trained on."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepDone(Event):
    """An optimizer step is done."""

    kind = "step"
    step: int
    steps: int
    loss: float
    """Mean cross-entropy over the step's trained tokens, in nats."""
    learning_rate: float
    grad_norm: float | None
    tokens: int
    """Tokens seen since the run began, prompts included."""
    tokens_per_second: float
    memory_bytes: int
    """Peak memory: the GPU's allocation, or the process's resident set on a CPU."""
    temperature: float | None = None
    """Of the GPU, in degrees Celsius; None where nothing tells it."""
    metrics: Mapping[str, float] = field(default_factory=dict)
    """What else the method measures: ``accuracy`` and ``margin`` of methods that compare answers."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EvalDone(Event):
    """The validation rows were measured after a step."""

    kind = "eval"
    step: int
    loss: float
    """The method's loss: for sft the mean cross-entropy over the validation rows' trained tokens, in nats."""
    tokens: int
    """Trained tokens of the validation rows."""
    best: bool
    """Whether no earlier measurement was as low."""
    metrics: Mapping[str, float] = field(default_factory=dict)
    """As `StepDone.metrics`, over the validation rows."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SampleAnswer(Event):
    """The model's greedy answer to one of the sample prompts."""

    kind = "sample"
    step: int
    prompt: str
    answer: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Notice(Event):
    """Something that the user should know."""

    kind = "notice"
    message: str
    level: Literal["info", "warning"] = "info"
    details: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterSaved(Event):
    """The adapter folder is complete."""

    kind = "adapter"
    path: str
    bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointSaved(Event):
    """A checkpoint is whole on the disk."""

    kind = "checkpoint"
    step: int
    path: str
    bytes: int
    seconds: float
    reason: str
    """Why now, see `bp_runs.checkpoint_store.Reason`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Resumed(Event):
    """The run continues from a checkpoint; what was recorded of later steps is superseded."""

    kind = "resumed"
    step: int
    """Steps that the checkpoint holds; 0: from the beginning."""
    checkpoint: str | None
    """Its folder's name."""


Emit = Callable[[Event], None]
"""Takes an event and returns fast; a CodedError that it raises (a full disk, say) ends the run."""
