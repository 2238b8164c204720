"""What becomes of a row that is longer than ``max_seq_length``."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal, TypeAlias

from bp_data.errors import RowFault, RowFaultError
from bp_data.example import Rejected
from bp_data.ledger import Ledger
from bp_data.tokenrow import TokenRow

OnOverflow: TypeAlias = Literal["truncate", "drop", "split", "fail"]
"""truncate: cut at the end. drop, fail: leave the row out, or end the run. split: go on in further rows."""


def fit_row(
    row: TokenRow, longest: int, policy: OnOverflow, stops: frozenset[int], ledger: Ledger
) -> list[TokenRow] | Rejected:
    """The row cut to ``longest`` tokens as ``policy`` says, and entered in the ledger unless it is rejected.

    A cut chat ends with the last whole answer that fits, terminator included; only where none fits is an answer cut.
    A split one goes on in rows of ``longest`` tokens; those with nothing to learn are left out and counted as cut off.
    """
    if len(row.ids) <= longest:
        ledger.take_whole()
        return [row]
    if policy == "split":
        return _split(row, longest, ledger)
    try:
        cut = cut_row(row, longest, policy, stops)
    except RowFaultError as fault:
        return Rejected(row.number, fault.code, fault.reason)
    ledger.take_truncated(row.number, cut.cut)
    return [cut]


def cut_row(row: TokenRow, longest: int, policy: OnOverflow | None, stops: frozenset[int]) -> TokenRow:
    """The row, cut where it is longer than ``longest`` tokens.

    Raises:
        RowFaultError: ROW_OVERFLOW with ``drop`` and ``fail``; ROW_CUT_AWAY where nothing to learn would be left.
    """
    if len(row.ids) <= longest:
        return row
    if policy in ("drop", "fail"):
        raise RowFaultError(RowFault.OVERFLOW, f"it has {len(row.ids)} tokens, and max_seq_length is {longest}")
    length = _whole_answers(row, longest, stops)
    cut = replace(row, ids=row.ids[:length], mask=row.mask[:length], truncated=True, cut=len(row.ids) - length)
    if not cut.trained:
        reason = f"of {len(row.ids)} tokens the first {longest} hold nothing of an answer"
        raise RowFaultError(RowFault.CUT_AWAY, reason)
    return cut


def _whole_answers(row: TokenRow, longest: int, stops: frozenset[int]) -> int:
    """Tokens up to the last learnt terminator that fits; ``longest`` where none does."""
    if row.kind == "text":
        return longest
    for place in range(longest - 1, 0, -1):
        if row.mask[place] and row.ids[place] in stops:
            return place + 1
    return longest


def _split(row: TokenRow, longest: int, ledger: Ledger) -> list[TokenRow] | Rejected:
    pieces: list[TokenRow] = []
    for low in range(0, len(row.ids), longest):
        high = low + longest
        cut = high < len(row.ids)
        piece = TokenRow(
            row.number, row.ids[low:high], row.mask[low:high], row.kind, truncated=cut, continues=bool(pieces)
        )
        if piece.trained:
            pieces.append(piece)
    if not pieces:  # all that is learned stands first in a piece, where nothing predicts it
        reason = f"split every {longest} tokens, no piece has anything to learn"
        return Rejected(row.number, RowFault.CUT_AWAY, reason)
    lost = len(row.ids) - sum(len(piece.ids) for piece in pieces)
    if lost:
        pieces[0] = replace(pieces[0], cut=lost)
        ledger.take_truncated(row.number, lost)
    else:
        ledger.take_whole()
    ledger.pieces += len(pieces) - 1
    return pieces
