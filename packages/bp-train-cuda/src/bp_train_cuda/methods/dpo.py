"""Direct preference optimization (Rafailov et al., arXiv:2305.18290)."""

from __future__ import annotations

from torch.nn.functional import logsigmoid

from bp_data.pairs import Compared as Prepared
from bp_data.pairs import PairRow
from bp_runs.spec import TrainingSpec
from bp_train_cuda.compare import Answers, Compared, Comparing, build_comparing
from bp_train_cuda.guarded import Parts


class _Trainer(Comparing):
    needs_reference = True

    @staticmethod
    def compare(answers: Answers, spec: TrainingSpec) -> Compared:
        """Equation 7: -log sigmoid(beta (log-ratio of the better answer - that of the worse))."""
        rewards = spec.dpo_beta * answers.ratios
        margins = rewards[:, 0] - rewards[:, 1]
        return Compared(-logsigmoid(margins), margins)


def build_trainer(parts: Parts, prepared: Prepared[PairRow]) -> Comparing:
    """A trainer that makes better answers likelier against worse ones, measured from the untrained model."""
    return build_comparing(_Trainer, parts, prepared.rows)
