"""Checkpoints of a training run on this rail: the files of `bp_data.loop.checkpoint`, and

    random.pt       the generators of the CPU and the GPU
    optimizer.pt    in place of optimizer.safetensors where weights are sharded, or the optimizer is bitsandbytes'
    rank-1/ …       of each further rank its generators and chunks, and its shards of the files above

The order of examples is drawn from the seed and the epoch, so the step alone says where in the data the run was.
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from bp_data.loop.checkpoint import (
    BEST_FILE,
    FIRST,
    MARGIN,
    OPTIMIZER_FILE,
    SECOND,
    WEIGHTS_FILE,
    Stateful,
    read_state,
    write_state,
)
from bp_data.loop.memory import MemoryGuard
from bp_data.loop.validation import Validator
from bp_runs.checkpoint_store import Reason
from bp_runs.errors import CheckpointInvalidError, DiskFullError, first_line
from bp_runs.events import Emit, Notice
from bp_runs.save import SaveSchedule, save_checkpoint
from bp_runs.spec import TrainSpec
from bp_train_cuda.distributed.process_group import ProcessGroup
from bp_train_cuda.distributed.sharding import local_optimizer_state, local_shard, shard_optimizer_state
from bp_train_cuda.engines.framework import TorchFramework
from bp_train_cuda.errors import RanksChangedError

TORCH_OPTIMIZER_FILE = "optimizer.pt"
RANDOM_FILE = "random.pt"
RANK_FOLDER = "rank-{}"
_OWN_PARTS = ("guard", "reader")
"""Parts that differ from rank to rank: each has its own chunks."""
_FULL = 2**20  # bytes that a full disk may still call free


class Checkpointer:
    """Saves the run after a step, and puts a saved one back.

    Args:
        spec: Where to save, how often, and the checkpoint to resume from.
        framework: Weights, optimizer, generators.
        parts: What else remembers something from step to step, by a name that stays the same.
        validator: None without held-out examples.
        guard: Retries a save that runs out of memory.
        group: The main process saves, and all must call what saves.
    """

    def __init__(
        self,
        spec: TrainSpec,
        emit: Emit,
        framework: TorchFramework,
        parts: Mapping[str, Stateful],
        *,
        validator: Validator | None,
        guard: MemoryGuard,
        group: ProcessGroup,
    ) -> None:
        self._spec = spec
        self._emit = emit
        self._framework = framework
        self._parts = {**parts, **({"validation": validator} if validator else {})}
        self._validator = validator
        self._guard = guard
        self._group = group
        self._schedule = SaveSchedule(spec)
        self._last_step = -1

    def is_due(self, step: int) -> bool:
        """Whether the schedule wants a checkpoint after ``step``; clocks differ, so the main process decides."""
        return self._group.any(self._group.rank == 0 and self._schedule.is_due(step))

    def save(self, step: int, reason: Reason) -> None:
        """Save the state after ``step``, unless it is saved.

        Raises:
            DiskFullError, OutputNotWritableError: The earlier checkpoints stay.
        """
        # A stop, the schedule and a guard can all want the checkpoint of one step.
        if step == self._last_step:
            return
        self._stage_own()
        if not self._group.rank:
            self._guard.retry(lambda: self._save(step, reason), "a checkpoint")
            for rank in range(1, self._group.count):
                shutil.rmtree(self._stage(rank), ignore_errors=True)
        self._last_step = step
        self._schedule.saved()

    def _save(self, step: int, reason: Reason) -> None:
        save_checkpoint(
            self._spec,
            self._emit,
            self._write,
            rail="cuda",
            step=step,
            need=self._need(),
            reason=reason,
            score=self._validator.loss_after(step) if self._validator else None,
        )

    def restore(self) -> None:
        """Set weights, optimizer, generators and every part to what the spec's checkpoint holds.

        Raises:
            CheckpointInvalidError: It is not of this model and adapter, or of another version.
        """
        folder = self._spec.checkpoint
        if folder is None:
            return
        own = rank_folder(folder, self._group)
        state = read_state(folder, set(self._parts))
        whole = own if self._group.is_sharded else folder
        _restore_weights(whole, self._framework.own_weights())
        self._restore_optimizer(whole)
        remembered = state | self._restore_random(own)
        for name, part in self._parts.items():
            if name in remembered:
                part.restore_state(remembered[name])
        if self._validator and (whole / BEST_FILE).is_file():
            # Copies: loaded tensors keep their file mapped, and Windows would not let it be pruned.
            best = load_file(whole / BEST_FILE).items()
            self._validator.best = {name: weight.clone() for name, weight in best}

    def _restore_optimizer(self, folder: Path) -> None:
        optimizer = self._framework.optimizer
        assert optimizer is not None  # noqa: S101
        try:
            if (folder / OPTIMIZER_FILE).is_file():
                _load_averages(folder / OPTIMIZER_FILE, optimizer, self._framework.own_weights())
            else:
                optimizer.load_state_dict(
                    torch.load(folder / TORCH_OPTIMIZER_FILE, weights_only=True, map_location="cpu")
                )
        except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
            raise CheckpointInvalidError(f"{folder} holds another optimizer", cause=first_line(error)) from error
        if self._group.is_sharded:
            shard_optimizer_state(optimizer)

    def _restore_random(self, folder: Path) -> dict[str, Any]:
        """Set the generators; returns what parts remember of this rank alone."""
        if (folder / RANDOM_FILE).is_file():
            saved = torch.load(folder / RANDOM_FILE, weights_only=True)
            self._framework.set_random_state((saved["cpu"], saved["cuda"]))
            parts: dict[str, Any] = saved["parts"]
            return parts
        if self._spec.lora.dropout:
            message = "the run began on another rail: dropout draws other values from here on"
            self._emit(Notice(message=message, level="warning"))
        return {}

    def _stage_own(self) -> None:
        """Let each further rank write what only it knows, for the main process to take along."""
        if self._group.count == 1:
            return
        if self._group.rank:
            # Next to the checkpoints, so that the main process publishes all parts with one rename.
            place = self._stage(self._group.rank)
            shutil.rmtree(place, ignore_errors=True)
            place.mkdir()
            with full_disk_coded(place):
                self._write_own(place)
        self._group.all_gather(None)

    def _stage(self, rank: int) -> Path:
        return self._spec.folders.run / f".{RANK_FOLDER.format(rank)}"

    def _write_own(self, folder: Path) -> None:
        """What differs from rank to rank: generators, and of sharded weights and optimizer state the shards."""
        cpu, cuda = self._framework.random_state()
        own = {name: self._parts[name].read_state() for name in _OWN_PARTS if name in self._parts}
        torch.save({"cpu": cpu, "cuda": cuda, "parts": own}, folder / RANDOM_FILE)
        if self._group.is_sharded or not self._group.rank:
            weights = {name: weight.detach().contiguous() for name, weight in self._framework.own_weights().items()}
            save_file(weights, folder / WEIGHTS_FILE)
            if self._validator and self._validator.best:
                save_file(self._validator.best, folder / BEST_FILE)
            optimizer = self._framework.optimizer
            assert optimizer is not None  # noqa: S101
            if _is_plain(optimizer, self._group):
                _save_averages(folder / OPTIMIZER_FILE, optimizer, self._framework.own_weights())
            else:
                torch.save(local_optimizer_state(optimizer.state_dict()), folder / TORCH_OPTIMIZER_FILE)

    def _write(self, folder: Path) -> None:
        with full_disk_coded(folder):
            self._write_own(folder)
            write_state(folder, self._parts)
            configs = getattr(self._framework.model.model, "peft_config", {})
            if "default" in configs:
                configs["default"].save_pretrained(str(folder))
            for rank in range(1, self._group.count):
                shutil.copytree(self._stage(rank), folder / RANK_FOLDER.format(rank))

    def _need(self) -> int:
        """Bytes that a checkpoint takes, about."""
        optimizer = self._framework.optimizer
        tensors = [*self._framework.own_weights().values(), *_tensors(optimizer.state if optimizer else {})]
        tensors += self._validator.best.values() if self._validator and self._validator.best else ()
        shares = self._group.count if self._group.is_sharded else 1
        return MARGIN + shares * sum(int(tensor.numel()) * int(tensor.element_size()) for tensor in tensors)


def rank_folder(checkpoint: Path, group: ProcessGroup) -> Path:
    """Where a rank finds what differs from rank to rank."""
    return checkpoint / RANK_FOLDER.format(group.rank) if group.rank else checkpoint


def require_ranks(checkpoint: Path, count: int) -> None:
    """Reject another number of ranks than the run began with.

    Raises:
        RanksChangedError: With both numbers.
    """
    before = 1 + len(list(checkpoint.glob(RANK_FOLDER.format("*"))))
    if before != count:
        raise RanksChangedError(
            f"the run was trained by {before} processes, and {count} are to resume it",
            fix=f"Start as many as before: {_launcher(before)}; or start from scratch: {{set:training.resume=false}}",
        )


def _launcher(count: int) -> str:
    return "without torchrun" if count == 1 else f"torchrun --nproc-per-node {count} {{program:resume RUN}}"


def _restore_weights(folder: Path, weights: Mapping[str, torch.Tensor]) -> None:
    try:
        found = load_file(folder / WEIGHTS_FILE)
    except (OSError, SafetensorError) as error:
        raise CheckpointInvalidError(f"{folder} cannot be read", cause=first_line(error)) from error
    if {n: t.shape for n, t in found.items()} != {n: w.shape for n, w in weights.items()}:
        raise CheckpointInvalidError(f"the weights in {folder} are not those of this model and adapter")
    with torch.no_grad():
        for name, weight in weights.items():
            weight.copy_(found[name])


def _is_plain(optimizer: torch.optim.Optimizer, group: ProcessGroup) -> bool:
    """Whether other frameworks can read the optimizer's state: two whole averages of each weight."""
    return isinstance(optimizer, torch.optim.AdamW) and not group.is_sharded


