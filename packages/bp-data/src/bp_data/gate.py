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
    count = chats = ended = 0
    for row in rows:
        count += 1
        _check_row(row, label_row(row), facts)
        if row.kind == "chat":
            chats += 1
            ended += _ends(row, facts)
    if not count:
        raise DatasetGateError("no row is left to train on", cause=_reasons(ledger), details=ledger.to_dict())
    if chats and not ended:
        raise DatasetGateError(
            f"none of the {chats} chats has its end token among the learnt tokens: the model would never stop",
            cause="every chat is longer than max_seq_length, and its end was cut off",
            way_out="Allow longer rows (--max-seq-length), or shorten the chats.",
        )


def _check_row(row: TokenRow, labels: Sequence[int], facts: TokenizerFacts) -> None:
    if not row.trained:
        raise DatasetGateError(f"row {row.number} has no token to learn")
    for place, (token, learnt) in enumerate(zip(row.ids, row.mask, strict=True)):
        if learnt and labels[place] != token:
            cause = "labels must come from the mask; blanking every pad token unlearns the end token"
            raise DatasetGateError(
                f"row {row.number}: token {place} (id {token}) should be learnt, and its label is {labels[place]}",
                cause=cause if token == facts.pad_id else None,
            )
    if not row.truncated and not _ends(row, facts):
        what = "no end-of-text token" if facts.terminator_id is None else f"end token {facts.terminator_id} not learnt"
        raise DatasetGateError(
            f"row {row.number} has {what}: the model would never stop",
            way_out="Use a model whose chat template ends a turn with a token, and whose tokenizer has an eos_token.",
        )


def _ends(row: TokenRow, facts: TokenizerFacts) -> bool:
    stops = set(facts.stop_ids)
    return any(learnt and token in stops for token, learnt in zip(row.ids, row.mask, strict=True))


def _reasons(ledger: Ledger) -> str:
    counts = {code: len(rows) for code, rows in ledger.dropped_by_code.items()}
    told = ", ".join(f"{count} × {code}" for code, count in sorted(counts.items()))
    return f"{ledger.read} read, {ledger.dropped} dropped: {told}" if told else f"{ledger.read} read"
