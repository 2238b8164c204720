"""Kahneman-Tversky optimization (Ethayarajh et al., arXiv:2402.01306): answers judged good or bad, one by one."""

from __future__ import annotations

from array import array
from collections.abc import Mapping, Sequence
from random import Random
from typing import Any

import torch

from bp_data import TokenRow
from bp_data.pairs import Compared as Prepared
from bp_data.pairs import JudgedRow
from bp_runs.spec import TrainingSpec
from bp_train_cuda.compare import Answers, Compared, Comparing, build_comparing
from bp_train_cuda.guarded import Parts
from bp_train_cuda.guards.oom import Batch

_SIDES = ("input_ids", "attention_mask", "labels", "reference")


class _Trainer(Comparing):
    """A row's two answers are its own and one that belongs to another prompt.

    From the second comes the reference point, the divergence from the untrained model: the mean over the micro-batch of
    how much likelier answers to other prompts have become. It is measured over the whole micro-batch, that of all
    ranks, before the losses, so that a micro-batch that runs in pieces has the same one.
    """

    needs_reference = True

    @staticmethod
    def compare(answers: Answers, spec: TrainingSpec) -> Compared:
        """Equation 7: weight × (1 - sigmoid(± beta (log-ratio - reference point))), minus for bad answers."""
        good = answers.batch["good"]
        sign = torch.where(good, 1.0, -1.0)
        weight = torch.where(good, spec.kto_desirable_weight, spec.kto_undesirable_weight)
        margins = sign * spec.kto_beta * (answers.ratios[:, 0] - answers.batch["point"])
        return Compared(weight * torch.sigmoid(-margins), margins)

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Any:
        return super().training_step(model, self._with_point(inputs), num_items_in_batch)

    def measure(self, batch: Batch) -> Mapping[str, float]:
        return super().measure(self._with_point(batch))

    def _with_point(self, batch: Batch) -> Batch:
        """The rows' own answers, and the micro-batch's reference point beside each."""
        others, own = ({**batch, **{name: batch[name][:, side] for name in _SIDES}} for side in (slice(1, 2), slice(1)))

        def drift(piece: Batch) -> torch.Tensor:
            has_share = (piece["share"] > 0).float()
            return torch.stack([self.read_answers(self.model, piece).ratios[:, 0] @ has_share, has_share.sum()])

        with self.judging():
            found = self.reader.run(drift, others)
        if self.team.count > 1:
            found = found.new_tensor(self.team.sum_values(found.tolist()))
        point = (found[0] / found[1]).clamp(min=0)
        return {**own, "point": point.expand(len(batch["good"]))}


def build_trainer(parts: Parts, prepared: Prepared[JudgedRow]) -> Comparing:
    """A trainer that makes good answers likelier and bad ones less so, both measured from the untrained model."""
    longest, seed = prepared.max_seq_length, parts.spec.training.seed

    class Trainer(_Trainer):
        @staticmethod
        def unpack(rows: Sequence[JudgedRow], place: int) -> Mapping[str, Any]:
            row = rows[place]
            other = rows[_partner(place, len(rows), seed)]
            return {"answers": (row.row, join_prompt(row.row, other.row, longest)), "good": row.label}

    return build_comparing(Trainer, parts, prepared.rows)


def _partner(place: int, rows: int, seed: int) -> int:
    """Whose answer is held against the prompt of row ``place``: never its own, and the same in every epoch."""
    return (place + Random(seed).randrange(1, max(2, rows))) % rows  # noqa: S311 - a choice that must repeat


def join_prompt(prompt: TokenRow, answer: TokenRow, longest: int) -> TokenRow:
    """The prompt of one row with the answer of another, cut at ``longest`` tokens."""
    split, start = prompt.mask.find(1), answer.mask.find(1)
    ids = array("i", [*prompt.ids[:split], *answer.ids[start:]][:longest])
    return TokenRow(prompt.number, ids, (bytes(split) + answer.mask[start:])[:longest])
