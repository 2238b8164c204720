"""Train with plain TRL trainers, as TRL's own users know them.

SFTTrainer, DPOTrainer, KTOTrainer, ORPOTrainer and CPOTrainer (SimPO).

Ours are the tokens and labels, their order, the learning rate, the adapter folder, the records and the error codes.
They get in through documented arguments (``data_collator``, ``train_sampling_strategy``, ``optimizers``,
``callbacks``); no method of a trainer is overridden. The loss, the step, the validation and what a checkpoint holds
are TRL's and transformers'. That makes this engine the reference that tests compare our own loop with.

Where TRL differs from our own loop:

- A preference method's loss is the mean of its micro-batches' means, and ``validation`` the mean of its batches' means;
  sft divides by the trained tokens of the step. The same numbers come out where batches have no ragged end.
- Epochs are joined end to end: only the last micro-batch of a run could be short, and none is.
- ORPO's likelihood term covers the prompt as well as the better answer, and is a mean over the micro-batch's tokens.
- KTO's reference point pairs each prompt with the answer of the row before it in its micro-batch; ours does so in the
  whole step, so the two agree where a step is one micro-batch.
- On a 4-bit base the adapter's weights are bfloat16.
- There is no preflight, and no recovery when the GPU runs out of memory. It runs in one process, on one GPU.
"""

from __future__ import annotations

import contextlib
import math
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
import torch
from torch.optim.lr_scheduler import LambdaLR
from transformers import PrinterCallback, Trainer
from transformers.trainer_pt_utils import get_parameter_names

from bp_data.loop.memory import MemoryGuard
from bp_data.loop.rows import pad_token
from bp_data.loop.sampler import ExampleOrder
from bp_data.loop.schedule import rate_factor
from bp_data.preparation import AnyPrepared
from bp_runs.errors import GpuOutOfMemoryError, PackingError
from bp_runs.events import Emit, Notice
from bp_runs.rail import Stop, TrainOutcome
from bp_runs.spec import TrainSpec
from bp_train_cuda.backend import PeakMemory, TorchMemory
from bp_train_cuda.distributed.process_group import ProcessGroup
from bp_train_cuda.engines.base import Loaded, answer_prompts, open_model, save_result
from bp_train_cuda.engines.trl_methods import METHODS, Collate, pack_items, token_count, trained_count
from bp_train_cuda.engines.trl_recorder import Recorder
from bp_train_cuda.guards.monitor import open_monitor
from bp_train_cuda.model import load, lora
from bp_train_cuda.model.packing import require_packable
from bp_train_cuda.optim import choose_optimizer

SCRATCH = ".trl"
"""Folder of the run where transformers writes a checkpoint before it is published; gone after the run."""
_OPTIMIZERS = {"adamw_torch": "adamw_torch_fused"}
"""transformers' names for ours, where they differ."""
_NO_DECAY = (r"bias", r"layernorm", r"rmsnorm", r"(?:^|\.)norm(?:$|\.)", r"_norm(?:$|\.)")  # as transformers does


def train(
    spec: TrainSpec, prepared: AnyPrepared, heldout: Sequence[Any], emit: Emit, stop: Stop, *, loaded: Loaded
) -> TrainOutcome:
    """Train ``loaded`` with TRL's trainer for the method, save the result, and answer the sample prompts.

    Args:
        prepared: The rows to train on.
        heldout: The validation set; may be empty.
        loaded: The base; it can't be used again after the call.

    Raises:
        GpuOutOfMemoryError: The GPU has too little memory; this engine does not split micro-batches.
        TrainingDivergedError: The loss or a weight is no longer finite.
        CheckpointInvalidError: The spec's checkpoint was not written by this engine.
        VersionUntestedError: The installed TRL has no trainer for the method.
        PackingError: The model mixes packed rows.
        DiskFullError, OutputNotWritableError: A checkpoint or the result can't be written.
    """
    try:
        with _quiet_bars(), _scratch(spec) as scratch:
            return _train(spec, prepared, heldout, emit, stop, loaded=loaded, scratch=scratch)
    except torch.OutOfMemoryError as error:
        raise GpuOutOfMemoryError(
            "the GPU ran out of memory, and the engine trl does not split micro-batches",
            cause=str(error).split(". ")[0],
            fix="Use our own loop, which does: {set:training.engine=native}; or smaller batches: "
            "{set:training.batch_size=1}",
        ) from error


