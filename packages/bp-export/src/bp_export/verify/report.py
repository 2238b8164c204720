"""The gate's table: three states a check, and what each quantization may cost."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from types import MappingProxyType
from typing import Any, Final, Literal, TypeAlias, get_args

from bp_export.quant.types import QUANTIZATIONS, Bound

CheckName: TypeAlias = Literal[
    "training", "tokenizer", "template", "witness", "adapter", "greedy", "divergence", "window", "stop", "effect"
]
Result: TypeAlias = Literal["passed", "failed", "not tested"]

_ESSENTIAL: Final = "divergence"
"""Without this comparison of what the file computes, nothing says that it is the trained model."""

BOUNDS: Mapping[str, Bound] = MappingProxyType({name: row.bound for name, row in QUANTIZATIONS.items()})


@dataclass(frozen=True, slots=True)
class ParityCheck:
    """One line of the table."""

    name: CheckName
    result: Result
    value: float | None
    """Share (tokenizer, template, greedy, stop), nats (witness, divergence, window), share of the adapter's effect
    that is kept (effect), or largest relative error of a module's change (adapter)."""
    bound: float | None
    """Least share that passes; most nats."""
    note: str
    """What was counted, or why it was not tested."""


@dataclass(frozen=True, slots=True)
class ParityReport:
    """The whole table."""

    checks: tuple[ParityCheck, ...]
    reference: Literal["independent forward pass", "transformers", "witness", "adapter"] | None
    """What the file was compared with; None if there was nothing."""
    llama_cpp: str | None
    """Version of xllamacpp; None if no file was loaded in llama.cpp."""
    seconds: float

    @property
    def result(self) -> Result:
        """Failed if a check failed; passed if none did and the computed numbers were compared; else not tested."""
        found = {check.name: check.result for check in self.checks}
        if "failed" in found.values():
            return "failed"
        compared = found.get(_ESSENTIAL) or found.get("adapter") or found.get("witness")
        return "passed" if compared == "passed" else "not tested"

    @property
    def has_passed(self) -> bool:
        """Whether `result` is passed."""
        return self.result == "passed"

    @property
    def witness_bound(self) -> float | None:
        """Nats that the merged weights may be away from the witness; None if that was not tested."""
        return next((c.bound for c in self.checks if c.name == "witness" and c.result != "not tested"), None)

    @property
    def counts(self) -> dict[Result, int]:
        """Checks by result."""
        results = [check.result for check in self.checks]
        return {state: results.count(state) for state in get_args(Result)}

    @property
    def summary(self) -> str:
        """For people: ``passed: 7 checks passed, 0 failed, 1 not tested (training)``."""
        counts = self.counts
        untested = ", ".join(check.name for check in self.checks if check.result == "not tested")
        words = f"{counts['passed']} checks passed, {counts['failed']} failed, {counts['not tested']} not tested"
        return f"{self.result}: {words}" + (f" ({untested})" if untested else "")

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        counts = {state.replace(" ", "_"): count for state, count in self.counts.items()}
        return {
            **asdict(self),
            "checks": [asdict(check) for check in self.checks],
            "result": self.result,
            "passed": self.has_passed,
            "counts": counts,
            "summary": self.summary,
        }


def judge_share(name: CheckName, value: float, least: float, note: str) -> ParityCheck:
    """Passed from a least share on."""
    return ParityCheck(name, "passed" if value >= least else "failed", value, least, note)


def judge_nats(name: CheckName, value: float, most: float, note: str) -> ParityCheck:
    """Passed up to a most divergence."""
    return ParityCheck(name, "passed" if value <= most else "failed", value, most, note)


def report_untested(name: CheckName, why: str) -> ParityCheck:
    """A check that had nothing to compare."""
    return ParityCheck(name, "not tested", None, None, why)
