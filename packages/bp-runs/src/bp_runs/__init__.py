"""What a training run is: spec, events, outcome, record, adapter folder, coded errors. No framework."""

from bp_runs.adapter import AdapterFolder, read_adapter_folder
from bp_runs.errors import CodedError, ContractError, registered_codes
from bp_runs.events import Emit, Event
from bp_runs.rail import Probe, Rail, Stop, TrainOutcome
from bp_runs.record import RunRecord
from bp_runs.redact import redact, redact_data
from bp_runs.spec import DataSpec, LoraSpec, ModelSpec, RunFolders, Settings, TrainingSpec, TrainSpec
from bp_runs.store import RunStore, RunWriter

__all__ = [
    "AdapterFolder",
    "CodedError",
    "ContractError",
    "DataSpec",
    "Emit",
    "Event",
    "LoraSpec",
    "ModelSpec",
    "Probe",
    "Rail",
    "RunFolders",
    "RunRecord",
    "RunStore",
    "RunWriter",
    "Settings",
    "Stop",
    "TrainOutcome",
    "TrainSpec",
    "TrainingSpec",
    "read_adapter_folder",
    "redact",
    "redact_data",
    "registered_codes",
]
