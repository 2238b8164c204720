"""The parity gate's table, and what each type may cost."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from types import MappingProxyType
from typing import Any, Literal, TypeAlias

from bp_export.quant.types import QUANTIZATIONS, Bound

CheckName: TypeAlias = Literal["training", "template", "greedy", "divergence", "stop", "effect"]
Result: TypeAlias = Literal["passed", "failed", "skipped"]


BOUNDS: Mapping[str, Bound] = MappingProxyType({name: row.bound for name, row in QUANTIZATIONS.items()})


@dataclass(frozen=True, slots=True)
class ParityCheck:
    """One line of the table."""

    name: CheckName
    result: Result
    value: float | None
    """Share (template, greedy, stop), nats (divergence), or share of the adapter's effect that is kept (effect)."""
    bound: float | None
    """Least value that passes; for the divergence the largest."""
    note: str
    """What was counted, or why it was skipped."""


@dataclass(frozen=True, slots=True)
class ParityReport:
    """The whole table."""

    checks: tuple[ParityCheck, ...]
    reference: str | None
    """Type of the file that was compared with; None where the exported file is the merged model as it stands."""
    llama_cpp: str
    """Version of xllamacpp."""
    seconds: float

    @property
    def has_passed(self) -> bool:
        """Whether no check failed."""
        return all(check.result != "failed" for check in self.checks)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {**asdict(self), "checks": [asdict(check) for check in self.checks], "passed": self.has_passed}
