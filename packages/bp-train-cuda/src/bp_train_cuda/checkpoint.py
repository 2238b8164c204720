"""Checkpoints of a training on transformers: what its Trainer saves, made whole by `bp_runs.checkpoint`.

    weights.safetensors     the trainable weights by name, as they are after the step
    best.safetensors        those of the lowest validation loss so far, where there was a validation
    optimizer.pt scheduler.pt rng_state.pth trainer_state.json    the Trainer's own files
    state.json              ours: schema, the losses' ends, tokens, seconds, halvings, validation so far

transformers writes its files in place and picks ``checkpoint-N`` by name; here they are written aside, hashed and
renamed with the rest. The rows' order is drawn from the seed and the epoch, so the step says where in the data the
run was.
"""

from __future__ import annotations

import contextlib
import math
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import orjson
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers.trainer import TRAINER_STATE_NAME

from bp_runs.checkpoint import Reason, is_due, save_checkpoint
from bp_runs.errors import CheckpointInvalidError, DiskFullError, first_line
from bp_runs.events import Emit
from bp_runs.losses import LossEnds
from bp_runs.migrations import Migration, migrate, schema_number
from bp_runs.spec import TrainSpec
from bp_train_cuda.lora import trainable_weights

WEIGHTS_FILE = "weights.safetensors"
BEST_FILE = "best.safetensors"
STATE_FILE = "state.json"
STATE_NAME = "backpropagate.cuda_state"
_FULL = 2**20  # bytes that a full disk may still call free
_MARGIN = 16 * 2**20  # bytes for what is small: random states, losses, manifest

Weights = dict[str, torch.Tensor]


def _keep_ends(state: dict[str, Any]) -> None:
    state["reporter"]["losses"] = LossEnds(state["reporter"]["losses"]).to_dict()


# Of state.json, which had no schema at first; as in `bp_runs.migrations`, the list only grows at its end.
_STEPS = (Migration(2, "of the losses only the first and the last", _keep_ends),)
STATE_SCHEMA = f"{STATE_NAME}/{_STEPS[-1].number}"


class Stateful(Protocol):
    """A part of the loop that remembers something from step to step."""

    def read_state(self) -> dict[str, Any]:
        """JSON-ready; read after a step is done and told."""
        ...

    def restore_state(self, state: Mapping[str, Any]) -> None:
        """Take what `read_state` gave in another process."""
        ...


class Validation(Stateful, Protocol):
    """What measures the held-out rows, and holds the best weights."""

    best: Weights
    """The weights of the lowest validation loss, on the CPU; empty before the first validation."""

    def loss_after(self, step: int) -> float | None:
        """The validation loss after ``step``, in nats, where that was the last one measured."""
        ...


