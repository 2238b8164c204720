"""What several ranks can train together, how sharding changes the settings, and how large a step is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from operator import attrgetter

from bp_runs.events import Notice
from bp_runs.spec import TrainingSpec, TrainSpec
from bp_runs.wording import setting_ref
from bp_train_cuda.backend import choose_device
from bp_train_cuda.checkpoint import require_ranks
from bp_train_cuda.distributed.process_group import ProcessGroup
from bp_train_cuda.errors import RanksError


def require_supported(spec: TrainSpec, group: ProcessGroup) -> None:
    """Reject what several ranks can't train together.

    Raises:
        RanksError: Engines trl and unsloth; full fine-tuning on unlike GPUs; with sharded weights, a setting that needs
            them unsharded.
        RanksChangedError: As `bp_train_cuda.checkpoint.require_ranks`.
    """
    if spec.checkpoint is not None:
        require_ranks(spec.checkpoint, group.count)
    if group.count > 1 and (engine := spec.training.engine) in {"trl", "unsloth"}:
        raise RanksError(
            f"the engine {engine} trains in one process",
            fix="Use our own loop: {set:training.engine=native}; or start one process.",
        )
    if group.is_sharded:
        _require_shardable(spec)
    elif group.count > 1 and spec.training.mode == "full":
        _require_alike(group.all_gather(choose_device().card.rsplit(" ", 2)[0]))  # without its memory


def _require_alike(gpus: Sequence[str]) -> None:
    """Unlike GPUs draw different random numbers from one seed, so they would round bfloat16 weights differently."""
    if len(set(gpus)) > 1:
        raise RanksError(
            f"full fine-tuning needs GPUs of one kind, and these differ: {', '.join(gpus)}",
            fix="Choose GPUs of one kind with CUDA_VISIBLE_DEVICES; or train an adapter: {set:training.mode=lora}",
        )


def _require_shardable(spec: TrainSpec) -> None:
    training = spec.training
    # Key, value that works, whether the one that is set does not.
    rules = (
        ("training.mode", "lora", training.mode == "qlora"),
        ("training.fp8", False, training.fp8),
        ("training.optim", "adamw_torch", "8bit" in training.optim and training.mode == "full"),
        ("training.preflight", "off", training.preflight == "on"),
    )
    for key, instead, is_wrong in rules:
        if is_wrong:
            raise RanksError(
                f"{setting_ref(key, attrgetter(key)(spec))} does not work with FSDP2, which shards the weights",
                fix=f"Change it: {setting_ref(key, instead)}; or use DDP: torchrun, or accelerate without FSDP.",
                setting=key,
            )


def sharded_training(training: TrainingSpec) -> TrainingSpec:
    """The settings under FSDP2: no 4-bit base, and no retry of a micro-batch, which only one rank would run."""
    mode = "lora" if training.mode == "auto" else training.mode
    return replace(training, mode=mode, oom_recovery=False)


def ranks_notice(spec: TrainSpec, count: int) -> Notice:
    """The event that shows how many examples a step has over all ranks."""
    training = spec.training
    rows = training.batch_size * training.gradient_accumulation * count
    kind = "FSDP2" if spec.ranks and spec.ranks.sharded else "DDP"
    message = (
        f"{count} processes train together ({kind}): {training.batch_size} rows × {training.gradient_accumulation} "
        f"micro-batches × {count} = {rows} rows per step"
    )
    return Notice(message=message, details={"ranks": count, "rows_per_step": rows, "kind": kind})