def _save_averages(file: Path, optimizer: torch.optim.Optimizer, weights: Mapping[str, torch.Tensor]) -> None:
    """AdamW's averages by the names of their weights, which any framework reads."""
    found: dict[str, torch.Tensor] = {}
    step = 0
    for name, weight in weights.items():
        state = optimizer.state.get(weight)
        if not state:
            continue  # it has had no gradient yet
        found |= {name + FIRST: state["exp_avg"].contiguous(), name + SECOND: state["exp_avg_sq"].contiguous()}
        step = int(state["step"])
    save_file(found, file, {"step": str(step)})  # with two entries, their order would be random


def _load_averages(file: Path, optimizer: torch.optim.Optimizer, weights: Mapping[str, torch.Tensor]) -> None:
    """Undo `_save_averages`, in the layout that torch's own ``load_state_dict`` takes."""
    # Copies: loaded tensors keep their file mapped.
    found = {name: value.clone() for name, value in load_file(file).items()}
    with safe_open(file, "pt") as opened:
        step = float(opened.metadata()["step"])
    # The optimizer knows weights by place, which depends on how it groups them; files know them by name.
    names = {id(weight): name for name, weight in weights.items()}
    template = optimizer.state_dict()
    order = [weight for group in optimizer.param_groups for weight in group["params"]]
    own = {names[id(weight)]: weight for weight in order}
    if not {name.rpartition(".exp_avg")[0] for name in found} <= own.keys():
        raise KeyError("the weights have other names")
    state = {
        place: {
            "step": torch.tensor(step),
            "exp_avg": found[names[id(weight)] + FIRST],
            "exp_avg_sq": found[names[id(weight)] + SECOND],
        }
        for place, weight in enumerate(order)
        if names[id(weight)] + FIRST in found
    }
    for place, values in state.items():
        if values["exp_avg"].shape != order[place].shape:
            raise ValueError(f"{names[id(order[place])]} has another shape")
    # Not set directly: load_state_dict also moves each average to its weight's device and dtype.
    optimizer.load_state_dict({**template, "state": state})


def _tensors(state: Any) -> Iterator[torch.Tensor]:
    """Every tensor in an optimizer's state."""
    if isinstance(state, torch.Tensor):
        yield local_shard(state)
    elif isinstance(state, Mapping):
        for value in state.values():
            yield from _tensors(value)


@contextlib.contextmanager
def full_disk_coded(folder: Path) -> Iterator[None]:
    """Torch and safetensors report a full disk with errors of their own."""
    try:
        yield
    except (RuntimeError, SafetensorError) as error:
        if isinstance(error, torch.OutOfMemoryError) or shutil.disk_usage(folder).free > _FULL:
            raise
        raise DiskFullError(f"no room left while writing {folder}", cause=first_line(error)) from error
