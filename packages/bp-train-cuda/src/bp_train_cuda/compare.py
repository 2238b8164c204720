"""The trainer of all methods that compare answers: dpo, orpo, simpo and kto.

TRL's own trainers for them average over a micro-batch inside the loss, build the whole logits (orpo, simpo), learn the
prompt too (orpo) and want a second model in memory as reference when all weights are trained. Here a method is a
function from the answers' log-probabilities to one loss a row, so that a micro-batch can be cut anywhere; and what the
untrained model says of a row is measured once, before the first step.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from datasets import Dataset as ListDataset
from torch.utils.data import Dataset
from trl import SFTTrainer

from bp_data import IGNORED, TokenRow
from bp_runs.spec import TrainingSpec
from bp_train_cuda.guarded import Guarded, Parts, build_arguments
from bp_train_cuda.guards.oom import Batch
from bp_train_cuda.order import RankBatches


@dataclass(frozen=True, slots=True)
class Answers:
    """What the model says of the answers of N rows, A to a row, and what the untrained model said of them.

    Attributes:
        logps: (N, A) log-probabilities of whole answers, in nats.
        tokens: (N, A) trained tokens of the answers.
        reference: (N, A), as ``logps``; zeros where the method needs none.
        batch: The other columns, by name.
    """

    logps: torch.Tensor
    tokens: torch.Tensor
    reference: torch.Tensor
    batch: Batch

    @property
    def ratios(self) -> torch.Tensor:
        """(N, A): how much likelier an answer has become, in nats."""
        return self.logps - self.reference

    @property
    def means(self) -> torch.Tensor:
        """(N, A): log-probability of a token, averaged over the answer."""
        return self.logps / self.tokens


@dataclass(frozen=True, slots=True)
class Compared:
    """What a method makes of `Answers`.

    Attributes:
        losses: (N,).
        margins: (N,) rewards of better answers over worse ones; above 0 the model agrees with the data.
    """

    losses: torch.Tensor
    margins: torch.Tensor

    def sums(self, batch: Batch) -> torch.Tensor:
        """(4,), without gradients: losses, rows whose margin is above 0, margins, rows; of rows with a share."""
        margins = self.margins.detach().float()
        rows = (batch["share"] > 0).float()
        return torch.stack([self.losses.detach().float(), (margins > 0).float(), margins, rows]) @ rows


class AnswerSet(Dataset[Mapping[str, Any]]):  # type: ignore[misc]  # torch is not typed for a strict check
    """Rows of one or two answers each; `unpack` says which."""

    def __init__(self, rows: Sequence[Any], unpack: Callable[[Sequence[Any], int], Mapping[str, Any]]) -> None:
        self._rows = rows
        self._unpack = unpack
        self.reference: torch.Tensor | None = None
        """(rows, A), once it is measured."""

    def __len__(self) -> int:
        return len(self._rows)

    def lengths(self) -> list[int]:
        """Tokens of each row's longest answer, its prompt included."""
        answers = (self._unpack(self._rows, place)["answers"] for place in range(len(self)))
        return [max(len(answer.ids) for answer in row) for row in answers]

    def __getitem__(self, place: int) -> Mapping[str, Any]:
        item = self._unpack(self._rows, place)
        return item if self.reference is None else {**item, "reference": self.reference[place].tolist()}