def _train(
    spec: TrainSpec,
    prepared: AnyPrepared,
    heldout: Sequence[Any],
    emit: Emit,
    stop: Stop,
    *,
    loaded: Loaded,
    scratch: Path,
) -> TrainOutcome:
    memory = PeakMemory(loaded.device)
    model = open_model(spec, loaded, emit, ProcessGroup())
    emit(Notice(message="training with plain TRL: no preflight, no recovery when the GPU runs out of memory"))
    if spec.checkpoint is None:
        answer_prompts(spec, prepared, model, emit, step=0)
    rows: Sequence[Any] = prepared.rows
    if spec.training.packing:
        _require_plain_packing(model)
        rows = pack_items(rows, prepared.max_seq_length)
    visits = _order_visits(spec, len(rows))
    recorder = Recorder(spec, model, emit, stop=stop, memory=memory, scratch=scratch)
    recorder.step_tokens = _step_tokens(spec, rows, visits)
    recorder.eval_tokens = sum(trained_count(row) for row in heldout)
    recorder.answer = lambda step: answer_prompts(spec, prepared, model, emit, step=step)
    recorder.watch = open_monitor(spec.training, loaded.device, emit, stop)
    trainer = _build_trainer(spec, prepared, rows, visits, heldout, model=model, loaded=loaded, scratch=scratch)
    trainer.add_callback(recorder)
    recorder.restore()
    trainer.train(resume_from_checkpoint=None if spec.checkpoint is None else str(spec.checkpoint))
    if recorder.heat is not None:
        raise recorder.heat
    if recorder.stopped and len(heldout) and recorder.evaluated != recorder.losses.count:
        trainer.evaluate()  # off the schedule, so only now that the checkpoint is written
    recorder.restore_best()
    folder = _save(spec, prepared, model, loaded, emit, heldout=heldout)
    answer_prompts(spec, prepared, model, emit, step=recorder.losses.count)
    return recorder.outcome(folder)


def _require_plain_packing(model: Any) -> None:
    """TRL passes ``cu_seq_lens`` and ``seq_idx``; masks it leaves to the model.

    Raises:
        PackingError: The model mixes packed examples, or would without masks of our own.
    """
    if require_packable(model).masked is not None:
        raise PackingError(
            "TRL's trainer can't keep packed examples of this model apart",
            cause="the model makes its attention masks without positions",
            fix="Use our own loop: {set:training.engine=native}; or do not pack: {set:training.packing=false}",
        )


def _order_visits(spec: TrainSpec, rows: int) -> list[int]:
    """Rows in the order of all the run's micro-batches, epoch after epoch without a gap."""
    training = spec.training
    order = ExampleOrder(rows, training.seed, shuffled=training.curriculum == "none")
    wanted = training.planned_steps * training.batch_size * training.gradient_accumulation
    visits: list[int] = []
    for epoch in range(math.ceil(wanted / rows)):
        visits.extend(order.epoch(epoch))
    return visits[:wanted]


def _step_tokens(spec: TrainSpec, rows: Sequence[Any], visits: Sequence[int]) -> Mapping[int, int]:
    """Tokens read by the end of each step, from 1; 0 before the first."""
    size = spec.training.batch_size * spec.training.gradient_accumulation
    lengths = {place: token_count(rows[place]) for place in set(visits)}
    found = {0: 0}
    for step in range(1, spec.training.planned_steps + 1):
        found[step] = found[step - 1] + sum(lengths[place] for place in visits[(step - 1) * size : step * size])
    return found


def _build_trainer(
    spec: TrainSpec,
    prepared: AnyPrepared,
    rows: Sequence[Any],
    visits: Sequence[int],
    heldout: Sequence[Any],
    *,
    model: Any,
    loaded: Loaded,
    scratch: Path,
) -> Any:
    """TRL's trainer for the method, with our rows behind its collator."""
    training = spec.training
    method = METHODS[training.method]
    trainer_class, config_class = method.load()
    tokenizer = _padding_tokenizer(spec, prepared)
    args = config_class(**_arguments(spec, loaded, model, scratch), **method.arguments(training))
    optimizer = _build_optimizer(args, model)
    by_place = method.collate(int(tokenizer.pad_token_id), prepared.max_seq_length)
    trainer = trainer_class(
        model=model,
        args=args,
        data_collator=_look_up(by_place, rows, heldout),
        train_dataset=_row_numbers(visits, method.text, rows, is_heldout=False),
        eval_dataset=_row_numbers(range(len(heldout)), method.text, heldout, is_heldout=True) if len(heldout) else None,
        processing_class=tokenizer,
        optimizers=(optimizer, LambdaLR(optimizer, lambda step: rate_factor(step, training, training.planned_steps))),
    )
    trainer.remove_callback(PrinterCallback)  # our events say it all
    return trainer


