"""The parity gate's table, and what each type may cost."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from types import MappingProxyType
from typing import Any, Literal, TypeAlias

CheckName: TypeAlias = Literal["training", "template", "greedy", "divergence", "stop", "effect"]
Result: TypeAlias = Literal["passed", "failed", "skipped"]


@dataclass(frozen=True, slots=True)
class Bound:
    """What a type may cost."""

    divergence: float
    """Mean divergence from the reference, nats; more fails."""
    agreement: float
    """Share of clear places with the reference's next token; less fails."""


# From runs on SmolLM2-135M, which suffers more than larger models do, with room (docs/log has the figures).
BOUNDS: Mapping[str, Bound] = MappingProxyType(
    {
        "f32": Bound(0.001, 1.0),
        "bf16": Bound(0.005, 0.99),
        "f16": Bound(0.002, 0.99),
        "q8_0": Bound(0.03, 0.98),
        "q6_k": Bound(0.06, 0.97),
        "q5_k_m": Bound(0.2, 0.9),
        "q5_k_s": Bound(0.2, 0.9),
        "q5_0": Bound(0.3, 0.9),
        "q4_k_m": Bound(0.3, 0.9),
        "q4_k_s": Bound(0.4, 0.9),
        "q4_0": Bound(0.6, 0.8),
        "iq4_xs": Bound(0.4, 0.9),
        "q3_k_m": Bound(0.8, 0.7),
        "q2_k": Bound(1.5, 0.5),
    }
)


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