class Checkpointer:
    """Saves the run after a step where the schedule, a stop or a guard wants it, and puts a saved one back.

    Args:
        spec: Where to save, how often, and the checkpoint to go on from.
        model: Its trainable weights are saved.
        parts: What remembers something from step to step, by a name that stays the same.
        validation: None without held-out rows.
        is_stopping: Whether the run ends after this step because the user asked.
    """

    def __init__(
        self,
        spec: TrainSpec,
        emit: Emit,
        model: Any,
        parts: Mapping[str, Stateful],
        *,
        validation: Validation | None,
        is_stopping: Callable[[], bool],
    ) -> None:
        self._spec = spec
        self._emit = emit
        self._model = model
        self._parts = {**parts, **({"validation": validation} if validation else {})}
        self._validation = validation
        self._is_stopping = is_stopping
        self._asked: Reason | None = None
        self._last_step = -1

    def request(self, reason: Reason) -> None:
        """Save after the step that is going on, once it is told; for guards, from any callback."""
        self._asked = reason

    def save_now(self, trainer: Any, reason: Reason) -> None:
        """Save at once, for a guard that ends the run by raising; the step must have been told (``on_log``).

        Raises:
            DiskFullError, OutputNotWritableError: As `save`.
        """
        if trainer.state.global_step != self._last_step:
            self._asked = reason
            self.save(trainer)

    def wants(self, step: int) -> bool:
        """Whether to save after ``step``, which is done and not yet told."""
        if step == self._last_step:
            return False
        if self._asked is None and self._is_stopping():
            self._asked = "stop"
        return self._asked is not None or is_due(self._spec, step)

    def save(self, trainer: Any) -> None:
        """Save the state after the trainer's last step.

        Raises:
            DiskFullError, OutputNotWritableError: The earlier checkpoints stay.
        """
        step = int(trainer.state.global_step)
        save_checkpoint(
            self._spec,
            self._emit,
            lambda folder: self._write(trainer, folder),
            rail="cuda",
            step=step,
            need=self._need(trainer),
            reason=self._asked or "schedule",
            score=self._validation.loss_after(step) if self._validation else None,
        )
        self._asked, self._last_step = None, step

    def restore(self) -> None:
        """Put the weights of the spec's checkpoint into the model, and give every part what it remembered.

        Raises:
            CheckpointInvalidError: It is not of this model and adapter, or of another version of the rail.
        """
        folder = self._spec.checkpoint
        if folder is None:
            return
        _restore_weights(folder, trainable_weights(self._model))
        state = _read_state(folder, set(self._parts))
        for name, part in self._parts.items():
            part.restore_state(state[name])
        if self._validation and (folder / BEST_FILE).is_file():
            # Copies: loaded tensors keep their file mapped, and Windows would not let it be pruned.
            self._validation.best = {name: weight.clone() for name, weight in load_file(folder / BEST_FILE).items()}

    def _need(self, trainer: Any) -> int:
        tensors = [*trainable_weights(self._model).values(), *_tensors(trainer.optimizer.state)]
        tensors += self._validation.best.values() if self._validation else ()
        return _MARGIN + sum(int(tensor.numel()) * int(tensor.element_size()) for tensor in tensors)

    def _write(self, trainer: Any, folder: Path) -> None:
        with told_full_disk(folder):
            weights = trainable_weights(self._model)
            save_file({name: weight.detach().contiguous() for name, weight in weights.items()}, folder / WEIGHTS_FILE)
            if self._validation and self._validation.best:
                save_file(self._validation.best, folder / BEST_FILE)
            state = {name: part.read_state() for name, part in self._parts.items()}
            (folder / STATE_FILE).write_bytes(orjson.dumps({"schema": STATE_SCHEMA, **state}))
            trainer._save_optimizer_and_scheduler(str(folder))  # noqa: SLF001  # the Trainer's parts, saved one by one
            trainer._save_rng_state(str(folder))  # noqa: SLF001
            history, trainer.state.log_history = trainer.state.log_history, []  # metrics.jsonl has it
            trainer.state.save_to_json(str(folder / TRAINER_STATE_NAME))
            trainer.state.log_history = history


def _read_state(folder: Path, parts: set[str]) -> dict[str, Any]:
    """What each part remembered, led on to today's schema."""
    saved = {"schema": f"{STATE_NAME}/1"} | orjson.loads((folder / STATE_FILE).read_bytes())
    remembered = saved.keys() - {"schema"}
    if remembered != parts or (schema_number(saved, STATE_NAME) or math.inf) > _STEPS[-1].number:
        raise CheckpointInvalidError(
            f"{folder} was saved by another version of the rail",
            cause=f"{saved['schema']} of {sorted(remembered)}, not {STATE_SCHEMA} of {sorted(parts)}",
        )
    return migrate(saved, STATE_NAME, _STEPS)


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


def _tensors(state: Any) -> Iterator[torch.Tensor]:
    """Every tensor in an optimizer's state."""
    if isinstance(state, torch.Tensor):
        yield state
    elif isinstance(state, Mapping):
        for value in state.values():
            yield from _tensors(value)


@contextlib.contextmanager
def told_full_disk(folder: Path) -> Iterator[None]:
    """Torch and safetensors tell a full disk in words of their own."""
    try:
        yield
    except (RuntimeError, SafetensorError) as error:
        if isinstance(error, torch.OutOfMemoryError) or shutil.disk_usage(folder).free > _FULL:
            raise
        raise DiskFullError(f"no room left while writing {folder}", cause=first_line(error)) from error
