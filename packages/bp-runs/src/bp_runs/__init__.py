"""What a training run is: spec, events, outcome, record, adapter folder, coded errors. No framework.

Names load their modules when they are first used: importing one error must not open the store.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bp_runs.adapter import AdapterFolder, read_adapter_folder
    from bp_runs.errors import CodedError, ContractError, registered_codes
    from bp_runs.events import Emit, Event
    from bp_runs.rail import (
        Estimates,
        EvalOutcome,
        KeepsBase,
        MemoryEstimate,
        Part,
        Probe,
        Rail,
        Stop,
        TrainOutcome,
        TrainsTogether,
        keep_base,
    )
    from bp_runs.record import RunRecord
    from bp_runs.redact import redact, redact_data
    from bp_runs.spec import (
        DataSpec,
        LoraSpec,
        ModelSpec,
        Ranks,
        RunFolders,
        Settings,
        TrainingSpec,
        TrainSpec,
    )
    from bp_runs.store import RunStore
    from bp_runs.writer import RunWriter

_HOMES = {
    "adapter": ("AdapterFolder", "read_adapter_folder"),
    "errors": ("CodedError", "ContractError", "registered_codes"),
    "events": ("Emit", "Event"),
    "rail": (
        "Estimates",
        "EvalOutcome",
        "KeepsBase",
        "MemoryEstimate",
        "Part",
        "Probe",
        "Rail",
        "Stop",
        "TrainOutcome",
        "TrainsTogether",
        "keep_base",
    ),
    "record": ("RunRecord",),
    "redact": ("redact", "redact_data"),
    "spec": (
        "DataSpec",
        "LoraSpec",
        "ModelSpec",
        "Ranks",
        "RunFolders",
        "Settings",
        "TrainSpec",
        "TrainingSpec",
    ),
    "store": ("RunStore",),
    "writer": ("RunWriter",),
}
_HOME = {name: home for home, names in _HOMES.items() for name in names}

__all__ = [
    "AdapterFolder",
    "CodedError",
    "ContractError",
    "DataSpec",
    "Emit",
    "Estimates",
    "EvalOutcome",
    "Event",
    "KeepsBase",
    "LoraSpec",
    "MemoryEstimate",
    "ModelSpec",
    "Part",
    "Probe",
    "Rail",
    "Ranks",
    "RunFolders",
    "RunRecord",
    "RunStore",
    "RunWriter",
    "Settings",
    "Stop",
    "TrainOutcome",
    "TrainSpec",
    "TrainingSpec",
    "TrainsTogether",
    "keep_base",
    "read_adapter_folder",
    "redact",
    "redact_data",
    "registered_codes",
]


def __getattr__(name: str) -> Any:
    """Load a public name's module on first use."""
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
