"""Supervised fine-tuning on TRL's SFTTrainer, fed with tokens and labels that bp-data has made."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import SequentialSampler
from transformers import PreTrainedTokenizerBase, TrainerCallback
from trl import SFTConfig, SFTTrainer

from bp_data import Prepared
from bp_runs.spec import TrainingSpec
from bp_train_cuda.batches import PackSet, RowSet, join_packs, pad_rows
from bp_train_cuda.guards.oom import StepSplitter
from bp_train_cuda.lora import trainable_weights


def build_trainer(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    prepared: Prepared,
    spec: TrainingSpec,
    folder: Path,
    *,
    on_gpu: bool,
    in_4bit: bool,
    bf16: bool,
    splitter: StepSplitter,
    callback: TrainerCallback,
) -> Any:
    """A trainer that reports nowhere, saves nothing by itself and logs each step to ``callback``."""
    config = SFTConfig(
        output_dir=str(folder),
        max_steps=spec.steps,
        per_device_train_batch_size=spec.batch_size,
        gradient_accumulation_steps=spec.gradient_accumulation,
        learning_rate=spec.learning_rate,
        weight_decay=spec.weight_decay,
        max_grad_norm=spec.max_grad_norm,
        optim="adamw_8bit" if in_4bit else "adamw_torch_fused",
        seed=spec.seed,
        data_seed=spec.seed,
        use_cpu=not on_gpu,
        bf16=bf16,
        gradient_checkpointing=spec.gradient_checkpointing and on_gpu,
        max_length=None,
        dataset_kwargs={"skip_prepare_dataset": True},
        remove_unused_columns=False,
        dataloader_num_workers=0,
        dataloader_pin_memory=on_gpu,
        logging_steps=1,
        logging_nan_inf_filter=False,
        disable_tqdm=True,
        report_to="none",
        save_strategy="no",
        push_to_hub=False,
    )
    rows = prepared.rows
    packs = PackSet(rows, rows.lengths(), prepared.max_seq_length) if spec.packing else None
    trainer = _Trainer(
        model=model,
        args=config,
        train_dataset=Dataset.from_list([{k: list(v) for k, v in RowSet(rows)[0].items()}]),  # TRL wants its kind
        data_collator=join_packs if packs else pad_rows(tokenizer.pad_token_id),
        processing_class=tokenizer,
        callbacks=[callback],
    )
    trainer.train_dataset = packs or RowSet(rows)
    trainer.in_order = spec.curriculum != "none"
    for weight in trainable_weights(model).values():
        weight.data = weight.data.float()  # TRL makes adapters on 4-bit bases bfloat16: small steps would be lost
    trainer.splitter = splitter
    trainer.rate = lambda step: rate_factor(step, spec)
    _drop_printers(trainer)
    return trainer


def rate_factor(step: int, spec: TrainingSpec) -> float:
    """Share of the peak learning rate at optimizer step ``step``, counted from 0.

    Linear warm-up to 1, starting at 1/warmup_steps so that the first step is not lost; then as the scheduler says,
    ending just above 0 (linear) or at 0 after the last step (cosine).
    """
    if step < spec.warmup_steps:
        return (step + 1) / spec.warmup_steps
    left = (spec.steps - step) / max(1, spec.steps - spec.warmup_steps)  # from 1 down to 0
    match spec.scheduler:
        case "linear":
            return max(0.0, left)
        case "cosine":
            return 0.5 * (1 + math.cos(math.pi * (1 - max(0.0, left))))
        case "constant":
            return 1.0


class _Trainer(SFTTrainer):  # type: ignore[misc]  # TRL is not typed for a strict check
    """TRL's trainer with our course of the learning rate and our guard around each micro-batch."""

    rate: Callable[[int], float]
    splitter: StepSplitter
    in_order = False
    """Take rows as they lie, not shuffled."""
    tokens = 0
    """Tokens of finished micro-batches; TRL counts those of failed attempts too."""

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Any:
        step = super().training_step
        loss = self.splitter.run(lambda piece: step(model, dict(piece), num_items_in_batch), inputs)
        self.tokens += (
            int(inputs["attention_mask"].sum()) if "attention_mask" in inputs else inputs["input_ids"].numel()
        )
        return loss

    def loss_sum(self, batch: Any) -> torch.Tensor:
        """Cross-entropy summed over the trained tokens of a batch, in nats."""
        with self.compute_loss_context_manager():
            loss: torch.Tensor = self.compute_loss(self.model, dict(batch), num_items_in_batch=1)
        return loss.detach().float()

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        if self.in_order:
            return SequentialSampler(self.train_dataset)
        return super()._get_train_sampler(train_dataset)

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:  # noqa: ARG002  # TRL's name
        if getattr(self, "lr_scheduler", None) is None:
            self.lr_scheduler = LambdaLR(optimizer or self.optimizer, self.rate)
        return self.lr_scheduler


def _drop_printers(trainer: Any) -> None:
    """The events tell all; transformers' own printing callback would tell it twice."""
    for callback in list(trainer.callback_handler.callbacks):
        if type(callback).__name__ in {"PrinterCallback", "ProgressCallback", "RichProgressCallback"}:
            trainer.remove_callback(callback)
