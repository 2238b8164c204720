"""From transformers' callbacks to our events, and from a stop request to the loop."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from bp_runs.errors import TrainingDivergedError
from bp_runs.events import Emit, Notice, StepDone
from bp_runs.losses import LossEnds
from bp_runs.rail import Stop
from bp_runs.serialize import from_json
from bp_train_cuda.distributed.process_group import ProcessGroup
from bp_train_cuda.evaluation import Validator
from bp_train_cuda.probe import PeakMemory
from bp_train_cuda.watch import Watch


@dataclass(frozen=True, slots=True, kw_only=True)
class _Told:
    """What one rank says of a step."""

    loss: float
    """Its part of the step's loss."""
    tokens: int
    """Of all ranks since the run began."""
    memory: int
    temperature: float | None
    rested: float
    notes: tuple[Notice, ...]


class StepReporter(TrainerCallback):  # type: ignore[misc]  # transformers is not typed for a strict check
    """Emits `StepDone` for every optimizer step and ends the loop when asked to.

    Raises (inside the loop):
        TrainingDivergedError: The loss is not finite.
    """

    def __init__(self, emit: Emit, stop: Stop, memory: PeakMemory, steps: int, team: ProcessGroup) -> None:
        self._team = team
        self._emit = emit
        self._stop = stop
        self._memory = memory
        self._steps = steps
        self._began = self._last = 0.0
        self._seconds_before = 0.0
        self.count_tokens: Callable[[], int] = lambda: 0
        """Set by whoever counts them."""
        self.take_metrics: Callable[[], Mapping[str, float]] = dict
        """Set by whoever measures them; asked once a step."""
        self.validator: Validator | None = None
        """Visited after steps where there are held-out rows."""
        self.watch = Watch()
        """Asked after each step."""
        self.tell_answers: Callable[[int], None] = lambda _step: None
        """Called after each validation but the last."""
        self.save_hot: Callable[[], None] = lambda: None
        """Called by all of several ranks before the heat of one card ends the run; alone, the governor does it."""
        self.losses = LossEnds()
        self.tokens = 0
        self._rested = 0.0
        self.stopped = False

    @property
    def seconds(self) -> float:
        """From the first step's start to the last step's end; a run that goes on counts what it took before."""
        return self._seconds_before + self._last - self._began

    def read_state(self) -> dict[str, Any]:
        """For a checkpoint: what was told so far."""
        return {"losses": self.losses.to_dict(), "tokens": self.tokens, "seconds": self.seconds}

    def restore_state(self, state: Mapping[str, Any]) -> None:
        """Tell on from a checkpoint."""
        self.losses = LossEnds.from_dict(state["losses"])
        self.tokens, self._seconds_before = state["tokens"], state["seconds"]

    def validate_stopped(self) -> None:
        """Measure a stopped run after its last step: beside the schedule, so only when its checkpoint is written."""
        if self.stopped and self.validator is not None and self.validator.is_due(self.losses.count, is_last=True):
            self.validator.visit(self.losses.count)

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Start the clock."""
        self._began = self._last = time.perf_counter()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Finish after this step where a stop was asked for."""
        if state.global_step < self._steps and self._team.any(self._stop()):
            self.stopped = True
            control.should_training_stop = True

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: dict[str, Any], **_: Any
    ) -> None:
        """Turn a step's log into an event; the closing summary has no learning rate and is passed over."""
        if "loss" not in logs or "learning_rate" not in logs:
            return
        told = self._gather(float(logs["loss"]))
        now, loss, tokens, rested = time.perf_counter(), told.loss, told.tokens, told.rested
        speed = (tokens - self.tokens) / max(now - self._last - (rested - self._rested), 1e-9)
        self._emit(
            StepDone(
                step=state.global_step,
                steps=self._steps,
                loss=loss,
                learning_rate=float(logs["learning_rate"]),
                grad_norm=None if logs.get("grad_norm") is None else float(logs["grad_norm"]),
                tokens=tokens,
                tokens_per_second=speed,
                memory_bytes=told.memory,
                metrics=self.take_metrics(),
                temperature=told.temperature,
            )
        )
        self._last, self.tokens, self._rested = now, tokens, rested
        if not math.isfinite(loss):
            raise TrainingDivergedError(f"the loss is {loss} at step {state.global_step}")
        self.losses.add(loss)
        is_last = state.global_step == self._steps
        if self.validator is not None and self.validator.is_due(state.global_step, is_last=is_last):
            if self.validator.visit(state.global_step) and not is_last:
                control.should_training_stop = True
                self._emit(Notice(message=f"stopped early at step {state.global_step}: validation no longer improves"))
            elif not is_last:
                self.tell_answers(state.global_step)
            self._last, self._rested = time.perf_counter(), max(self._rested, self.watch.rested)
        if not (is_last or control.should_training_stop):
            self._end_guarded(speed)  # may end the run, so it comes after all that belongs to the step

    def _end_guarded(self, speed: float) -> None:
        """Let the guards of each rank look; one that ends the run ends it on all, saved."""
        if hot := self._team.try_all(partial(self.watch.end_step, speed)):
            self.save_hot()
            raise hot

    def _gather(self, loss: float) -> _Told:
        """The step of all ranks: sums of losses and tokens, the most of the rest; warnings of others are told."""
        mine = _Told(
            loss=loss,
            tokens=self.count_tokens(),
            memory=self._memory.read(),
            temperature=self.watch.temperature,
            rested=self.watch.rested,
            notes=tuple(self._team.take_warnings()),
        )
        all_told = [from_json(_Told, told) for told in self._team.all_gather(mine)]
        for rank, told in enumerate(all_told):
            for note in told.notes:
                self._emit(replace(note, message=f"process {rank}: {note.message}"))
        return _Told(
            loss=sum(told.loss for told in all_told),
            tokens=mine.tokens,
            memory=max(told.memory for told in all_told),
            temperature=max((t.temperature for t in all_told if t.temperature is not None), default=None),
            rested=max(told.rested for told in all_told),
            notes=(),
        )
