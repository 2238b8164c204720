"""Simple preference optimization (Meng et al., arXiv:2405.14734): no reference, rewards that length does not move."""

from __future__ import annotations

from torch.nn.functional import logsigmoid

from bp_data.pairs import Compared as Prepared
from bp_data.pairs import PairRow
from bp_runs.spec import TrainingSpec
from bp_train_cuda.compare import Answers, Compared, Comparing, build_comparing
from bp_train_cuda.guarded import Parts


class _Trainer(Comparing):
    @staticmethod
    def compare(answers: Answers, spec: TrainingSpec) -> Compared:
        """Equation 6: -log sigmoid(beta (mean log p(better) - mean log p(worse)) - gamma)."""
        rewards = spec.simpo_beta * answers.means
        margins = rewards[:, 0] - rewards[:, 1]
        return Compared(-logsigmoid(margins - spec.simpo_gamma), margins)


def build_trainer(parts: Parts, prepared: Prepared[PairRow]) -> Comparing:
    """A trainer that makes the better answer's tokens likelier than the worse one's, by a margin."""
    return build_comparing(_Trainer, parts, prepared.rows)
