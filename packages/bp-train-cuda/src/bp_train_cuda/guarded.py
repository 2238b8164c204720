"""One mixin over TRL's trainers, so that every method is trained under the same guards."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate.data_loader import prepare_data_loader
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase, TrainerCallback
from trl import SFTConfig

from bp_runs.errors import ContractError
from bp_runs.events import Notice
from bp_runs.spec import TrainingSpec, TrainSpec
from bp_train_cuda.batches import fill_empty
from bp_train_cuda.checkpoint import Checkpointer, own_folder
from bp_train_cuda.distributed.process_group import ProcessGroup
from bp_train_cuda.distributed.sharding import (
    full_norm,
    is_sharded_weight,
    scale_gradients_to_sum,
    shard_optimizer_state,
)
from bp_train_cuda.guards.oom import Batch, StepSplitter, try_again
from bp_train_cuda.guards.optimizer import guard_optimizer, keep_paged
from bp_train_cuda.head import mend_head
from bp_train_cuda.lora import trainable_weights
from bp_train_cuda.optimizer import choose_optimizer
from bp_train_cuda.order import RankBatches, RowOrder
from bp_train_cuda.probe import Device, Mode
from bp_train_cuda.rounding import round_by_chance

_ROUNDED_AWAY = (
    "this optimizer rounds small changes of bfloat16 weights away; --optim adamw_8bit or paged_adamw_8bit keeps them"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Parts:
    """What a trainer is built of, whatever the method."""

    spec: TrainSpec
    device: Device
    mode: Mode
    model: Any
    """The model with its adapter, or with all its weights open."""
    tokenizer: PreTrainedTokenizerBase
    """Knows the padding token; the rows are tokens already."""
    splitter: StepSplitter
    callbacks: Sequence[TrainerCallback]
    team: ProcessGroup

    @property
    def bf16(self) -> bool:
        """Whether the GPU computes in bfloat16."""
        return self.device.kind == "cuda" and self.model.dtype == torch.bfloat16

    @property
    def pad_id(self) -> int:
        """The token that fills rows up."""
        return int(self.tokenizer.pad_token_id)


def build_arguments(parts: Parts) -> SFTConfig:
    """What all methods tell TRL: report nowhere, save nothing, log each step, leave our rows alone; on one GPU.

    To transformers every rank of several is a process alone: what they share is added up here.
    """
    training, on_gpu = parts.spec.training, parts.device.kind == "cuda"
    found = SFTConfig(
        output_dir=str(parts.spec.folders.run),
        max_steps=training.steps,
        per_device_train_batch_size=training.batch_size,
        gradient_accumulation_steps=training.gradient_accumulation,
        learning_rate=training.resolved_learning_rate,
        weight_decay=training.weight_decay,
        max_grad_norm=training.max_grad_norm,
        optim=choose_optimizer(training, parts.mode, parts.device, is_sharded=parts.team.is_sharded),
        seed=training.seed,
        data_seed=training.seed,
        use_cpu=not on_gpu,
        bf16=parts.bf16,
        gradient_checkpointing=training.gradient_checkpointing and on_gpu,
        remove_unused_columns=False,
        dataloader_num_workers=0,
        dataloader_pin_memory=on_gpu,
        logging_steps=1,
        logging_nan_inf_filter=False,
        disable_tqdm=True,
        report_to="none",
        save_strategy="no",
        push_to_hub=False,
        max_length=None,
        dataset_kwargs={"skip_prepare_dataset": True},
    )
    found._n_gpu = min(1, found.n_gpu)  # noqa: SLF001  # else transformers spreads one process over all cards it sees
    return found


class Guarded:
    """Goes before a TRL trainer in a class's bases; `finish` makes it ready.

    Carries the learning rate's course, the rows' order, the guard around each micro-batch, and the count of tokens.
    """

    rate: Callable[[int], float]
    """Share of the peak learning rate at an optimizer step, counted from 0."""
    splitter: StepSplitter
    reader: StepSplitter
    """Splits what runs without gradients."""
    order: RowOrder
    team: ProcessGroup
    look: Callable[[], None] = staticmethod(lambda: None)
    """Called before each micro-batch, when training may have to wait."""
    checkpointer: Checkpointer | None = None
    """Saves after steps, and puts a saved state back before the first; None: nothing is saved."""
    tokens = 0
    """Tokens of finished steps, of all ranks; TRL counts those of failed attempts too."""
    _own_tokens = 0
    """Of this rank's micro-batches of the step that goes on."""
    seen: torch.Tensor | None = None
    """What the last forward has measured beside the loss, as sums over rows; None: nothing."""
    _seen_since: torch.Tensor | None = None

    collate: Callable[[Any], Batch]
    """Rows of `heldout_set` to a batch for `measure`."""

    def finish(self, parts: Parts, rows: Any) -> None:
        """Take what TRL's constructor cannot be told: our rows as a torch data set, the guard, the rate's course."""
        trainer: Any = self
        training = parts.spec.training
        mend_head(parts.device)
        trainer.train_dataset = rows
        self.team = parts.team
        weights = trainable_weights(parts.model).values()
        self._parted = [weight for weight in weights if is_sharded_weight(weight)]
        self._whole = [weight for weight in weights if not is_sharded_weight(weight)]
        self.order = RowOrder(len(rows), training.seed, shuffled=training.curriculum == "none")
        if parts.mode.name != "full":
            for weight in trainable_weights(parts.model).values():
                weight.data = weight.data.float()  # TRL makes adapters on 4-bit bases bfloat16: small steps get lost
        self.splitter, self.reader = parts.splitter, parts.splitter.without_gradients()
        self.rate = lambda step: rate_factor(step, training)
        for callback in list(trainer.callback_handler.callbacks):
            # The events tell all; transformers' own printing callback would tell it twice.
            if type(callback).__name__ in {"PrinterCallback", "ProgressCallback", "RichProgressCallback"}:
                trainer.remove_callback(callback)

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Any:
        """Forward and backward of a micro-batch, in as many pieces as fit."""
        self.look()
        step = super().training_step  # type: ignore[misc]  # TRL's

        def run(piece: Batch) -> torch.Tensor:
            loss = step(model, dict(piece), num_items_in_batch).reshape(1)
            return loss if self.seen is None else torch.cat([loss, self.seen])

        loss, *_ = found = self.splitter.run(run, inputs)
        self._seen_since = found[1:] if self._seen_since is None else self._seen_since + found[1:]
        self._own_tokens += count_tokens(inputs) if counts(inputs) else 0
        trainer: Any = self
        if trainer.accelerator.sync_gradients:  # the step's last micro-batch
            self._end_step()
        return loss

    def _end_step(self) -> None:
        """Add up what the ranks have of a step."""
        (tokens,) = self.team.sum_values([self._own_tokens])
        self.tokens, self._own_tokens = self.tokens + int(tokens), 0
        scale_gradients_to_sum(self._parted)
        if self._whole:
            self.team.sum_gradients(self._whole, self.splitter.emit)

    def get_train_dataloader(self) -> Any:
        """Transformers' loader; of several ranks each gets its share of a step's rows."""
        trainer: Any = self
        team, rows, args = self.team, trainer.train_dataset, trainer.args
        if team.count == 1:
            return super().get_train_dataloader()  # type: ignore[misc]
        loader = DataLoader(
            rows,
            batch_sampler=RankBatches(self.order, args.per_device_train_batch_size, team.rank, team.count),
            collate_fn=fill_empty(trainer.data_collator, rows),
            pin_memory=args.dataloader_pin_memory,
        )
        return prepare_data_loader(loader, args.device, num_processes=1, process_index=0, put_on_device=True)

    def get_batch_samples(self, *arguments: Any, **named: Any) -> tuple[list[Batch], Any]:
        """A step's micro-batches, and what their losses are divided by: as many as all ranks have together."""
        batches, count = super().get_batch_samples(*arguments, **named)  # type: ignore[misc]
        return self.share_out(batches, count) if self.team.count > 1 else (batches, count)

    def share_out(self, batches: list[Batch], count: Any) -> tuple[list[Batch], Any]:
        """Micro-batches of one rank as parts of all ranks'; ``count`` is that of the trained tokens."""
        (total,) = self.team.sum_values([count])
        return batches, torch.full_like(count, int(total))

    def take_seen(self) -> torch.Tensor:
        """Sums of `seen` over the micro-batches since the last call."""
        if self._seen_since is None:
            raise ContractError("no micro-batch has been run")
        found, self._seen_since = self._seen_since, None
        return found

    def take_metrics(self) -> Mapping[str, float]:
        """The method's metrics over the micro-batches since the last call; to be asked once a step."""
        return {}

    def rows_to_meet(self) -> int:
        """How many rows `meet_rows` will run through the model."""
        return 0

    def meet_rows(self) -> None:
        """Measure what the method needs to know of the rows under the model as it starts; before the first step."""

    def heldout_set(self, rows: Sequence[Any]) -> Any:
        """Held-out rows as a torch data set whose items `collate` joins."""
        raise NotImplementedError

    def measure(self, batch: Batch) -> Mapping[str, float]:
        """Sums over a batch: ``loss``, ``count`` of what the loss is a mean of, and the method's own metrics.

        To be called without gradients; a lack of memory halves the batch here too.
        """
        raise NotImplementedError

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:  # noqa: ARG002  # transformers' name
        return self.order

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        """Transformers' optimizer, which finishes a step that runs out of memory and loses no small update."""
        made = super().create_optimizer(*args, **kwargs)  # type: ignore[misc]
        trainer: Any = self
        if not round_by_chance(trainer.optimizer, trainer.args.seed):
            self.splitter.emit(Notice(message=_ROUNDED_AWAY))
        guard_optimizer(trainer.optimizer, self.splitter.emit, enabled=self.splitter.enabled)
        keep_paged(trainer.optimizer)
        return made

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:  # noqa: ARG002  # TRL's name
        """The learning rate's course as `rate` says."""
        trainer: Any = self
        if getattr(trainer, "lr_scheduler", None) is None:
            trainer.lr_scheduler = LambdaLR(optimizer or trainer.optimizer, self.rate)
        return trainer.lr_scheduler

    def read_state(self) -> dict[str, Any]:
        """For a checkpoint: the tokens so far."""
        return {"tokens": self.tokens}

    def restore_state(self, state: Mapping[str, Any]) -> None:
        """Count on from a checkpoint."""
        self.tokens = state["tokens"]

    def _maybe_log_save_evaluate(self, *arguments: Any, **named: Any) -> None:
        """Once a step is done: tell it, then save where it is wanted."""
        trainer: Any = self
        if self.checkpointer is not None and self.checkpointer.wants(trainer.state.global_step):
            trainer.control.should_save = True
        super()._maybe_log_save_evaluate(*arguments, **named)  # type: ignore[misc]

    def _save_checkpoint(self, model: Any, trial: Any) -> None:  # noqa: ARG002  # transformers' names
        if self.checkpointer is not None:
            self.checkpointer.meet(self)
            save = partial(self.checkpointer.save, self)
            try_again(save, "a checkpoint", self.splitter.emit, enabled=self.splitter.enabled)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:  # noqa: ARG002
        if self.checkpointer is not None:
            self.checkpointer.restore()

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """Each rank's own."""
        super()._load_rng_state(checkpoint and str(own_folder(Path(checkpoint), self.team)))  # type: ignore[misc]

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """Of parted moments each rank's own."""
        if checkpoint is None or not self.team.is_sharded:
            super()._load_optimizer_and_scheduler(checkpoint)  # type: ignore[misc]
            return
        super()._load_optimizer_and_scheduler(str(own_folder(Path(checkpoint), self.team)))  # type: ignore[misc]
        trainer: Any = self
        shard_optimizer_state(trainer.optimizer)

    def _clip_grad_norm(self, model: Any) -> Any:
        return full_norm(super()._clip_grad_norm(model))  # type: ignore[misc]

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        return full_norm(super()._get_grad_norm(model, grad_norm))  # type: ignore[misc]


def counts(batch: Mapping[str, torch.Tensor]) -> bool:
    """Whether the batch has rows, and is not what `bp_train_cuda.batches.fill_empty` makes of none."""
    return bool((batch["share"] > 0).any() if "share" in batch else (batch["labels"] >= 0).any())


def count_tokens(batch: Mapping[str, torch.Tensor]) -> int:
    """Tokens of a batch without those that only pad it."""
    return int(batch["attention_mask"].sum()) if "attention_mask" in batch else batch["input_ids"].numel()


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
