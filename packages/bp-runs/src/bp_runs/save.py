"""When a run saves a checkpoint, and how every rail saves one."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from bp_runs.checkpoint_store import CheckpointFolder, Reason
from bp_runs.events import CheckpointSaved, Emit
from bp_runs.recovery import write_copy
from bp_runs.spec import TrainSpec


def save_checkpoint(
    spec: TrainSpec,
    emit: Emit,
    write: Callable[[Path], None],
    *,
    rail: str,
    step: int,
    need: int,
    reason: Reason = "schedule",
    score: float | None = None,
    facts: Mapping[str, Any] | None = None,
) -> None:
    """Save one checkpoint of the run by the spec's keep policy, and tell it; the way of every rail.

    Next to the rail's files it gets ``settings.json``, from which a damaged record is rebuilt (`bp_runs.recovery`).

    Args:
        write: Puts the rail's files into the empty folder that it is given.
        need, reason, score, facts: As `CheckpointFolder.save`.

    Raises:
        DiskFullError, OutputNotWritableError: The earlier checkpoints stay.
    """
    began = time.perf_counter()
    folder = CheckpointFolder(spec.folders.run, keep=spec.training.keep_checkpoints)
    with folder.save(
        run_id=spec.folders.run_id, rail=rail, step=step, need=need, reason=reason, score=score, facts=facts
    ) as partial:
        write(partial)
        write_copy(spec.folders.run, partial)
    saved = folder.read()[0]
    seconds = time.perf_counter() - began
    emit(CheckpointSaved(step=step, path=str(saved.path), bytes=saved.bytes, seconds=seconds, reason=reason))


def is_due(spec: TrainSpec, step: int) -> bool:
    """Whether ``save_steps`` asks for a checkpoint after ``step``; not after the last, which leaves the adapter."""
    every = spec.training.save_steps
    return every > 0 and step % every == 0 and step < spec.training.planned_steps


class SaveSchedule:
    """Decides when a training loop saves: every ``save_steps`` steps and every ``save_minutes`` minutes.

    The loop asks once per step and reports every save, whatever its reason. With several processes only rank 0 may
    decide, since clocks differ: broadcast its answer. A save leaves no trace in the state that is trained, so a run
    resumed from a checkpoint saved by time ends in the same bytes.

    Args:
        spec: Its training settings; 0 steps or 0 minutes turns that part off.
        clock: Seconds that only go forward.
    """

    def __init__(self, spec: TrainSpec, clock: Callable[[], float] = time.monotonic) -> None:
        self._spec = spec
        self._clock = clock
        self._seconds = 60 * spec.training.save_minutes
        self._saved_at = clock()

    def is_due(self, step: int) -> bool:
        """Whether to save after ``step``; never after the last, which leaves the adapter."""
        if is_due(self._spec, step):
            return True
        waited = self._clock() - self._saved_at
        return 0 < self._seconds <= waited and step < self._spec.training.planned_steps

    def saved(self) -> None:
        """Count the minutes from now."""
        self._saved_at = self._clock()
