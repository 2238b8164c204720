"""What a TRL trainer's callbacks tell: events, validation, checkpoints in our store, and when to stop."""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import orjson
import torch
from safetensors.torch import load_file, save_file
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from bp_runs.checkpoint_store import Reason
from bp_runs.errors import CheckpointInvalidError, TrainingDivergedError
from bp_runs.events import Emit, EvalDone, Notice, StepDone
from bp_runs.metrics import LossEnds
from bp_runs.rail import Stop, TrainOutcome
from bp_runs.save import SaveSchedule, save_checkpoint
from bp_runs.spec import TrainSpec
from bp_train_cuda.backend import PeakMemory
from bp_train_cuda.checkpoint import full_disk_coded
from bp_train_cuda.errors import GpuTemperatureError
from bp_train_cuda.guards.monitor import Monitor
from bp_train_cuda.model import lora

STATE_FILE = "trl_state.json"
BEST_FILE = "best.safetensors"
STATE_SCHEMA = "backpropagate.trl_state/1"
_MARGIN = 16 * 2**20  # bytes for what is small: losses, manifest


class Recorder(TrainerCallback):  # type: ignore[misc]  # transformers is not typed for a strict check
    """From transformers' callbacks to our events and checkpoints, and from a stop request to the trainer.

    Args:
        model: What is trained; its best weights are remembered.
        stop: Asked after each step.
        scratch: Where transformers writes its checkpoints.

    Raises (inside the trainer's loop):
        TrainingDivergedError: The loss is not finite.
        DiskFullError, OutputNotWritableError: A checkpoint can't be written.
    """

    def __init__(
        self, spec: TrainSpec, model: Any, emit: Emit, *, stop: Stop, memory: PeakMemory, scratch: Path
    ) -> None:
        self._spec = spec
        self._model = model
        self._emit = emit
        self._stop = stop
        self._memory = memory
        self._scratch = scratch
        self._schedule = SaveSchedule(spec)
        self._reason: Reason = "schedule"
        self._began = self._last = 0.0
        self._seconds_before = 0.0
        self._since_best = 0
        self._best: dict[str, torch.Tensor] = {}
        self.best_loss: float | None = None
        self.best_step = 0
        self.eval_loss = 0.0
        self.evaluated = -1
        """The step after which the validation set was last measured."""
        self.losses = LossEnds()
        self.stopped = False
        self.heat: Exception | None = None
        """What the GPU's temperature ends the run with, once it is saved."""
        self.step_tokens: Mapping[int, int] = {}
        self.eval_tokens = 0
        self.answer: Any = lambda _step: None
        self.watch = Monitor()

    # ---- transformers' callbacks, in the order in which a step calls them

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Start the clock."""
        self._began = self._last = time.perf_counter()

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Wait while the GPU is too hot."""
        self.watch.before_batch()

    def on_substep_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Wait while the GPU is too hot."""
        self.watch.before_batch()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Say whether to evaluate, to save and to stop after this step."""
        step, training = state.global_step, self._spec.training
        is_last = step >= training.planned_steps
        control.should_evaluate = self.eval_tokens > 0 and (is_last or step % training.planned_eval_steps == 0)
        control.should_save = self._schedule.is_due(step)
        self._reason = "schedule"
        if not is_last and self._stop():
            self.stopped = control.should_training_stop = control.should_save = True
            self._reason = "stop"

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: Mapping[str, Any], **_: Any
    ) -> None:
        """A step's log as an event; the closing summary has no learning rate."""
        if "loss" not in logs or "learning_rate" not in logs:
            return
        now, step, loss = time.perf_counter(), state.global_step, float(logs["loss"])
        speed = (self.step_tokens[step] - self.step_tokens[step - 1]) / max(now - self._last, 1e-9)
        norm = logs.get("grad_norm")
        self._emit(
            StepDone(
                step=step,
                steps=self._spec.training.planned_steps,
                loss=loss,
                learning_rate=float(logs["learning_rate"]),
                grad_norm=None if norm is None else float(norm),
                tokens=self.step_tokens[step],
                tokens_per_second=speed,
                memory_bytes=self._memory.read(),
                temperature=self.watch.temperature,
                metrics=_read_metrics(logs, ""),
            )
        )
        self._last = now
        if not math.isfinite(loss):
            raise TrainingDivergedError(f"the loss is {loss} at step {step}")
        self.losses.add(loss)
        if step < self._spec.training.planned_steps and not self.stopped:
            self._end_step(control, speed)

    def _end_step(self, control: TrainerControl, speed: float) -> None:
        """Let the guards look at the GPU; one that ends the run ends it saved."""
        try:
            self.watch.end_step(speed)
        except GpuTemperatureError as error:
            self.heat, self._reason = error, "temperature"
            control.should_evaluate, control.should_save, control.should_training_stop = False, True, True

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: Mapping[str, Any],
        **_: Any,
    ) -> None:
        """The validation as an event; stop early where it no longer improves."""
        training, step, loss = self._spec.training, state.global_step, float(metrics["eval_loss"])
        is_best = math.isfinite(loss) and (self.best_loss is None or loss < self.best_loss)
        if is_best:
            self.best_loss, self.best_step, self._since_best = loss, step, 0
            self._best = {n: w.detach().cpu().clone() for n, w in lora.trainable_weights(self._model).items()}
        else:
            self._since_best += 1
        self.evaluated, self.eval_loss = step, loss
        found = _read_metrics(metrics, "eval_")
        self._emit(EvalDone(step=step, loss=loss, tokens=self.eval_tokens, best=is_best, metrics=found))
        if step >= training.planned_steps or self.stopped:
            return
        if training.early_stop and self._since_best >= training.early_stop:
            control.should_training_stop = True
            self._emit(Notice(message=f"stopped early at step {step}: the validation loss no longer improves"))
        else:
            self.answer(step)
        self._last = time.perf_counter()

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Publish what transformers has just written."""
        step = state.global_step
        written = self._scratch / f"checkpoint-{step}"
        save_checkpoint(
            self._spec,
            self._emit,
            lambda folder: self._write(written, folder),
            rail="cuda",
            step=step,
            need=_folder_size(written) + sum(weight.nbytes for weight in self._best.values()) + _MARGIN,
            reason=self._reason,
            score=self.eval_loss if self.evaluated == step else None,
            facts={"engine": "trl"},
        )
        self._schedule.saved()
        shutil.rmtree(written)

    # ---- what outlives a step

    def _write(self, written: Path, folder: Path) -> None:
        with full_disk_coded(folder):
            # Without the reference adapter of DPO and KTO: it is the start, which the seed makes again, and where a
            # checkpoint has one, older transformers load it in place of what was trained.
            shutil.copytree(written, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns("ref"))
            if self._best:
                save_file(self._best, folder / BEST_FILE)
            state = {
                "schema": STATE_SCHEMA,
                "losses": self.losses.to_dict(),
                "seconds": self._seconds,
                "best_loss": self.best_loss,
                "best_step": self.best_step,
                "since_best": self._since_best,
                "evaluated": self.evaluated,
            }
            (folder / STATE_FILE).write_bytes(orjson.dumps(state))

    def restore(self) -> None:
        """Continue the records of the spec's checkpoint.

        Raises:
            CheckpointInvalidError: Another engine wrote it.
        """
        folder = self._spec.checkpoint
        if folder is None:
            return
        try:
            state = orjson.loads((folder / STATE_FILE).read_bytes())
        except FileNotFoundError as error:
            raise CheckpointInvalidError(
                f"{folder} was not written by the engine trl",
                cause=f"it has no {STATE_FILE}",
                fix="Resume with the engine that wrote it: {set:training.engine=native}; or start from scratch: "
                "{set:training.resume=false}",
            ) from error
        if state["schema"] != STATE_SCHEMA:
            raise CheckpointInvalidError(f"{folder} has {state['schema']}, and this version reads {STATE_SCHEMA}")
        self.losses, self._seconds_before = LossEnds.from_dict(state["losses"]), state["seconds"]
        self.best_loss, self.best_step = state["best_loss"], state["best_step"]
        self._since_best, self.evaluated = state["since_best"], state["evaluated"]
        if (folder / BEST_FILE).is_file():
            # Copies: loaded tensors keep their file mapped, and Windows would not let it be pruned.
            self._best = {name: weight.clone() for name, weight in load_file(folder / BEST_FILE).items()}

    def restore_best(self) -> None:
        """Put the weights of the lowest validation loss back, where the setting says so."""
        if not self._best or self.best_step == self.losses.count or self._spec.training.keep == "last":
            return
        with torch.no_grad():
            for name, weight in lora.trainable_weights(self._model).items():
                weight.copy_(self._best[name])
        message = f"keeping the adapter of step {self.best_step}: its validation loss {self.best_loss:.4f} is the best"
        self._emit(Notice(message=message, details={"best_step": self.best_step}))

    @property
    def _seconds(self) -> float:
        return self._seconds_before + self._last - self._began

    def outcome(self, folder: Path) -> TrainOutcome:
        """What came out of the run."""
        first, final = self.losses.means()
        return TrainOutcome(
            adapter=folder,
            steps=self.losses.count,
            first_loss=first,
            final_loss=final,
            tokens=self.step_tokens[self.losses.count],
            seconds=self._seconds,
            peak_memory=self._memory.read(),
            stopped=self.stopped,
            eval_loss=self.best_loss,
            best_step=None if self.best_loss is None else self.best_step,
        )


def _read_metrics(logs: Mapping[str, Any], prefix: str) -> dict[str, float]:
    """TRL's names for what `StepDone.metrics` promises; KTO logs no accuracy."""
    names = {"accuracy": "rewards/accuracies", "margin": "rewards/margins"}
    return {ours: float(logs[prefix + theirs]) for ours, theirs in names.items() if prefix + theirs in logs}


def _folder_size(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
