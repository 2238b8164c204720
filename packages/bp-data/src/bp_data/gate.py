"""The gate before the first step: what would train for hours and teach nothing is stopped here."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from bp_data.errors import DatasetGateError
from bp_data.ledger import Ledger
from bp_data.tokenrow import TokenRow
from bp_data.tokens import TokenizerFacts


def check_gate(
    rows: Iterable[TokenRow],
    facts: TokenizerFacts,
    ledger: Ledger,
    label_row: Callable[[TokenRow], Sequence[int]] = TokenRow.labels,
) -> None:
    """Raise unless every row has something to learn and the end of an answer is learnt.

    A rail that forms labels its own way passes that as ``label_row``, and it is held to the same.

    Args:
        rows: All rows that will be trained on.
        facts: Of the tokenizer.
        ledger: For the reasons, where no rows are left.
        label_row: A row's labels, one a token: its id where learnt, `bp_data.tokenrow.IGNORED` elsewhere.

    Raises:
        DatasetGateError: No rows; a row with nothing to learn; a learnt token that the labels leave out, as happens to
            the end token when labels are blanked by ``== pad``; an uncut chat whose end token is not learnt; no chat
            with a learnt end token at all; texts without an end token.
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
                f"none of the {self._chats} chats has its end token among the learnt tokens: "
                "the model would never stop",
                cause="every chat is longer than max_seq_length, and its end was cut off",
                fix="Allow longer examples: {set:model.max_seq_length=4096}; or shorten the chats.",
                setting="model.max_seq_length",
            )


def _check_row(row: TokenRow, facts: TokenizerFacts, *, ended: bool) -> None:
    if not row.trained:
        raise DatasetGateError(f"row {row.number} has no token to learn")
    if not row.truncated and not ended:
        what = "no end-of-text token" if facts.terminator_id is None else f"end token {facts.terminator_id} not learnt"
        raise DatasetGateError(
            f"row {row.number} has {what}: the model would never stop",
            fix="Use a model whose chat template ends a turn with a token, and whose tokenizer has an eos_token.",
        )


def _check_labels(row: TokenRow, labels: Sequence[int], facts: TokenizerFacts) -> None:
    for place, (token, learnt) in enumerate(zip(row.ids, row.mask, strict=True)):
        if learnt and labels[place] != token:
            cause = "labels must come from the mask; blanking every pad token unlearns the end token"
            raise DatasetGateError(
                f"row {row.number}: token {place} (id {token}) should be learnt, and its label is {labels[place]}",
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