def _arguments(spec: TrainSpec, loaded: Loaded, model: Any, scratch: Path) -> dict[str, Any]:
    """Options of all configs: report nowhere, log every step, save and evaluate when `Recorder` says so."""
    training, on_gpu = spec.training, loaded.device.kind == "cuda"
    optimizer = choose_optimizer(training, loaded.mode, loaded.device)
    return {
        "output_dir": str(scratch),
        "max_steps": training.planned_steps,
        "per_device_train_batch_size": training.batch_size,
        "per_device_eval_batch_size": training.batch_size,
        "gradient_accumulation_steps": training.gradient_accumulation,
        "learning_rate": training.resolved_learning_rate,
        "weight_decay": training.weight_decay,
        "max_grad_norm": training.max_grad_norm,
        "optim": _OPTIMIZERS.get(optimizer, optimizer),
        "seed": training.seed,
        "use_cpu": not on_gpu,
        "bf16": on_gpu and model.dtype == torch.bfloat16,
        "gradient_checkpointing": training.gradient_checkpointing and on_gpu,
        "train_sampling_strategy": "sequential",
        "remove_unused_columns": False,
        "prediction_loss_only": True,
        "dataloader_pin_memory": on_gpu,
        "logging_steps": 1,
        "logging_nan_inf_filter": False,
        "disable_tqdm": True,
        "report_to": "none",
        "save_strategy": "no",
        "eval_strategy": "no",
        "push_to_hub": False,
    }


def _build_optimizer(args: Any, model: Any) -> Any:
    """The optimizer that transformers would build for these arguments; norms and biases are not decayed."""
    kind, options = Trainer.get_optimizer_cls_and_kwargs(args, model)
    decayed = set(get_parameter_names(model, [torch.nn.LayerNorm], list(_NO_DECAY)))
    weights = lora.trainable_weights(model)
    groups = [
        {"params": [w for n, w in weights.items() if n in decayed], "weight_decay": args.weight_decay},
        {"params": [w for n, w in weights.items() if n not in decayed], "weight_decay": 0.0},
    ]
    return kind([group for group in groups if group["params"]], **options)


def _row_numbers(places: Sequence[int], text: Mapping[str, Any], rows: Sequence[Any], *, is_heldout: bool) -> Any:
    """A data set of row numbers, with the columns that the trainer's constructor insists on."""
    columns: dict[str, Any] = {"place": list(places), "is_heldout": [is_heldout] * len(places)}
    columns |= {name: [value] * len(places) for name, value in text.items()}
    if "completion" in text:
        columns["label"] = [bool(rows[place].label) for place in places]
    return datasets.Dataset.from_dict(columns)


def _look_up(collate: Collate, rows: Sequence[Any], heldout: Sequence[Any]) -> Any:
    def collate_places(items: Sequence[Mapping[str, Any]]) -> Any:
        return collate([(heldout if item["is_heldout"] else rows)[item["place"]] for item in items])

    return collate_places


def _save(
    spec: TrainSpec, prepared: AnyPrepared, model: Any, loaded: Loaded, emit: Emit, *, heldout: Sequence[Any]
) -> Path:
    """Publish what was trained; returns its folder."""
    if loaded.mode.name != "full" and "ref" in model.peft_config:
        model.delete_adapter("ref")  # TRL's frozen copy of the adapter as it started
    guard = MemoryGuard(TorchMemory(), emit, enabled=False)
    return save_result(spec, prepared, model, loaded, emit, heldout=heldout, guard=guard, group=ProcessGroup())


def _padding_tokenizer(spec: TrainSpec, prepared: AnyPrepared) -> Any:
    """TRL asks its tokenizer for the padding token; a model without one pads with what ends a turn."""
    pad = pad_token(prepared)
    end = prepared.facts.eos_id if prepared.facts.eos_id is not None else pad
    text = prepared.tokenizer.token_text
    return load.build_tokenizer(spec.base, pad=text(pad), eos=text(end))


@contextlib.contextmanager
def _scratch(spec: TrainSpec) -> Iterator[Path]:
    folder = spec.folders.run / SCRATCH
    shutil.rmtree(folder, ignore_errors=True)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def _quiet_bars() -> Iterator[None]:
    """No progress bars where TRL tokenizes its letters."""
    had_bars = not datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if had_bars:
            datasets.enable_progress_bars()
