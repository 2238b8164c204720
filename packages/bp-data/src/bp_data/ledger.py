"""What became of every row, and the checks before the first step.

The row ledger counts each row that was read as whole, truncated or dropped, and proves the sum. The gate stops data
that would train for hours and teach nothing.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import orjson

from bp_data.errors import DatasetGateError
from bp_data.example import Rejected
from bp_data.token_rows import TokenRow
from bp_data.tokens import TokenizerFacts
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
        unsampled: Good-looking rows of the file that were never taken up, since fewer samples were requested.
        pieces: Further rows that long ones were split into, next to the first of each.
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


def check_gate(
    rows: Iterable[TokenRow],
    facts: TokenizerFacts,
    ledger: Ledger,
    label_row: Callable[[TokenRow], Sequence[int]] = TokenRow.labels,
) -> None:
    """Raise unless every row has something to learn and the end of an answer is trained on.

    A rail that forms labels its own way passes that as ``label_row``, and it is held to the same.

    Args:
        rows: All rows that will be trained on.
        facts: Of the tokenizer.
        ledger: For the reasons, where no rows are left.
        label_row: A row's labels, one a token: its id where trained on, `bp_data.token_rows.IGNORED` elsewhere.

    Raises:
        DatasetGateError: No rows; a row with nothing to learn; a trained token that the labels leave out, as happens to
            the end token when labels are blanked by ``== pad``; an uncut chat whose end token is not trained on; no
            chat with a trained end token at all; texts without an end token.
    """
    gate = Gate(facts, label_row)
    for row in rows:
        gate.take(row)
    gate.close(ledger)


class Gate:
    """`check_gate` for rows that pass one by one."""

    def __init__(self, facts: TokenizerFacts, label_row: Callable[[TokenRow], Sequence[int]] = TokenRow.labels) -> None:
        self._facts = facts
        self._label_row = label_row
        self._count = self._chats = self._ended = 0

    def take(self, row: TokenRow) -> None:
        """Check one row.

        Raises:
            DatasetGateError: As `check_gate`, for a single row.
        """
        self._count += 1
        ended = _ends(row, self._facts)
        _check_row(row, self._facts, ended=ended)
        if self._label_row is not TokenRow.labels:
            _check_labels(row, self._label_row(row), self._facts)
        if row.kind == "chat":
            self._chats += 1
            self._ended += ended

    def close(self, ledger: Ledger) -> None:
        """Check all rows together.

        Raises:
            DatasetGateError: As `check_gate`, for the rows as a whole.
        """
        if not self._count:
            raise DatasetGateError("no row is left to train on", cause=_reasons(ledger), details=ledger.to_dict())
        if self._chats and not self._ended:
            raise DatasetGateError(
                f"none of the {self._chats} chats has its end token among the trained tokens: "
                "the model would never stop",
                cause="every chat is longer than max_seq_length, and its end was cut off",
                fix="Allow longer examples: {set:model.max_seq_length=4096}; or shorten the chats.",
                setting="model.max_seq_length",
            )


def _check_row(row: TokenRow, facts: TokenizerFacts, *, ended: bool) -> None:
    if not row.trained:
        raise DatasetGateError(f"row {row.number} has no token to learn")
    if not row.truncated and not ended:
        what = (
            "no end-of-text token"
            if facts.terminator_id is None
            else f"end token {facts.terminator_id} is not trained on"
        )
        raise DatasetGateError(
            f"row {row.number} has {what}: the model would never stop",
            fix="Use a model whose chat template ends a turn with a token, and whose tokenizer has an eos_token.",
        )


def _check_labels(row: TokenRow, labels: Sequence[int], facts: TokenizerFacts) -> None:
    for place, (token, learnt) in enumerate(zip(row.ids, row.mask, strict=True)):
        if learnt and labels[place] != token:
            cause = "labels must come from the mask; blanking every pad token unlearns the end token"
            raise DatasetGateError(
                f"row {row.number}: token {place} (id {token}) should be trained on, and its label is {labels[place]}",
                cause=cause if token == facts.pad_id else None,
            )


def _ends(row: TokenRow, facts: TokenizerFacts) -> bool:
    for stop in facts.stop_ids:
        place = -1
        for _ in range(row.ids.count(stop)):
            place = row.ids.index(stop, place + 1)
            if row.mask[place]:
                return True
    return False


def _reasons(ledger: Ledger) -> str:
    counts = {code: len(rows) for code, rows in ledger.dropped_by_code.items()}
    told = ", ".join(f"{count} × {code}" for code, count in sorted(counts.items()))
    return f"{ledger.read} read, {ledger.dropped} dropped: {told}" if told else f"{ledger.read} read"
