"""What fitted a card, and how far estimates were off there: remembered from run to run in one small file.

    {"schema": "backpropagate.fitted/1", "cards": {card: {what: {"rows", "free", "peak", "estimated", "at"}}}}

Two runs that end at the same moment may lose one of two entries, which costs no more than one halving anew.
"""

from __future__ import annotations

import hashlib
import statistics
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import orjson

from bp_runs.files import publish_json
from bp_runs.spec import TrainSpec

FITTED_FILE = "fitted.json"
_SCHEMA = "backpropagate.fitted/1"
_MORE_ROOM = 1.05  # a card with so much more free than then may hold what did not fit


@dataclass(frozen=True, slots=True, kw_only=True)
class Fitted:
    """What one training took of a card."""

    rows: int | None
    """The most that ran at once where more did not fit, eighths of packs with packing; None: all that were asked for
    fitted."""
    free: int
    """Bytes free on the card when the run began."""
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
        card: The card's name and size; None: the only one in the file, if there is but one.
    """

    def __init__(self, folder: Path | None, card: str | None = None) -> None:
        self._file = None if folder is None else folder / FITTED_FILE
        known = [name for name in self._read_cards() if name != "cpu"] if card is None else [card]
        self._card = known[0] if len(known) == 1 else ""

    def recall(self, load: str, batch_size: int, free: int, *, most: int) -> int:
        """Halvings to begin with, at most ``most``: 0 where nothing is known, or the card has more room than then.

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
        cards = self._read_cards()
        cards.setdefault(self._card, {})[load] = asdict(fitted)
        publish_json(self._file, {"schema": _SCHEMA, "cards": cards})

    def calibration(self, mode: str) -> tuple[float, int]:
        """Measured over estimated memory, the median of this card's runs in ``mode``, and how many; 1.0 for none."""
        runs = [f for load, f in self._read().items() if f" {mode}" in load and f.estimated and f.peak]
        return (statistics.median(f.peak / f.estimated for f in runs), len(runs)) if runs else (1.0, 0)

    def _read(self) -> Mapping[str, Fitted]:
        try:
            return {load: Fitted(**entry) for load, entry in self._read_cards().get(self._card, {}).items()}
        except TypeError:
            return {}

    def _read_cards(self) -> dict[str, dict[str, Any]]:
        """A file that is missing, damaged or of another schema tells nothing, and is written anew."""
        if self._file is None or not self._file.is_file():
            return {}
        try:
            found = orjson.loads(self._file.read_bytes())
        except (orjson.JSONDecodeError, OSError):
            return {}
        is_ours = isinstance(found, dict) and found.get("schema") == _SCHEMA and isinstance(found.get("cards"), dict)
        return found["cards"] if is_ours else {}
