"""The rail protocol: how a package that can train says so, and trains."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from bp_runs.events import Emit
from bp_runs.spec import Settings, TrainSpec

Stop = Callable[[], bool]
"""Asked after each step; True ends the run after that step, and what was trained is kept."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Probe:
    """Whether a rail can train here, and why."""

    usable: bool
    why: str
    """The fact that decided: ``CUDA device NVIDIA …`` or ``mlx is not installed``."""
    device: str = ""
    memory: int | None = None
    """Bytes of memory that training can use; None where unknown."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainOutcome:
    """What came out of a run that ended well or was stopped by the user."""

    adapter: Path
    steps: int
    """Steps done; less than asked when stopped."""
    first_loss: float
    final_loss: float
    """Means over the first and the last tenth of the steps, at least one step each."""
    tokens: int
    seconds: float
    """Of the loop alone, without loading."""
    peak_memory: int
    """Bytes; as `StepDone.memory_bytes`."""
    stopped: bool = False
    eval_loss: float | None = None
    """The lowest validation loss; None without held-out rows."""
    best_step: int | None = None
    """The step that it was measured after."""

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {**asdict(self), "adapter": str(self.adapter)}


@runtime_checkable
class Rail(Protocol):
    """A way to train. Found through the entry-point group ``backpropagate.rails``."""

    @property
    def name(self) -> str:
        """The word after ``--backend``."""
        ...

    def probe(self) -> Probe:
        """Look whether this machine can be trained on; imports what it must, raises nothing."""
        ...

    def check(self, settings: Settings, folder: Path) -> None:
        """Refuse a model that cannot be trained here; ``folder`` has its config and perhaps no weights yet.

        Raises:
            CodedError: Why not.
        """
        ...

    def train(self, spec: TrainSpec, emit: Emit, stop: Stop) -> TrainOutcome:
        """Train and leave an adapter folder at ``spec.folders.adapter``.

        Raises:
            CodedError: Whatever went wrong; nothing is left at ``spec.folders.adapter`` then.
        """
        ...


def mean_ends(losses: list[float]) -> tuple[float, float]:
    """Means over the first and the last tenth of ``losses`` (at least one value each), in nats."""
    share = max(1, len(losses) // 10)
    return sum(losses[:share]) / share, sum(losses[-share:]) / share
