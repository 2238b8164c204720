"""Checkpoints of a training run: the files of `bp_data.loop.checkpoint`, and ``random.json`` for dropout."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx
import orjson

from bp_data.loop import checkpoint as shared
from bp_data.loop.checkpoint import Stateful
from bp_data.loop.memory import MemoryGuard
from bp_data.loop.validation import Validator
from bp_runs.adapter import CONFIG_FILE
from bp_runs.checkpoint_store import Reason
from bp_runs.errors import CheckpointInvalidError, first_line
from bp_runs.events import Emit, Notice
from bp_runs.save import SaveSchedule, save_checkpoint
from bp_runs.spec import TrainSpec
from bp_train_mlx.framework import MlxFramework
from bp_train_mlx.model.lora import Adapter
from bp_train_mlx.model.save import peft_config
from bp_train_mlx.optim import AdamW, require_state

RANDOM_FILE = "random.json"


@dataclass
class Checkpointer:
    """Saves the run after a step, and puts a saved one back.

    Attributes:
        spec: Where to save, how often, and the checkpoint to resume from.
        framework: Weights and optimizer.
        parts: What else remembers something from step to step, by a name that stays the same.
        validator: None without held-out examples.
        guard: Retries a save that runs out of memory.
    """

    spec: TrainSpec
    emit: Emit
    framework: MlxFramework
    parts: Mapping[str, Stateful]
    validator: Validator | None
    guard: MemoryGuard
    _last_step: int = field(default=-1, init=False)

    def __post_init__(self) -> None:
        if self.validator is not None:
            self.parts = {**self.parts, "validation": self.validator}
        self._schedule = SaveSchedule(self.spec)

    def is_due(self, step: int) -> bool:
        """Whether the schedule wants a checkpoint after ``step``."""
        return self._schedule.is_due(step)

    def save(self, step: int, reason: Reason) -> None:
        """Save the state after ``step``, unless it is saved.

        Raises:
            DiskFullError, OutputNotWritableError: The earlier checkpoints stay.
        """
        if step == self._last_step:
            return
        self.guard.retry(lambda: self._save(step, reason), "a checkpoint")
        self._last_step = step
        self._schedule.saved()

    def _save(self, step: int, reason: Reason) -> None:
        weights = self.framework.copy_weights()
        best = self.validator.best if self.validator else None
        sizes = (*weights.values(), *(best or {}).values())
        save_checkpoint(
            self.spec,
            self.emit,
            lambda folder: self._write(folder, weights, best),
            rail="mlx",
            step=step,
            need=shared.MARGIN + sum(weight.nbytes for weight in sizes) + self._optimizer.state_bytes,
            reason=reason,
            score=self.validator.loss_after(step) if self.validator else None,
        )

    def _write(self, folder: Path, weights: Mapping[str, Any], best: Mapping[str, Any] | None) -> None:
        _write_arrays(folder / shared.WEIGHTS_FILE, weights)
        if best:
            _write_arrays(folder / shared.BEST_FILE, best)
        optimizer, trained = self._optimizer, self.framework.trained
        state = {
            f"{trained.rename(name)}{shared.FIRST}": trained.turn(value) for name, value in optimizer.first.items()
        }
        state |= {
            f"{trained.rename(name)}{shared.SECOND}": trained.turn(value) for name, value in optimizer.second.items()
        }
        _write_arrays(folder / shared.OPTIMIZER_FILE, state, {"step": str(optimizer.step)})
        (folder / RANDOM_FILE).write_bytes(orjson.dumps({"draws": self.framework.random_state()}))
        shared.write_state(folder, self.parts)
        if isinstance(trained, Adapter):
            (folder / CONFIG_FILE).write_bytes(orjson.dumps(peft_config(self.spec, trained)))

    @property
    def _optimizer(self) -> AdamW:
        assert self.framework.optimizer is not None  # noqa: S101
        return self.framework.optimizer

    def restore(self) -> None:
        """Set weights, optimizer, dropout's draws and every part to what the spec's checkpoint holds.

        Raises:
            CheckpointInvalidError: It is not of this model and adapter, or of another version.
        """
        folder = self.spec.checkpoint
        if folder is None:
            return
        state = shared.read_state(folder, set(self.parts))
        weights, _ = _read_arrays(folder / shared.WEIGHTS_FILE)
        own = self.framework.trained.weights()
        if {n: tuple(w.shape) for n, w in weights.items()} != {n: tuple(w.shape) for n, w in own.items()}:
            raise CheckpointInvalidError(f"the weights in {folder} are not those of this model and adapter")
        self.framework.load_weights(weights)
        self._restore_optimizer(folder)
        self._restore_draws(folder, state)
        for name, part in self.parts.items():
            if name in state:
                part.restore_state(state[name])
        if self.validator and (folder / shared.BEST_FILE).is_file():
            self.validator.best, _ = _read_arrays(folder / shared.BEST_FILE)

    def _restore_optimizer(self, folder: Path) -> None:
        """Both averages, under the names and in the layout of this rail."""
        if not (folder / shared.OPTIMIZER_FILE).is_file():
            raise CheckpointInvalidError(
                f"{folder} has the state of an optimizer that MLX does not have",
                cause="8-bit optimizer state is bitsandbytes', which runs on NVIDIA GPUs",
                fix="Resume the run where it began, or train on from its adapter: {set:training.start_from=RUN}",
            )
        found, metadata = _read_arrays(folder / shared.OPTIMIZER_FILE)
        optimizer, trained = self._optimizer, self.framework.trained
        for end, state in ((shared.FIRST, optimizer.first), (shared.SECOND, optimizer.second)):
            names = {name: f"{trained.rename(name)}{end}" for name in state}
            mine = {name: trained.turn(found[saved]) for name, saved in names.items() if saved in found}
            require_state(mine, {name: state[name] for name in mine})
            state.update(mine)
        if not found.keys() <= {
            trained.rename(name) + end for name in optimizer.first for end in (shared.FIRST, shared.SECOND)
        }:
            raise CheckpointInvalidError(f"the optimizer state in {folder} is of other weights")
        optimizer.step = int(metadata["step"])

    def _restore_draws(self, folder: Path, state: Mapping[str, Any]) -> None:
        file = folder / RANDOM_FILE
        if file.is_file():
            self.framework.set_random_state(orjson.loads(file.read_bytes())["draws"])
            return
        self.framework.set_random_state(state["loop"]["step"] * self.spec.training.gradient_accumulation)
        if self.spec.lora.dropout:
            message = "the run began on another rail: dropout draws other values from here on"
            self.emit(Notice(message=message, level="warning"))


def _write_arrays(file: Path, arrays: Mapping[str, Any], metadata: Mapping[str, str] | None = None) -> None:
    """Mlx reports a full disk as a RuntimeError, so the bytes go through Python's own file."""
    with file.open("wb") as stream:
        mx.save_safetensors(stream, dict(arrays), dict(metadata or {"format": "pt"}))


def _read_arrays(file: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """Arrays and metadata; read now, so that no file stays open that Windows would not let be pruned."""
    try:
        arrays, metadata = mx.load(str(file), return_metadata=True)
        mx.eval(arrays)
    except (RuntimeError, OSError, ValueError) as error:
        raise CheckpointInvalidError(f"{file.parent} cannot be read", cause=first_line(error)) from error
    return arrays, metadata
