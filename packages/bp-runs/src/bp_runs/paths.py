"""The layout of an output folder, in one place.

<output>/lora                  the newest finished adapter (hard links into its run)
<output>/model                 the newest model from full fine-tuning (likewise)
<output>/run_history.json      index of summary rows, rebuilt from the run folders
<output>/runs/<run_id>/        run.json metrics.jsonl rejected.jsonl prove.json evaluations.json, lora/ or
                               model/, checkpoints/
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

ADAPTER_NAME = "lora"
MODEL_NAME = "model"
RECORD_FILE = "run.json"
METRICS_FILE = "metrics.jsonl"
REJECTED_FILE = "rejected.jsonl"
PROOF_FILE = "prove.json"
"""Losses of an independent replay, see `bp_runs.proof`."""
EVALUATIONS_FILE = "evaluations.json"
"""Evaluations of the run's adapter, see `bp_runs.evaluations`."""
LOCK_FILE = "alive.lock"
SETTINGS_FILE = "settings.json"
"""In a checkpoint: what the run's record says, to rebuild it from, see `bp_runs.recovery`."""
CHECKPOINTS = "checkpoints"
"""The run's folder of checkpoints, see `bp_runs.checkpoint_store`."""


def new_run_id(now: datetime | None = None) -> str:
    """A new id, sortable by time: ``20261123-153412-9f2c1a`` (UTC, six random hex digits)."""
    return f"{(now or datetime.now(UTC)):%Y%m%d-%H%M%S}-{os.urandom(3).hex()}"


def runs_folder(output: Path) -> Path:
    """``<output>/runs``."""
    return output / "runs"


def run_folder(output: Path, run_id: str) -> Path:
    """``<output>/runs/<run_id>``."""
    return runs_folder(output) / run_id


def journal_file(output: Path) -> Path:
    """``<output>/.run_history.journal``: rows that the index does not have yet."""
    return output / ".run_history.journal"


def index_file(output: Path) -> Path:
    """``<output>/run_history.json``."""
    return output / "run_history.json"


def sequence_file(output: Path) -> Path:
    """``<output>/.run_history.sequence``: how many runs were begun."""
    return output / ".run_history.sequence"


def result_name(settings: Mapping[str, Mapping[str, Any]]) -> str:
    """The folder's name of what a run with these recorded settings leaves: an adapter, or a whole model."""
    return MODEL_NAME if settings.get("training.mode", {}).get("value") == "full" else ADAPTER_NAME


def adapter_folder(output: Path) -> Path:
    """``<output>/lora``: the newest finished adapter."""
    return output / ADAPTER_NAME


def cache_folder(output: Path) -> Path:
    """``<output>/.cache``: what may be deleted at any time."""
    return output / ".cache"
