"""Checkpoints of a training on transformers: what its Trainer saves, made whole by `bp_runs.checkpoint`.

    weights.safetensors     the trainable weights by name, as they are after the step
    best.safetensors        those of the lowest validation loss so far, where there was a validation
    optimizer.pt scheduler.pt rng_state.pth trainer_state.json    the Trainer's own files
    rank-1/ …               of each further rank its random state, and where weights are parted the files above
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
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME, TRAINER_STATE_NAME

from bp_runs.checkpoint import Reason, is_due, save_checkpoint
from bp_runs.errors import CheckpointInvalidError, DiskFullError, first_line
from bp_runs.events import Emit
from bp_runs.losses import LossEnds
from bp_runs.migrations import Migration, migrate, schema_number
from bp_runs.spec import TrainSpec
from bp_train_cuda.distributed.process_group import ProcessGroup
from bp_train_cuda.distributed.sharding import local_optimizer_state, local_shard, local_weights
from bp_train_cuda.errors import RanksChangedError

WEIGHTS_FILE = "weights.safetensors"
BEST_FILE = "best.safetensors"
STATE_FILE = "state.json"
STATE_NAME = "backpropagate.cuda_state"
RANK_FOLDER = "rank-{}"
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
        team: Of several ranks the first saves, and all must call what saves.
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
        team: ProcessGroup,
    ) -> None:
        self._spec = spec
        self._emit = emit
        self._model = model
        self._parts = {**parts, **({"validation": validation} if validation else {})}
        self._validation = validation
        self._is_stopping = is_stopping
        self._team = team
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
            self.meet(trainer)
            self.save(trainer)

    def wants(self, step: int) -> bool:
        """Whether to save after ``step``, which is done and not yet told."""
        if step == self._last_step:
            return False
        if self._asked is None and self._is_stopping():
            self._asked = "stop"
        return self._asked is not None or is_due(self._spec, step)

    def meet(self, trainer: Any) -> None:
        """Before a save: let each further rank lay down what only it knows, for rank 0 to take along."""
        if self._team.count == 1:
            return
        if self._team.rank:
            place = self._stage(self._team.rank)
            shutil.rmtree(place, ignore_errors=True)
            place.mkdir()
            with told_full_disk(place):
                self._write_own(trainer, place)
        self._team.all_gather(None)

    def _stage(self, rank: int) -> Path:
        return self._spec.folders.run / f".{RANK_FOLDER.format(rank)}"

    def _write_own(self, trainer: Any, folder: Path) -> None:
        """What differs from rank to rank: the random state, and of parted weights and moments the shares."""
        trainer._save_rng_state(str(folder))  # noqa: SLF001  # the Trainer's parts, saved one by one
        if self._team.is_sharded or not self._team.rank:
            weights = local_weights(self._model)
            save_file({name: weight.detach().contiguous() for name, weight in weights.items()}, folder / WEIGHTS_FILE)
            if self._validation and self._validation.best:
                save_file(self._validation.best, folder / BEST_FILE)
            torch.save(local_optimizer_state(trainer.optimizer.state_dict()), folder / OPTIMIZER_NAME)
            torch.save(trainer.lr_scheduler.state_dict(), folder / SCHEDULER_NAME)

    def save(self, trainer: Any) -> None:
        """Save the state after the trainer's last step; `meet` goes before. Ranks but the first save nothing.

        Raises:
            DiskFullError, OutputNotWritableError: The earlier checkpoints stay.
        """
        step = int(trainer.state.global_step)
        if self._team.rank:
            self._asked, self._last_step = None, step
            return
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
        own = own_folder(folder, self._team) if self._team.is_sharded else folder
        _restore_weights(own, local_weights(self._model))
        state = _read_state(folder, set(self._parts))
        for name, part in self._parts.items():
            part.restore_state(state[name])
        if self._validation and (own / BEST_FILE).is_file():
            # Copies: loaded tensors keep their file mapped, and Windows would not let it be pruned.
            self._validation.best = {name: weight.clone() for name, weight in load_file(own / BEST_FILE).items()}

    def _need(self, trainer: Any) -> int:
        tensors = [*local_weights(self._model).values(), *_tensors(trainer.optimizer.state)]
        tensors += self._validation.best.values() if self._validation else ()
        shares = self._team.count if self._team.is_sharded else 1
        return _MARGIN + shares * sum(int(tensor.numel()) * int(tensor.element_size()) for tensor in tensors)

    def _write(self, trainer: Any, folder: Path) -> None:
        with told_full_disk(folder):
            self._write_own(trainer, folder)
            state = {name: part.read_state() for name, part in self._parts.items()}
            (folder / STATE_FILE).write_bytes(orjson.dumps({"schema": STATE_SCHEMA, **state}))
            for rank in range(1, self._team.count):
                shutil.copytree(self._stage(rank), folder / RANK_FOLDER.format(rank))
            history, trainer.state.log_history = trainer.state.log_history, []  # metrics.jsonl has it
            trainer.state.save_to_json(str(folder / TRAINER_STATE_NAME))
            trainer.state.log_history = history


def own_folder(checkpoint: Path, team: ProcessGroup) -> Path:
    """Where a rank finds what differs from rank to rank."""
    return checkpoint / RANK_FOLDER.format(team.rank) if team.rank else checkpoint


def require_ranks(checkpoint: Path, count: int) -> None:
    """Refuse to go on with another number of ranks.

    Raises:
        RanksChangedError: With both numbers.
    """
    before = 1 + len(list(checkpoint.glob(RANK_FOLDER.format("*"))))
    if before != count:
        raise RanksChangedError(
            f"the run was trained by {before} processes, and {count} are to go on with it",
            way_out=f"Start as many as before: {_launcher(before)}; or begin anew: --no-resume",
        )


def _launcher(count: int) -> str:
    return "without torchrun" if count == 1 else f"torchrun --nproc-per-node {count} -m backpropagate …"


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
        yield local_shard(state)
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
