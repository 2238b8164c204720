"""What fitted a GPU, and how far estimates were off there: remembered from run to run in one small file.

    ``{"schema": "backpropagate.fitted/1", "cards": {gpu: {what: {"rows", "free", "peak", "estimated", "at"}}}}``

Two runs that end at the same moment may lose one of two entries, which costs no more than one halving again.
"""

from __future__ import annotations

import hashlib
import statistics
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import orjson

from bp_data.loop.memory import HALVINGS
from bp_data.loop.shapes import read_shapes
from bp_runs.errors import DiskFullError, OutputNotWritableError, ShapesUnknownError, first_line
from bp_runs.events import Emit, Notice
from bp_runs.files import publish_json
from bp_runs.spec import TrainSpec
from bp_train_cuda.memory.estimate import estimate, read_load

if TYPE_CHECKING:
    from bp_train_cuda.backend import Device

FITTED_FILE = "fitted.json"
_SCHEMA = "backpropagate.fitted/1"
_MORE_ROOM = 1.05  # a GPU with so much more free than then may hold what did not fit


@dataclass(frozen=True, slots=True, kw_only=True)
class Fitted:
    """What one training took of a GPU."""

    rows: int | None
    """The most that ran at once where more did not fit, eighths of packs with packing; None: all that were requested
    fitted."""
    free: int
    """Bytes free on the GPU when the run began."""
    peak: int
    """Bytes in use at most."""
    estimated: int
    """What `bp_train_cuda.memory.estimate` said before; 0: nothing."""
    at: str


def describe_load(spec: TrainSpec, mode: str) -> str:
    """Everything that decides how much memory a row takes, in one line: the key of an entry."""
    config = hashlib.sha256((spec.base / "config.json").read_bytes()).hexdigest()[:12]
    lora, training = spec.lora, spec.training
    adapter = "" if mode == "full" else f" r{lora.r} {lora.target_modules}{' dora' if lora.use_dora else ''}"
    ways = f"{' packed' if training.packing else ''}{'' if training.gradient_checkpointing else ' kept'}"
    return f"{config} {training.method} {mode}{adapter} {spec.model.max_seq_length}{ways}"


class FitMemory:
    """Reads and writes the file; without a folder it remembers nothing.

    Args:
        folder: Where facts about this machine are kept.
        gpu: The GPU's name and size; None: the only one in the file, if there is but one.
    """

    def __init__(self, folder: Path | None, gpu: str | None = None) -> None:
        self._file = None if folder is None else folder / FITTED_FILE
        known = [name for name in self._read_gpus() if name != "cpu"] if gpu is None else [gpu]
        self._card = known[0] if len(known) == 1 else ""

    def recall(self, load: str, batch_size: int, free: int, *, most: int) -> int:
        """Halvings to begin with, at most ``most``: 0 where nothing is known, or the GPU has more room than then.

        Args:
            batch_size: Rows of a micro-batch, or what it is counted in for `Fitted.rows`.
        """
        found = self._read().get(load)
        if found is None or found.rows is None or free > _MORE_ROOM * found.free:
            return 0
        return next((h for h in range(most) if -(-batch_size // 2**h) <= found.rows), most)

    def remember(self, load: str, fitted: Fitted) -> None:
        """Write an entry down, in place of an earlier one of the same load."""
        if self._file is None:
            return
        self._file.parent.mkdir(parents=True, exist_ok=True)
        cards = self._read_gpus()
        cards.setdefault(self._card, {})[load] = asdict(fitted)
        publish_json(self._file, {"schema": _SCHEMA, "cards": cards})

    def calibration(self, mode: str) -> tuple[float, int]:
        """Measured over estimated memory, the median of this GPU's runs in ``mode``, and how many; 1.0 for none."""
        runs = [f for load, f in self._read().items() if f" {mode}" in load and f.estimated and f.peak]
        return (statistics.median(f.peak / f.estimated for f in runs), len(runs)) if runs else (1.0, 0)

    def _read(self) -> Mapping[str, Fitted]:
        try:
            return {load: Fitted(**entry) for load, entry in self._read_gpus().get(self._card, {}).items()}
        except TypeError:
            return {}

    def _read_gpus(self) -> dict[str, dict[str, Any]]:
        """A file that is missing, damaged or of another schema tells nothing, and is written again."""
        if self._file is None or not self._file.is_file():
            return {}
        try:
            found = orjson.loads(self._file.read_bytes())
        except (orjson.JSONDecodeError, OSError):
            return {}
        is_ours = isinstance(found, dict) and found.get("schema") == _SCHEMA and isinstance(found.get("cards"), dict)
        return found["cards"] if is_ours else {}


class GpuFit:
    """What fitted this GPU, for one run: asked before it, told after it.

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

    def recall_halvings(self, batch_size: int) -> int:
        """Halvings to begin with, reported where there are any.

        Args:
            batch_size: Rows of a micro-batch.
        """
        if not self._spec.training.oom_recovery:
            return 0
        training = self._spec.training
        parts = self._count_parts(batch_size)
        found = self._memory.recall(self._load, parts, self._device.memory, most=HALVINGS)
        if found:
            chunks = min(parts, 2**found)
            what = f"{batch_size} {'packs' if training.packing else 'rows'}"
            message = f"micro-batches of {what} run in {chunks} chunks, which is what fitted this GPU before"
            self._emit(Notice(message=message, details={"chunks": chunks}))
        return found

    def _count_parts(self, batch_size: int) -> int:
        """Into how many parts a micro-batch can be cut: its rows; packed ones lie together, many to a pack."""
        return batch_size * (2**HALVINGS if self._spec.training.packing else 1)

    def remember(self, halvings: int, peak: int, batch_size: int, *, is_least: bool = True) -> None:
        """Write down how many rows fitted at once; on a GPU also what they took.

        Args:
            peak: Bytes in use at most.
            batch_size: Rows of a micro-batch.
            is_least: Whether the run took no more than it had to; else its peak says nothing about estimates.
        """
        on_gpu = self._device.kind == "cuda"
        if not on_gpu and not halvings:
            return
        training = self._spec.training
        rows = -(-batch_size // 2**halvings)
        is_whole = not training.packing or batch_size >= 2**halvings  # else less than a pack ran at once
        fitted = Fitted(
            rows=-(-self._count_parts(batch_size) // 2**halvings) if halvings else None,
            free=self._device.memory,
            peak=peak if on_gpu else 0,
            estimated=_estimate(self._spec, self._mode, rows) if on_gpu and is_whole and is_least else 0,
            at=datetime.now(UTC).isoformat(timespec="seconds"),
        )
        try:
            self._memory.remember(self._load, fitted)
        except (OSError, DiskFullError, OutputNotWritableError) as error:
            message = "what fitted this GPU could not be written down; the next run finds out again"
            self._emit(Notice(message=message, level="warning", details={"reason": first_line(error)}))


def _estimate(spec: TrainSpec, mode: str, rows: int) -> int:
    """Bytes in use as `bp_train_cuda.memory.estimate` has them for ``rows`` rows at once; 0 where it cannot say."""
    try:
        shapes = read_shapes(orjson.loads((spec.base / "config.json").read_bytes()))
    except ShapesUnknownError:
        return 0
    return estimate(shapes, read_load(spec, mode, rows)).in_use
