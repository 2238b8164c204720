"""Methods that compare completions: from their log-probabilities to one loss per example.

An example of dpo, orpo and simpo has two completions, the chosen one first; one of kto has one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch.nn.functional import logsigmoid

from bp_runs.spec import TrainingSpec


@dataclass(frozen=True, slots=True)
class Completions:
    """What the model says of the completions of N examples, A for each.

    Attributes:
        log_probs: (N, A) log-probabilities of whole completions, in nats.
        tokens: (N, A) trained tokens of the completions.
        reference: (N, A), ``log_probs`` under the model before training; zeros for methods without a reference.
        good: (N,) bool, kto's labels; None for the others.
        point: () kto's reference point, in nats; None for the others.
    """

    log_probs: torch.Tensor
    tokens: torch.Tensor
    reference: torch.Tensor
    good: torch.Tensor | None = None
    point: torch.Tensor | None = None

    @property
    def ratios(self) -> torch.Tensor:
        """(N, A): how much more likely a completion has become, in nats."""
        return self.log_probs - self.reference

    @property
    def means(self) -> torch.Tensor:
        """(N, A): log-probability per token."""
        return self.log_probs / self.tokens


Losses = tuple[torch.Tensor, torch.Tensor]
"""(N,) losses, and (N,) margins: above 0 the model agrees with the data."""


def dpo_loss(found: Completions, training: TrainingSpec) -> Losses:
    """-log sigmoid(beta (log-ratio of the chosen - that of the rejected)): Rafailov et al., arXiv:2305.18290, eq. 7."""
    rewards = training.dpo_beta * found.ratios
    margins = rewards[:, 0] - rewards[:, 1]
    return -logsigmoid(margins), margins


def orpo_loss(found: Completions, training: TrainingSpec) -> Losses:
    """-mean log p(chosen) - beta log sigmoid(log odds ratio): Hong et al., arXiv:2403.07691, eq. 6 and 7.

    A completion's p is the geometric mean over its tokens (eq. 1); its odds are p / (1 - p) (eq. 3).
    """
    means = found.means
    odds = means - torch.log(-torch.expm1(means.clamp(max=-1e-7)))  # at p = 1 the odds are infinite
    margins = training.orpo_beta * (means[:, 0] - means[:, 1])
    return -means[:, 0] - training.orpo_beta * logsigmoid(odds[:, 0] - odds[:, 1]), margins


def simpo_loss(found: Completions, training: TrainingSpec) -> Losses:
    """-log sigmoid(beta (mean log p(chosen) - mean log p(rejected)) - gamma): Meng et al., arXiv:2405.14734, eq. 6."""
    rewards = training.simpo_beta * found.means
    margins = rewards[:, 0] - rewards[:, 1]
    return -logsigmoid(margins - training.simpo_gamma), margins


def kto_loss(found: Completions, training: TrainingSpec) -> Losses:
    """Weight (1 - sigmoid(± beta (log-ratio - point))), minus for bad examples: Ethayarajh et al., arXiv:2402.01306.

    Equation 7. The reference point is an estimate of the divergence from the model before training: how much more
    likely completions have become under prompts that they do not belong to.
    """
    assert found.good is not None  # noqa: S101
    assert found.point is not None  # noqa: S101
    sign = torch.where(found.good, 1.0, -1.0)
    weight = torch.where(found.good, training.kto_desirable_weight, training.kto_undesirable_weight)
    margins = sign * training.kto_beta * (found.ratios[:, 0] - found.point)
    return weight * torch.sigmoid(-margins), margins


PREFERENCE_LOSSES: Mapping[str, Callable[[Completions, TrainingSpec], Losses]] = MappingProxyType(
    {"dpo": dpo_loss, "orpo": orpo_loss, "simpo": simpo_loss, "kto": kto_loss}
)
"""By `bp_runs.methods.Method.name`, of the methods that compare completions."""
