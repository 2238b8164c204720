"""Where something that is shipped comes from: the run whose record stands next to it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bp_export.local_paths import has_hub_form
from bp_runs.adapter import read_manifest
from bp_runs.errors import CodedError
from bp_runs.metrics import read_events
from bp_runs.paths import METRICS_FILE, run_folder, runs_folder
from bp_runs.proof import Proof, read_proof
from bp_runs.record import RunRecord, read_record
from bp_runs.spec import Settings

# Where things were and how it was begun, which says nothing of what was learned.
_PLACES = ("model.name", "model.revision", "data.path", "data.revision", "training.output_dir", "training.resume")


@dataclass(frozen=True, slots=True)
class Origin:
    """A run, and how its loss went."""

    record: RunRecord
    losses: tuple[float, ...]
    """Of each step, in nats."""
    proof: Proof | None = None
    """Of an independent replay; None where the run was not proved."""

    @property
    def artifacts(self) -> list[dict[str, Any]]:
        """What was exported from the run."""
        return self.record.artifacts

    def find_artifact(self, path: Path) -> Mapping[str, Any]:
        """What the record says of an export at ``path``; empty where it names none there."""
        place = path.resolve()
        return next((artifact for artifact in self.artifacts if _is_at(artifact, place)), {})


def find_origin(path: Path) -> Origin | None:
    """The run of an adapter folder, or of an export that a run's record names; None where there is none nearby.

    Args:
        path: An adapter folder, a model folder or a GGUF.
    """
    place = path.resolve()
    run_id = _read_run_id(path)
    for output in (place.parent, *place.parents[2:3]):
        names = [run_id] if run_id else [folder.name for folder in sorted(runs_folder(output).glob("*"))]
        for folder in (run_folder(output, name) for name in names):
            record = _load(folder)
            if record and (run_id or any(_is_at(artifact, place) for artifact in record.artifacts)):
                return Origin(record, tuple(_read_losses(folder)), read_proof(folder))
    return None


def is_hub_id(name: str) -> bool:
    """Whether a model's name is ``owner/name``, and not a folder."""
    return has_hub_form(name) and not Path(name).exists()


def list_changes(record: RunRecord) -> dict[str, Any]:
    """The settings that are not at their defaults, by dotted key, but for the places of model, data and output."""
    defaults = Settings().to_flat()
    own = {key for key, entry in record.settings.items() if key not in defaults and entry["source"] != "default"}
    changed = {key for key in defaults if key in record.settings and _differs(record.setting(key), defaults[key])}
    return {key: record.setting(key) for key in record.settings if key in (own | changed).difference(_PLACES)}


def _differs(value: Any, default: Any) -> bool:
    return list(value) != list(default) if isinstance(default, tuple) else bool(value != default)


def _read_run_id(path: Path) -> str | None:
    try:
        found = read_manifest(path).get("run_id") if path.is_dir() else None
    except CodedError:
        return None
    return found if isinstance(found, str) else None


def _load(folder: Path) -> RunRecord | None:
    try:
        return read_record(folder) if folder.is_dir() else None
    except CodedError:
        return None


def _read_losses(folder: Path) -> Iterator[float]:
    for row in read_events(folder / METRICS_FILE):
        if row.get("event") == "step" and isinstance(row.get("loss"), int | float):
            yield float(row["loss"])


def _is_at(artifact: Mapping[str, Any], place: Path) -> bool:
    return Path(str(artifact.get("path", ""))).resolve() == place
