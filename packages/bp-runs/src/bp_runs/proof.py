"""A run's proof, ``prove.json`` in its folder: recorded losses next to those of an independent replay."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import orjson

from bp_runs.files import publish_json
from bp_runs.paths import PROOF_FILE

PROOF_SCHEMA = "backpropagate.proof/1"


@dataclass(frozen=True, slots=True, kw_only=True)
class Proof:
    """The first steps of a run, trained twice."""

    run_id: str
    at: str
    """When it was replayed; ISO 8601 in UTC."""
    recorded: tuple[float, ...]
    """Losses of the run's steps from the first on, in nats."""
    replayed: tuple[float, ...]
    """Losses of the same steps by the independent loop."""
    tolerance: float
    """Largest difference that rounding explains, in nats."""
    why: str
    """Where that tolerance comes from."""
    versions: Mapping[str, str] = field(default_factory=dict)
    """Packages that replayed it."""

    @property
    def steps(self) -> int:
        """Steps that were replayed."""
        return len(self.recorded)

    @property
    def differences(self) -> list[float]:
        """Absolute difference at each step, in nats; infinite where a replayed loss is not a number."""
        pairs = zip(self.recorded, self.replayed, strict=True)
        return [found if (found := abs(a - b)) >= 0 else float("inf") for a, b in pairs]

    @property
    def largest(self) -> float:
        """The largest difference, in nats."""
        return max(self.differences)

    @property
    def largest_relative(self) -> float:
        """The largest difference as a share of the recorded loss."""
        pairs = zip(self.differences, self.recorded, strict=True)
        return max(0.0 if gap == 0 else gap / max(abs(loss), 1e-12) for gap, loss in pairs)

    @property
    def passed(self) -> bool:
        """Whether every loss agrees within the tolerance."""
        return self.largest <= self.tolerance

    def summary(self) -> str:
        """One line for people: ``10 steps replayed by an independent loop: largest difference 3e-07``."""
        steps = "1 step" if self.steps == 1 else f"{self.steps} steps"
        over = "" if self.passed else f", over the tolerance of {self.tolerance:g}"
        return f"{steps} replayed by an independent loop: largest difference {self.largest:.1g}{over}"

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready; a difference without an end is null."""
        found = {"largest": self.largest, "largest_relative": self.largest_relative}
        return {
            **asdict(self),
            "steps": self.steps,
            "passed": self.passed,
            **{name: value if value < float("inf") else None for name, value in found.items()},
        }


def write_proof(folder: Path, proof: Proof) -> None:
    """Publish ``prove.json`` in the run's folder, atomically.

    Raises:
        DiskFullError, OutputNotWritableError: The old proof stays.
    """
    publish_json(folder / PROOF_FILE, {"schema": PROOF_SCHEMA, **proof.to_dict()})


def read_proof(folder: Path) -> Proof | None:
    """The proof in a run's folder; None without one, or where the file is not a proof that this version reads."""
    try:
        found = orjson.loads((folder / PROOF_FILE).read_bytes())
        if found.pop("schema") != PROOF_SCHEMA:
            return None
        recorded, replayed = (
            tuple(float("nan") if loss is None else float(loss) for loss in found[name])
            for name in ("recorded", "replayed")
        )
        if not recorded or len(recorded) != len(replayed):
            return None
        return Proof(
            run_id=str(found["run_id"]),
            at=str(found["at"]),
            recorded=recorded,
            replayed=replayed,
            tolerance=float(found["tolerance"]),
            why=str(found["why"]),
            versions={str(name): str(version) for name, version in found["versions"].items()},
        )
    except (OSError, orjson.JSONDecodeError, AttributeError, KeyError, TypeError, ValueError):
        return None
