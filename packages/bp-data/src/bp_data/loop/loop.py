"""The training loop. Reading starts here, at `run_loop`.

What a run promises is in this file and the ones next to it: the order of examples, a loss that weighs every trained
token (or example) of a step the same, recovery from out of memory inside the step, validation, early stop, guards,
checkpoints, and events. What computes is behind `bp_data.loop.protocols.Framework`, which each rail implements once.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from bp_data.loop.memory import MemoryGuard
from bp_data.loop.protocols import Framework, LoopGroup, Monitor, Saver
from bp_data.loop.sampler import StepSampler, split_evenly
from bp_data.loop.schedule import rate_factor
from bp_data.loop.validation import Validator
from bp_runs.errors import TrainingDivergedError
from bp_runs.events import Emit, Notice, StepDone
from bp_runs.metrics import LossEnds
from bp_runs.rail import Stop
from bp_runs.spec import TrainingSpec


@dataclass(kw_only=True)
class LoopState:
    """What the loop remembers from step to step, and from one process to the next."""

    step: int = 0
    """Optimizer steps that are done."""
    tokens: int = 0
    """Tokens that they read, prompts included, over all processes."""
    seconds: float = 0.0
    """That they took, pauses included."""
    losses: LossEnds = field(default_factory=LossEnds)
    stopped: bool = False
    """Whether the user stopped the run."""

    def read_state(self) -> dict[str, Any]:
        """For a checkpoint."""
        return {"step": self.step, "tokens": self.tokens, "seconds": self.seconds, "losses": self.losses.to_dict()}

    def restore_state(self, state: Mapping[str, Any]) -> None:
        """Continue where a checkpoint was."""
        self.step, self.tokens, self.seconds = state["step"], state["tokens"], state["seconds"]
        self.losses = LossEnds.from_dict(state["losses"])


@dataclass(frozen=True, kw_only=True)
class LoopParts:
    """Everything that `run_loop` uses."""

    framework: Framework
    training: TrainingSpec
    steps: int
    """Optimizer steps of the whole run."""
    sampler: StepSampler
    guard: MemoryGuard
    validator: Validator | None
    monitor: Monitor
    saver: Saver
    group: LoopGroup
    emit: Emit
    stop: Stop
    sample: Callable[[int], None]
    """Answers the sample prompts after a validation."""


def run_loop(parts: LoopParts, state: LoopState) -> None:  # noqa: C901, PLR0915  # the order of a step, in one place
    """Train from the step after ``state.step`` to the last, or until the run is stopped; ``state`` is kept up to date.

    Raises:
        TrainingDivergedError: The loss or the gradient is not finite.
        OomExhaustedError: Not even a single example fits the device's memory.
        CodedError: A guard ends the run, another process failed, or a checkpoint cannot be written.
    """
    framework, group, training = parts.framework, parts.group, parts.training
    clock = _Clock(state.seconds, parts.monitor)
    is_early = parts.validator is not None and parts.validator.is_stalled  # an early stop before the checkpoint
    while state.step < parts.steps and not (state.stopped or is_early):
        # 1. The step's examples, and what their losses are divided by: a sum over all processes.
        micro_batches = [framework.expand(indexes) for indexes in parts.sampler.step(state.step)]
        mine = [(framework.weigh(batch), framework.count_tokens(batch)) for batch in micro_batches]
        total, tokens = group.sum_values([float(sum(weights)) for weights in zip(*mine, strict=True)])
        # A step of rows without a trained token has a loss of 0, not 0 / 0.
        total = max(total, 1.0)

        # 2. Loss and backward of every micro-batch; out of memory runs the whole step again in smaller chunks.
        own = [index for batch in micro_batches for index in batch]
        shared = framework.prepare(own, parts.sampler.all_indexes(state.step))
        # Before the step's first dropout draw: a retry sets the generators back to here.
        start = framework.random_state()

        def accumulate() -> Any:
            sums = None
            for batch in micro_batches:  # noqa: B023  # called within this iteration only
                parts.monitor.before_batch()
                for chunk in list(split_evenly(batch, parts.guard.chunks)) or [batch]:
                    found = framework.backward(chunk, total, shared)  # noqa: B023
                    sums = found if sums is None else framework.add(sums, found)
            return sums

        def undo() -> None:
            framework.clear_gradients()
            framework.set_random_state(start)  # noqa: B023

        sums = parts.guard.split(accumulate, max(map(len, micro_batches)), undo)

        # 3. Clip and update. The numbers are read after the update is launched, so that the device never idles.
        # After the splitter: ranks may cut their work into different chunks, but meet once a step.
        framework.sum_gradients()
        rate = training.resolved_learning_rate * rate_factor(state.step, training, parts.steps)
        pending = framework.clip(training.max_grad_norm, sums)
        parts.guard.retry(lambda: framework.update(rate), "the optimizer step")  # noqa: B023
        numbers = dict(pending())
        norm = numbers["grad_norm"]

        # 4. Events.
        state.step += 1
        state.tokens += int(tokens)
        speed = clock.end_step(tokens)
        state.seconds = clock.seconds
        loss = _report(parts, state, numbers, total=total, rate=rate, speed=speed)
        if not math.isfinite(loss):
            raise TrainingDivergedError(f"the loss is {loss} at step {state.step}", details={"step": state.step})
        if not math.isfinite(norm):  # the update has spoiled the weights: no checkpoint of them
            raise TrainingDivergedError(
                f"the gradient's norm is {norm} at step {state.step}", details={"step": state.step}
            )
        state.losses.add(loss)
        is_last = state.step == parts.steps
        state.stopped = not is_last and group.any(parts.stop())

        # 5. Validation and early stop.
        if parts.validator is not None and parts.validator.is_due(state.step, is_last=is_last):
            is_early = parts.validator.validate(state.step) and not is_last
            if is_early:
                parts.emit(Notice(message=f"early stop at step {state.step}: the validation loss no longer improves"))
            elif not is_last:
                parts.sample(state.step)
            clock.skip()

        # 6. Guards, which may end the run: whatever belongs to the step is done by now.
        is_over = is_last or is_early or state.stopped
        error = None if is_over else group.try_all(partial(parts.monitor.end_step, speed))
        if error is not None:
            parts.saver.save(state.step, "temperature")
            raise error

        # 7. Checkpoint.
        if state.stopped:
            parts.saver.save(state.step, "stop")
        elif parts.saver.is_due(state.step):
            parts.saver.save(state.step, "schedule")
            clock.skip()


def _report(
    parts: LoopParts, state: LoopState, numbers: dict[str, float], *, total: float, rate: float, speed: float
) -> float:
    """Emit the step over all processes; returns its loss, a mean over ``total`` tokens or examples."""
    norm = numbers.pop("grad_norm")
    monitor = parts.monitor
    mine = {
        "numbers": numbers,
        "memory": parts.framework.peak_memory(),
        "temperature": monitor.temperature,
        "notes": [note.to_dict() for note in parts.group.take_warnings()],
    }
    everyone = parts.group.all_gather(mine)
    for rank, one in enumerate(everyone):
        for note in one["notes"]:
            message = f"process {rank}: {note['message']}"
            parts.emit(Notice(message=message, level=note["level"], details=note["details"]))
    means = {name: sum(one["numbers"][name] for one in everyone) / total for name in numbers}
    loss = float(means.pop("loss"))
    parts.emit(
        StepDone(
            step=state.step,
            steps=parts.steps,
            loss=loss,
            learning_rate=rate,
            grad_norm=norm,
            tokens=state.tokens,
            tokens_per_second=speed,
            memory_bytes=max(one["memory"] for one in everyone),
            temperature=max((one["temperature"] for one in everyone if one["temperature"] is not None), default=None),
            metrics=means,
        )
    )
    return loss


class _Clock:
    """Seconds of steps: speed leaves out pauses, validations and saves."""

    def __init__(self, seconds: float, monitor: Monitor) -> None:
        self._monitor = monitor
        self._before = seconds
        self._began = self._last = time.perf_counter()
        self._paused = monitor.paused

    @property
    def seconds(self) -> float:
        """Of the run up to the last step's end."""
        return self._before + self._last - self._began

    def end_step(self, tokens: float) -> float:
        """Tokens per second since the last step."""
        now = time.perf_counter()
        busy = now - self._last - (self._monitor.paused - self._paused)
        self._last, self._paused = now, self._monitor.paused
        return tokens / max(busy, 1e-9)

    def skip(self) -> None:
        """Leave out what happened since the step's end."""
        self._last, self._paused = time.perf_counter(), self._monitor.paused
