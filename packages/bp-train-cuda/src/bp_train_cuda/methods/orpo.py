"""Odds ratio preference optimization (Hong et al., arXiv:2403.07691): no reference, one loss for both jobs."""

from __future__ import annotations

import torch
from torch.nn.functional import logsigmoid

from bp_data.pairs import Compared as Prepared
from bp_data.pairs import PairRow
from bp_runs.spec import TrainingSpec
from bp_train_cuda.compare import Answers, Compared, Comparing, build_comparing
from bp_train_cuda.guarded import Parts


class _Trainer(Comparing):
    @staticmethod
    def compare(answers: Answers, spec: TrainingSpec) -> Compared:
        """Equations 6 and 7: -mean log p(better) - beta log sigmoid(log odds(better) - log odds(worse)).

        An answer's p is the geometric mean of its tokens' (equation 1); its odds are p / (1 - p) (equation 3).
        """
        means = answers.means
        odds = means - torch.log(-torch.expm1(means.clamp(max=-1e-7)))  # at p = 1 the odds have no end
        margins = spec.orpo_beta * (means[:, 0] - means[:, 1])
        return Compared(-means[:, 0] - spec.orpo_beta * logsigmoid(odds[:, 0] - odds[:, 1]), margins)


def build_trainer(parts: Parts, prepared: Prepared[PairRow]) -> Comparing:
    """A trainer that learns the better answers and turns away from the worse ones."""
    return build_comparing(_Trainer, parts, prepared.rows)
