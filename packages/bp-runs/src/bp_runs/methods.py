"""Training methods: one row each with its loss, read by data, settings, memory estimate, loop and every rail.

Adding a method touches this file: its name in `MethodName`, its loss, its row, and its own settings in
`bp_runs.spec.TrainingSpec`. The losses are formulas over arrays of any framework; a rail brings `ArrayOps`. Independent
forms of the same equations, from which the tests judge them, are in packages/bp-train-cuda/tests/plain_training.py.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal, Protocol

MethodName = Literal["sft", "dpo", "orpo", "simpo", "kto"]
DataKind = Literal["rows", "pairs", "judged"]
"""Whole rows; a chosen and a rejected completion of a prompt; completions labeled good or bad."""


class LossNumbers(Protocol):
    """What losses read of `bp_runs.spec.TrainingSpec`, which imports this module."""

    @property
    def dpo_beta(self) -> float:
        """Times the log-ratios."""
        ...

    @property
    def orpo_beta(self) -> float:
        """Weight of the odds ratio."""
        ...

    @property
    def simpo_beta(self) -> float:
        """Times the means."""
        ...

    @property
    def simpo_gamma(self) -> float:
        """Margin that the chosen must win by."""
        ...

    @property
    def kto_beta(self) -> float:
        """Times the log-ratios."""
        ...

    @property
    def kto_desirable_weight(self) -> float:
        """Of good examples."""
        ...

    @property
    def kto_undesirable_weight(self) -> float:
        """Of bad ones."""
        ...


class ArrayOps(Protocol):
    """What losses need of a framework besides the operators of its arrays; all act element by element."""

    def log_sigmoid(self, x: Any) -> Any:
        """log(1 / (1 + exp(-x))), exact also for large magnitudes."""
        ...

    def sigmoid(self, x: Any) -> Any:
        """1 / (1 + exp(-x))."""
        ...

    def log(self, x: Any) -> Any:
        """Natural logarithm."""
        ...

    def expm1(self, x: Any) -> Any:
        """exp(x) - 1, exact also near 0."""
        ...

    def at_most(self, x: Any, limit: float) -> Any:
        """The lesser of ``x`` and ``limit``."""
        ...

    def where(self, condition: Any, yes: float, no: float) -> Any:
        """``yes`` where ``condition`` is true, else ``no``, as floats."""
        ...


@dataclass(frozen=True, slots=True)
class Completions:
    """What the model says of the completions of N examples, A for each: the chosen one first, or one alone.

    Attributes:
        log_probs: (N, A) log-probabilities of whole completions, in nats.
        tokens: (N, A) trained tokens of the completions.
        reference: (N, A), ``log_probs`` under the model before training; zeros for methods without a reference.
        good: (N,) bool, kto's labels; None for the others.
        point: () kto's reference point, in nats; None for the others.
    """

    log_probs: Any
    tokens: Any
    reference: Any
    good: Any = None
    point: Any = None

    @property
    def ratios(self) -> Any:
        """(N, A): how much more likely a completion has become, in nats."""
        return self.log_probs - self.reference

    @property
    def means(self) -> Any:
        """(N, A): log-probability per token."""
        return self.log_probs / self.tokens


Losses = tuple[Any, Any]
"""(N,) losses, and (N,) margins: above 0 the model agrees with the data."""
PreferenceLoss = Callable[[Completions, LossNumbers, ArrayOps], Losses]


def sft_loss(log_probs: Any) -> Any:
    """Cross-entropy in nats, summed over trained tokens of log-probabilities (N,); the step divides by their number."""
    return -log_probs.sum()


def dpo_loss(found: Completions, numbers: LossNumbers, ops: ArrayOps) -> Losses:
    """-log sigmoid(beta (log-ratio of the chosen - that of the rejected)): Rafailov et al., arXiv:2305.18290, eq. 7."""
    rewards = numbers.dpo_beta * found.ratios
    margins = rewards[:, 0] - rewards[:, 1]
    return -ops.log_sigmoid(margins), margins


def orpo_loss(found: Completions, numbers: LossNumbers, ops: ArrayOps) -> Losses:
    """-mean log p(chosen) - beta log sigmoid(log odds ratio): Hong et al., arXiv:2403.07691, eq. 6 and 7.

    A completion's p is the geometric mean over its tokens (eq. 1); its odds are p / (1 - p) (eq. 3).
    """
    means = found.means
    odds = means - ops.log(-ops.expm1(ops.at_most(means, -1e-7)))  # at p = 1 the odds are infinite
    margins = numbers.orpo_beta * (means[:, 0] - means[:, 1])
    return -means[:, 0] - numbers.orpo_beta * ops.log_sigmoid(odds[:, 0] - odds[:, 1]), margins


def simpo_loss(found: Completions, numbers: LossNumbers, ops: ArrayOps) -> Losses:
    """-log sigmoid(beta (mean log p(chosen) - mean log p(rejected)) - gamma): Meng et al., arXiv:2405.14734, eq. 6."""
    rewards = numbers.simpo_beta * found.means
    margins = rewards[:, 0] - rewards[:, 1]
    return -ops.log_sigmoid(margins - numbers.simpo_gamma), margins


def kto_loss(found: Completions, numbers: LossNumbers, ops: ArrayOps) -> Losses:
    """Weight (1 - sigmoid(± beta (log-ratio - point))), minus for bad examples: Ethayarajh et al., arXiv:2402.01306.

    Equation 7. The reference point is an estimate of the divergence from the model before training: how much more
    likely completions have become under prompts that they do not belong to.
    """
    sign = ops.where(found.good, 1.0, -1.0)
    weight = ops.where(found.good, numbers.kto_desirable_weight, numbers.kto_undesirable_weight)
    margins = sign * numbers.kto_beta * (found.ratios[:, 0] - found.point)
    return weight * ops.sigmoid(-margins), margins


@dataclass(frozen=True, slots=True, kw_only=True)
class Method:
    """A way to learn from data."""

    name: MethodName
    learns_from: DataKind
    adapter_learning_rate: float
    """Peak learning rate of an adapter, if the user sets none."""
    full_learning_rate: float
    """Peak learning rate of full fine-tuning, if the user sets none."""
    needs_reference: bool = False
    """Whether it measures change from the model before training."""
    loss: PreferenceLoss | None = None
    """None: `sft_loss`, which has no completions to compare."""

    @property
    def completions(self) -> int:
        """Completions that the model runs for each example, which decides its memory."""
        return 2 if self.learns_from == "pairs" else 1


# Full rates: TRL's for sft, Zephyr's DPO (arXiv:2310.16944), the published ones of ORPO (arXiv:2403.07691), SimPO (the
# upper end; arXiv:2405.14734) and KTO (at a beta of 0.1; arXiv:2402.01306). Adapters: QLoRA's rate for sft
# (arXiv:2305.14314), else 5 to 10 times the full rate. ORPO's loss holds a whole likelihood term: one rate serves both.
_TABLE = (
    Method(name="sft", learns_from="rows", adapter_learning_rate=2e-4, full_learning_rate=2e-5),
    Method(
        name="dpo",
        learns_from="pairs",
        adapter_learning_rate=5e-6,
        full_learning_rate=5e-7,
        needs_reference=True,
        loss=dpo_loss,
    ),
    Method(name="orpo", learns_from="pairs", adapter_learning_rate=8e-6, full_learning_rate=8e-6, loss=orpo_loss),
    Method(name="simpo", learns_from="pairs", adapter_learning_rate=1e-5, full_learning_rate=1e-6, loss=simpo_loss),
    Method(
        name="kto",
        learns_from="judged",
        adapter_learning_rate=5e-6,
        full_learning_rate=1e-6,
        needs_reference=True,
        loss=kto_loss,
    ),
)
METHODS: Mapping[str, Method] = MappingProxyType({method.name: method for method in _TABLE})