def pad_answers(pad_id: int) -> Callable[[Sequence[Mapping[str, Any]]], dict[str, torch.Tensor]]:
    """Collate items to ids, mask and labels (N, A, T), padded on the right, and their other values to (N, …).

    ``share`` (N,) is a row's part of the micro-batch: losses times shares add up however the rows are cut apart.
    """

    def collate(items: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        answers: list[list[TokenRow]] = [list(item["answers"]) for item in items]
        width = max(len(row.ids) for rows in answers for row in rows)
        shape = (len(items), len(answers[0]), width)
        ids, mask = torch.full(shape, pad_id), torch.zeros(shape, dtype=torch.long)
        labels = torch.full(shape, IGNORED)
        for at, rows in enumerate(answers):
            for answer, row in enumerate(rows):
                length = len(row.ids)
                ids[at, answer, :length] = torch.tensor(row.ids.tolist())
                labels[at, answer, :length] = torch.tensor(row.labels())
                mask[at, answer, :length] = 1
        others = {name: torch.tensor([item[name] for item in items]) for name in items[0] if name != "answers"}
        share = torch.full((len(items),), 1 / len(items))
        return {"input_ids": ids, "attention_mask": mask, "labels": labels, "share": share, **others}

    return collate


def unpack_pair(rows: Sequence[Any], place: int) -> Mapping[str, Any]:
    """A `PairRow`'s better and worse answer."""
    return {"answers": (rows[place].chosen, rows[place].rejected)}


class Comparing(Guarded, SFTTrainer):  # type: ignore[misc]  # TRL is not typed for a strict check
    """SFTTrainer with a loss over answers; of TRL's it keeps the loop and the head that builds no whole logits."""

    loss_is_scaled_for_ga = False
    """Shares add up to 1 in a micro-batch; transformers divides by the number of micro-batches."""
    spec: TrainingSpec
    unpack: Callable[[Sequence[Any], int], Mapping[str, Any]] = staticmethod(unpack_pair)
    needs_reference: ClassVar[bool] = False

    @staticmethod
    def compare(answers: Answers, spec: TrainingSpec) -> Compared:
        """The method's loss."""
        raise NotImplementedError

    def rows_to_meet(self) -> int:
        """Rows that the steps will visit, where the method asks what the untrained model says of them."""
        visits = self.spec.steps * self.spec.batch_size * self.spec.gradient_accumulation * self.team.count
        return min(visits, len(self.train_dataset)) if self.needs_reference else 0

    def meet_rows(self) -> None:
        """Measure what the untrained model says of those rows."""
        if count := self.rows_to_meet():
            self.train_dataset.reference = self.measure_reference(self.train_dataset, self.order.first(count))

    def heldout_set(self, rows: Sequence[Any]) -> AnswerSet:
        """Held-out rows, with what the model as it is now says of them where the method needs that."""
        found = AnswerSet(rows, self.unpack)
        if self.needs_reference:
            found.reference = self.measure_reference(found, range(len(found)))
        return found

    def measure_reference(self, rows: AnswerSet, places: Sequence[int]) -> torch.Tensor:
        """(rows, A): log-probabilities under the model as it is now; zeros for rows not in ``places``.

        Several ranks part the work.
        """
        found = torch.zeros(len(rows), len(rows[0]["answers"]))
        wanted = sorted(set(places), key=lambda place: -len(rows[place]["answers"][0].ids))  # rows of a length together

        def note(piece: Batch) -> torch.Tensor:
            logps = self.read_answers(self.model, piece).logps
            found[piece["place"].cpu()] = logps.cpu()
            return logps.new_zeros(())

        with self.judging():
            for chosen in RankBatches(wanted, self.spec.batch_size, self.team.rank, self.team.count):
                # A rank without rows left runs one that another has, and counts it for nothing.
                batch = self.collate([{**rows[place], "place": place} for place in chosen or wanted[:1]])
                self.reader.run(note, {name: value.to(self.model.device) for name, value in batch.items()})
                if not chosen:
                    found[wanted[0]] = 0.0
        self.team.sum_tensor(found)
        return found

    def share_out(self, batches: list[Batch], count: Any) -> tuple[list[Batch], Any]:
        """A row's share is that of the micro-batch of all ranks."""
        have = [(batch["share"] > 0).to(batch["share"].dtype) for batch in batches]
        totals = self.team.sum_values([float(rows.sum()) for rows in have])
        shared: list[Batch] = [
            {**b, "share": rows / total} for b, rows, total in zip(batches, have, totals, strict=True)
        ]
        return shared, count

    @contextlib.contextmanager
    def judging(self) -> Iterator[None]:
        """Without gradients and without dropout."""
        was_training = self.model.training
        self.model.eval()
        try:
            with torch.no_grad():
                yield
        finally:
            self.model.train(was_training)

    def read_answers(self, model: Any, batch: Batch) -> Answers:
        """Run the model over all answers of a batch; gradients flow to ``logps``."""
        count, width, _ = batch["input_ids"].shape
        flat = {name: batch[name].flatten(0, 1) for name in ("input_ids", "attention_mask", "labels")}
        with self.compute_loss_context_manager():
            out = model(**flat, fused_lm_head=True, use_cache=False)
        logps = out.log_probs.float().sum(dim=1).view(count, width)
        tokens = out.label_mask.sum(dim=1).view(count, width)
        return Answers(logps, tokens, batch.get("reference", torch.zeros_like(logps)), batch)

    def compute_loss(
        self,
        model: Any,
        inputs: Batch,
        return_outputs: bool = False,  # noqa: ARG002  # transformers' names
        num_items_in_batch: Any = None,  # noqa: ARG002
    ) -> torch.Tensor:
        """The rows' share of the micro-batch's mean loss."""
        compared = self.compare(self.read_answers(model, inputs), self.spec)
        self.seen = compared.sums(inputs)[1:]
        return (compared.losses * inputs["share"]).sum()

    def measure(self, batch: Batch) -> Mapping[str, float]:
        """Sums over a batch's rows: loss, accuracy, margin, and their count."""

        def step(piece: Batch) -> torch.Tensor:
            return self.compare(self.read_answers(self.model, piece), self.spec).sums(piece)

        loss, accuracy, margin, count = self.reader.run(step, batch).tolist()
        return {"loss": loss, "accuracy": accuracy, "margin": margin, "count": count}

    def take_metrics(self) -> Mapping[str, float]:
        """Share of rows whose margin was above 0, and the mean margin, since the last call."""
        accuracy, margin, count = self.team.sum_values(self.take_seen().tolist())
        return {"accuracy": accuracy / count, "margin": margin / count}


def build_comparing(kind: type[Comparing], parts: Parts, rows: Sequence[Any]) -> Comparing:
    """A trainer of the given kind over rows that its ``unpack`` understands."""
    answers = AnswerSet(rows, kind.unpack)
    trainer = kind(
        model=parts.model,
        args=build_arguments(parts),
        train_dataset=ListDataset.from_list([{"input_ids": [0], "labels": [0]}]),  # TRL wants its kind
        data_collator=pad_answers(parts.pad_id),
        processing_class=parts.tokenizer,
        callbacks=list(parts.callbacks),
    )
    trainer.spec = parts.spec.training
    trainer.collate = pad_answers(parts.pad_id)
    trainer.finish(parts, answers)
    return trainer
