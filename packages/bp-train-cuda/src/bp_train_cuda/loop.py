"""From transformers' callbacks to our events, and from a stop request to the loop."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from bp_runs.errors import TrainingDivergedError
from bp_runs.events import Emit, Notice, StepDone
from bp_runs.losses import LossEnds
from bp_runs.rail import Stop
from bp_train_cuda.evaluation import Validator
from bp_train_cuda.probe import PeakMemory
from bp_train_cuda.watch import Watch


class StepReporter(TrainerCallback):  # type: ignore[misc]  # transformers is not typed for a strict check
    """Emits `StepDone` for every optimizer step and ends the loop when asked to.

    Raises (inside the loop):
        TrainingDivergedError: The loss is not finite.
    """

    def __init__(self, emit: Emit, stop: Stop, memory: PeakMemory, steps: int) -> None:
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
        if state.global_step < self._steps and self._stop():
            self.stopped = True
            control.should_training_stop = True

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: dict[str, Any], **_: Any
    ) -> None:
        """Turn a step's log into an event; the closing summary has no learning rate and is passed over."""
        if "loss" not in logs or "learning_rate" not in logs:
            return
        now, loss = time.perf_counter(), float(logs["loss"])
        tokens, rested = self.count_tokens(), self.watch.rested
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
                memory_bytes=self._memory.read(),
                metrics=self.take_metrics(),
                temperature=self.watch.temperature,
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
            self._last, self._rested = time.perf_counter(), self.watch.rested
        if not (is_last or control.should_training_stop):
            self.watch.end_step(speed)  # may end the run, so it comes after all that belongs to the step
