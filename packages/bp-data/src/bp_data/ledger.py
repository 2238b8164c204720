"""The row ledger: every row that was read is whole, truncated or dropped, and the sum is checked."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import orjson

from bp_data.example import Rejected
from bp_runs.errors import ContractError
from bp_runs.files import publish_bytes
from bp_runs.redact import redact


@dataclass(slots=True)
class Ledger:
    """Counts of rows; ``read = whole + truncated + dropped`` always holds.

    Whole and truncated rows are ready to train on, the latter without their end; the three counts are disjoint. Which
    of them the steps get to is counted by `bp_data.loop.plan.count_rows`.

    Attributes:
        read: Rows taken up, good or bad.
        whole: Rows ready to train on whole.
        truncated: Rows ready to train on up to ``max_seq_length``.
        truncated_tokens: Tokens cut off, over all truncated rows.
        truncated_rows: Numbers of the truncated rows.
        drops: Rows that cannot be trained on, with their reasons, in file order.
        unsampled: Good-looking rows of the file that were never taken up, since fewer samples were asked for.
        pieces: Further rows that long ones were split into, beside the first of each.
    """

    read: int = 0
    whole: int = 0
    truncated: int = 0
    truncated_tokens: int = 0
    truncated_rows: list[int] = field(default_factory=list)
    drops: list[Rejected] = field(default_factory=list)
    unsampled: int = 0
    pieces: int = 0

    @property
    def dropped(self) -> int:
        """Rows that cannot be trained on."""
        return len(self.drops)

    @property
    def dropped_by_code(self) -> dict[str, list[int]]:
        """Row numbers of the dropped rows, for each code."""
        found: dict[str, list[int]] = {}
        for drop in self.drops:
            found.setdefault(drop.code.value, []).append(drop.number)
        return found

    def take_whole(self) -> None:
        """Count a row that is ready whole."""
        self.read += 1
        self.whole += 1

    def take_truncated(self, number: int, tokens: int) -> None:
        """Count a row that is ready without its last ``tokens`` tokens."""
        self.read += 1
        self.truncated += 1
        self.truncated_tokens += tokens
        self.truncated_rows.append(number)

    def take_dropped(self, rejected: Rejected) -> None:
        """Count a row that cannot be trained on."""
        self.read += 1
        self.drops.append(rejected)

    def check(self) -> None:
        """Prove that no row vanished.

        Raises:
            ContractError: The counts do not add up.
        """
        if self.read != self.whole + self.truncated + self.dropped or self.truncated != len(self.truncated_rows):
            raise ContractError(
                f"row ledger: {self.read} read, but {self.whole} whole + {self.truncated} truncated "
                f"+ {self.dropped} dropped"
            )

    def to_dict(self) -> dict[str, Any]:
        """The counts, JSON-ready; single drops are in ``rejected.jsonl``; ``pieces`` only where rows were split."""
        return {
            "read": self.read,
            "whole": self.whole,
            "truncated": self.truncated,
            "truncated_tokens": self.truncated_tokens,
            "dropped": self.dropped,
            "dropped_by_code": dict(sorted(Counter(drop.code.value for drop in self.drops).items())),
            "unsampled": self.unsampled,
            **({"pieces": self.pieces} if self.pieces else {}),
        }

    def write_rejected(self, path: Path) -> None:
        """Write one line ``{"file", "row", "code", "reason", "excerpt"}`` a dropped row; an empty file where none was.

        Raises:
            DiskFullError, OutputNotWritableError: As `bp_runs.files.publish_bytes`.
        """
        lines = [
            orjson.dumps(
                {
                    "file": drop.source,
                    "row": drop.number,
                    "code": drop.code.value,
                    "reason": redact(drop.reason),
                    "excerpt": redact(drop.excerpt),
                },
                option=orjson.OPT_APPEND_NEWLINE,
            )
            for drop in self.drops
        ]
        publish_bytes(path, b"".join(lines))
