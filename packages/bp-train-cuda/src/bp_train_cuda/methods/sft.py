"""Supervised fine-tuning on TRL's SFTTrainer, fed with tokens and labels that bp-data has made."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from datasets import Dataset
from trl import SFTTrainer

from bp_data import Prepared
from bp_train_cuda.batches import PackSet, RowSet, join_packs, pad_rows
from bp_train_cuda.guarded import Guarded, Parts, build_arguments
from bp_train_cuda.guards.oom import Batch


class _Trainer(Guarded, SFTTrainer):  # type: ignore[misc]  # TRL is not typed for a strict check
    def heldout_set(self, rows: Sequence[Any]) -> RowSet:
        return RowSet(rows)

    def measure(self, batch: Batch) -> Mapping[str, float]:
        loss = self.reader.run(self._loss_sum, batch)
        return {"loss": float(loss), "count": int((batch["labels"][:, 1:] >= 0).sum())}

    def _loss_sum(self, batch: Batch) -> torch.Tensor:
        """Cross-entropy summed over the trained tokens of a batch, in nats."""
        with self.compute_loss_context_manager():
            loss: torch.Tensor = self.compute_loss(self.model, dict(batch), num_items_in_batch=1)
        return loss.detach().float()


def build_trainer(parts: Parts, prepared: Prepared) -> Guarded:
    """A trainer whose loss is the mean cross-entropy over the trained tokens of a step."""
    rows = prepared.rows
    packs = PackSet(rows, rows.lengths(), prepared.max_seq_length) if parts.spec.training.packing else None
    trainer = _Trainer(
        model=parts.model,
        args=build_arguments(parts),
        train_dataset=Dataset.from_list([{k: list(v) for k, v in RowSet(rows)[0].items()}]),  # TRL wants its kind
        data_collator=join_packs if packs else pad_rows(parts.pad_id),
        processing_class=parts.tokenizer,
        callbacks=list(parts.callbacks),
    )
    trainer.collate = pad_rows(parts.pad_id)
    trainer.finish(parts, packs or RowSet(rows))
    return trainer
