"""Fine-tune a language model on one consumer GPU and have it running in Ollama, in three lines."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from backpropagate.hint_wording import PythonWording
from bp_runs.wording import set_wording

if TYPE_CHECKING:
    from backpropagate.continual.multirun import MultiRunResult
    from backpropagate.distributed.launchers import take_ranks
    from backpropagate.evaluation.evaluate import EvalResult
    from backpropagate.exporting import ExportResult
    from backpropagate.interrupts import on_interrupt
    from backpropagate.merging import merge_adapters
    from backpropagate.ollama import register_with_ollama
    from backpropagate.results import TrainResult
    from backpropagate.trainer import Trainer

__version__ = "2.0.0"

__all__ = [
    "EvalResult",
    "ExportResult",
    "MultiRunResult",
    "TrainResult",
    "Trainer",
    "merge_adapters",
    "on_interrupt",
    "register_with_ollama",
    "take_ranks",
]

set_wording(PythonWording())  # the command line sets its own

_HOMES = {
    "EvalResult": "backpropagate.evaluation.evaluate",
    "ExportResult": "backpropagate.exporting",
    "MultiRunResult": "backpropagate.continual.multirun",
    "TrainResult": "backpropagate.results",
    "Trainer": "backpropagate.trainer",
    "merge_adapters": "backpropagate.merging",
    "register_with_ollama": "backpropagate.ollama",
    "on_interrupt": "backpropagate.interrupts",
    "take_ranks": "backpropagate.distributed.launchers",
}


def __getattr__(name: str) -> Any:
    """Import the facade when it is first used, so that `import backpropagate` stays light."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    """The public names, and the version."""
    return sorted([*__all__, "__version__"])
