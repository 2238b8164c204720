"""Supervised fine-tuning on TRL's SFTTrainer, fed with tokens and labels that bp-data has made."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import PreTrainedTokenizerBase, TrainerCallback
from trl import SFTConfig, SFTTrainer

from bp_data import TokenRow
from bp_runs.spec import TrainingSpec

IGNORED = -100
"""The label of tokens that carry no loss."""


def build_dataset(rows: Sequence[TokenRow]) -> Dataset:
    """Columns ``input_ids`` and ``labels``, lists of int; labels come from the mask, never from ``== pad_id``."""
    ids = [list(row.ids) for row in rows]
    labels = [[t if m else IGNORED for t, m in zip(row.ids, row.mask, strict=True)] for row in rows]
    return Dataset.from_dict({"input_ids": ids, "labels": labels})


def build_trainer(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[TokenRow],
    spec: TrainingSpec,
    folder: Path,
    *,
    on_gpu: bool,
    bf16: bool,
    callback: TrainerCallback,
) -> Any:
    """A trainer that reports nowhere, saves nothing by itself and logs each step to ``callback``."""
    config = SFTConfig(
        output_dir=str(folder),
        max_steps=spec.steps,
        per_device_train_batch_size=spec.batch_size,
        gradient_accumulation_steps=spec.gradient_accumulation,
        learning_rate=spec.learning_rate,
        lr_scheduler_type=spec.scheduler if spec.scheduler != "constant" else "constant_with_warmup",
        warmup_steps=spec.warmup_steps,
        weight_decay=spec.weight_decay,
        max_grad_norm=spec.max_grad_norm,
        seed=spec.seed,
        data_seed=spec.seed,
        use_cpu=not on_gpu,
        bf16=bf16,
        gradient_checkpointing=spec.gradient_checkpointing and on_gpu,
        max_length=None,
        dataset_kwargs={"skip_prepare_dataset": True},
        dataloader_num_workers=0,
        dataloader_pin_memory=on_gpu,
        logging_steps=1,
        logging_nan_inf_filter=False,
        disable_tqdm=True,
        report_to="none",
        save_strategy="no",
        push_to_hub=False,
    )
    trainer = SFTTrainer(
        model=model,
        args=config,
        train_dataset=build_dataset(rows),
        processing_class=tokenizer,
        callbacks=[callback],
    )
    _drop_printers(trainer)
    return trainer


def _drop_printers(trainer: Any) -> None:
    """The events tell all; transformers' own printing callback would tell it twice."""
    for callback in list(trainer.callback_handler.callbacks):
        if type(callback).__name__ in {"PrinterCallback", "ProgressCallback", "RichProgressCallback"}:
            trainer.remove_callback(callback)
