"""A run around its loop: its parts, and what is saved in the end, also of a run that was stopped or that diverged."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from bp_data.loop.checkpoint import Stateful
from bp_data.loop.loop import LoopParts, LoopState
from bp_data.loop.memory import MemoryGuard
from bp_data.loop.protocols import LoopGroup, Monitor, Saver
from bp_data.loop.sampler import StepSampler
from bp_data.loop.validation import Validator
from bp_runs.errors import TrainingDivergedError
from bp_runs.events import Emit
from bp_runs.rail import Stop, TrainOutcome
from bp_runs.spec import TrainSpec
from bp_runs.wording import command_ref

S = TypeVar("S", bound=Saver)


def build_loop(
    framework: Any,
    spec: TrainSpec,
    guard: MemoryGuard,
    sampler: StepSampler,
    open_saver: Callable[[Mapping[str, Stateful], Validator | None], S],
    *,
    monitor: Monitor,
    group: LoopGroup,
    emit: Emit,
    stop: Stop,
    sample: Callable[[int], None],
) -> tuple[LoopParts, LoopState, S]:
    """Join what a rail brings with validation and state, at the first step.

    Args:
        framework: A `Framework` that is also an `ExampleFramework` with a ``reader``.
        spec: The settings, with the number of steps planned.
        guard: Cuts micro-batches that do not fit.
        sampler: Says which examples each step visits.
        open_saver: Makes the saver from the state to save, by name, and the validator.
        monitor, group, emit, stop, sample: As in `LoopParts`.
    """
    training, validator = spec.training, None
    if framework.heldout is not None:
        validator = Validator(
            framework,
            framework.heldout.count,
            training,
            emit,
            guard=framework.reader,
            group=group,
            eval_steps=training.planned_eval_steps,
            before_batch=monitor.before_batch,
        )
    state = LoopState()
    saver = open_saver({"loop": state, "guard": guard, "reader": framework.reader}, validator)
    parts = LoopParts(
        framework=framework,
        training=training,
        steps=training.planned_steps,
        sampler=sampler,
        guard=guard,
        validator=validator,
        monitor=monitor,
        saver=saver,
        group=group,
        emit=emit,
        stop=stop,
        sample=sample,
    )
    return parts, state, saver


@contextmanager
def choosing_weights(parts: LoopParts, state: LoopState, save: Callable[[], Path], run_id: str) -> Iterator[None]:
    """Around `run_loop`: leaves the weights in memory that are to be kept; ``save`` them then.

    A context, not a call around the loop, so that a reader steps through one function less on the way to the loss.

    Args:
        parts: Everything that the loop uses.
        state: The first step, or where the checkpoint was.
        save: Publishes the weights as they are in memory.
        run_id: For the error's fix.

    Raises:
        TrainingDivergedError: With the best weights saved, if there was a validation, and how to go back to them.
    """
    validator = parts.validator
    try:
        yield
    except TrainingDivergedError as error:
        if validator is None or validator.best is None:
            raise
        validator.load_best()
        raise _name_best(error, save(), validator.best_step, parts.training.resolved_learning_rate, run_id) from error
    if validator is not None:
        if state.stopped and validator.is_due(state.step, is_last=True):
            validator.validate(state.step)  # off the schedule, so only once the checkpoint is written
        validator.restore_best(state.step)


def _name_best(
    error: TrainingDivergedError, folder: Path, step: int, rate: float, run_id: str
) -> TrainingDivergedError:
    """The error, which also says where the best weights are."""
    lower = {"training.start_from": f"{run_id}@best", "training.learning_rate": f"{rate / 4:.2g}"}
    return TrainingDivergedError(
        f"{error.message}; the best weights, of step {step}, are in {folder}",
        cause=error.cause,
        fix=f"Go back to them at a lower rate: {command_ref('train', **lower)}",
        setting="training.learning_rate",
        details={**error.details, "adapter": str(folder), "best_step": step},
    )


def summarize_run(parts: LoopParts, state: LoopState, folder: Path, peak_memory: int) -> TrainOutcome:
    """What came out of the run.

    Args:
        parts: As for `choosing_weights`.
        state: After the last step.
        folder: Where the weights were saved.
        peak_memory: Bytes, the most of any process.
    """
    first, final = state.losses.means()
    best = parts.validator
    return TrainOutcome(
        adapter=folder,
        steps=state.losses.count,
        first_loss=first,
        final_loss=final,
        tokens=state.tokens,
        seconds=state.seconds,
        peak_memory=peak_memory,
        stopped=state.stopped,
        eval_loss=best.best_loss if best else None,
        best_step=best.best_step if best and best.best_loss is not None else None,
    )
