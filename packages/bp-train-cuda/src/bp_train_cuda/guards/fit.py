"""A run begins with as many rows at once as fitted its card before, and leaves word for the next one."""

from __future__ import annotations

from datetime import UTC, datetime

import orjson

from bp_data.loop.memory import HALVINGS
from bp_runs.errors import DiskFullError, OutputNotWritableError, ShapesUnknownError, first_line
from bp_runs.events import Emit, Notice
from bp_runs.spec import TrainSpec
from bp_train_cuda.backend import Device
from bp_train_cuda.memory.estimate import estimate, read_load
from bp_train_cuda.memory.fit import FitMemory, Fitted, describe_load
from bp_train_cuda.memory.shapes import read_shapes


class CardFit:
    """What fitted this card, for one run: asked before it, told after it.

    Args:
        mode: How the base is held.
    """

    def __init__(self, spec: TrainSpec, mode: str, device: Device, emit: Emit) -> None:
        self._spec = spec
        self._mode = mode
        self._device = device
        self._emit = emit
        self._memory = FitMemory(spec.folders.machine, device.card)
        self._load = describe_load(spec, mode)

    def recall_halvings(self) -> int:
        """Halvings to begin with, told to the user where there are any."""
        if not self._spec.training.oom_recovery:
            return 0
        training = self._spec.training
        found = self._memory.recall(self._load, self._parts, self._device.memory, most=HALVINGS)
        if found:
            chunks = min(self._parts, 2**found)
            what = f"{training.batch_size} {'packs' if training.packing else 'rows'}"
            message = f"micro-batches of {what} run in {chunks} chunks, which is what fitted this GPU before"
            self._emit(Notice(message=message, details={"chunks": chunks}))
        return found

    @property
    def _parts(self) -> int:
        """Into how many parts a micro-batch can be cut: its rows; packed ones lie together, many to a pack."""
        training = self._spec.training
        return training.batch_size * (2**HALVINGS if training.packing else 1)

    def remember(self, halvings: int, peak: int) -> None:
        """Write down how many rows fitted at once; on a GPU also what they took.

        Args:
            peak: Bytes in use at most.
        """
        on_gpu = self._device.kind == "cuda"
        if not on_gpu and not halvings:
            return
        training = self._spec.training
        rows = -(-training.batch_size // 2**halvings)
        is_whole = not training.packing or training.batch_size >= 2**halvings  # else less than a pack ran at once
        fitted = Fitted(
            rows=-(-self._parts // 2**halvings) if halvings else None,
            free=self._device.memory,
            peak=peak if on_gpu else 0,
            estimated=_estimate(self._spec, self._mode, rows) if on_gpu and is_whole else 0,
            at=datetime.now(UTC).isoformat(timespec="seconds"),
        )
        try:
            self._memory.remember(self._load, fitted)
        except (OSError, DiskFullError, OutputNotWritableError) as error:
            message = "what fitted this card could not be written down; the next run finds out anew"
            self._emit(Notice(message=message, level="warning", details={"reason": first_line(error)}))


def _estimate(spec: TrainSpec, mode: str, rows: int) -> int:
    """Bytes in use as `bp_train_cuda.memory.estimate` has them for ``rows`` rows at once; 0 where it cannot say."""
    try:
        shapes = read_shapes(orjson.loads((spec.base / "config.json").read_bytes()))
    except ShapesUnknownError:
        return 0
    return estimate(shapes, read_load(spec, mode, rows)).in_use
