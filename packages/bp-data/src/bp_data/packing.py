"""How rows fit ``max_seq_length``: long ones are cut or split, and short ones share a pack.

Packing is best fit decreasing (Johnson, 1974; for language models: Ding et al., arXiv:2404.10830): the rows from the
longest to the shortest, each into the fullest pack that still has room. Tokens are never cut, moved between rows or
lost. Inside a pack each row keeps its own positions from 0, and attention must not reach from one to another;
`PackedRow.lengths` and `block_mask` say where each begins. This module knows no framework.
"""

from __future__ import annotations

from array import array
from bisect import bisect_left, insort
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal, TypeAlias

from bp_data.errors import RowFault, RowFaultError
from bp_data.example import Rejected
from bp_data.ledger import Ledger
from bp_data.token_rows import IGNORED, TokenRow
from bp_runs.errors import ContractError

OnOverflow: TypeAlias = Literal["truncate", "drop", "split", "fail"]
"""truncate: cut at the end. drop, fail: leave the row out, or end the run. split: continue in further rows."""


def fit_rows(
    rows: Sequence[TokenRow], longest: int, policy: OnOverflow, stops: frozenset[int], ledger: Ledger
) -> list[TokenRow] | Rejected:
    """The rows that one row of the data became, each cut to ``longest`` tokens as ``policy`` says.

    They are entered in the ledger as one, unless they are rejected. A cut chat ends with the last whole answer that
    fits, terminator included; only if none fits is an answer cut. A split one continues in rows of ``longest`` tokens.
    Rows with nothing to learn are left out and counted as cut off.
    """
    fitted: list[TokenRow] = []
    lost, fault = 0, None
    for row in rows:
        try:
            fitted += _split(row, longest) if policy == "split" else [cut_row(row, longest, policy, stops)]
        except RowFaultError as error:
            fault, lost = error, lost + len(row.ids)
    if fault and (not fitted or policy in ("drop", "fail")):
        return Rejected(rows[0].number, fault.code, fault.reason)
    fitted = [replace(row, continues=True) if place else row for place, row in enumerate(fitted)]
    if lost:
        fitted[0] = replace(fitted[0], cut=fitted[0].cut + lost)
    if cut := sum(row.cut for row in fitted):
        ledger.take_truncated(rows[0].number, cut)
    else:
        ledger.take_whole()
    ledger.pieces += len(fitted) - 1
    return fitted


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
    """Tokens up to the last learned terminator that fits; ``longest`` where none does."""
    if row.kind == "text":
        return longest
    for place in range(longest - 1, 0, -1):
        if row.mask[place] and row.ids[place] in stops:
            return place + 1
    return longest


def _split(row: TokenRow, longest: int) -> list[TokenRow]:
    """The row in pieces of ``longest`` tokens, those with nothing to learn left out."""
    if len(row.ids) <= longest:
        return [row]
    pieces = []
    for low in range(0, len(row.ids), longest):
        cut = low + longest < len(row.ids)
        piece = TokenRow(row.number, row.ids[low : low + longest], row.mask[low : low + longest], row.kind, cut)
        if piece.trained:
            pieces.append(piece)
    if not pieces:  # all that is trained on stands first in a piece, where nothing predicts it
        raise RowFaultError(RowFault.CUT_AWAY, f"split every {longest} tokens, no piece has anything to learn")
    lost = len(row.ids) - sum(len(piece.ids) for piece in pieces)
    return [replace(pieces[0], cut=lost), *pieces[1:]]


@dataclass(frozen=True, slots=True)
class PackedRow:
    """Rows one after the other in one.

    Attributes:
        numbers: The rows' numbers, in the order in which they stand here.
        ids: Token ids, int32, of all rows.
        mask: One byte a token: 1 where it is learned. The first token of each row is 0: what is before it belongs to
            another row and does not predict it.
        lengths: Tokens of each row; together as many as ``ids``.
    """

    numbers: tuple[int, ...]
    ids: array[int]
    mask: bytes
    lengths: tuple[int, ...]

    @property
    def trained(self) -> int:
        """Tokens that count in the loss."""
        return self.mask.count(1)

    @property
    def position_ids(self) -> array[int]:
        """Positions that begin again at 0 with each row, int32."""
        return array("i", (place for length in self.lengths for place in range(length)))

    @property
    def borders(self) -> tuple[int, ...]:
        """Where rows begin, and the end: cumulative lengths from 0, as variable-length attention wants them."""
        found = [0]
        for length in self.lengths:
            found.append(found[-1] + length)
        return tuple(found)

    def labels(self) -> list[int]:
        """Ids where learned, `IGNORED` elsewhere; the first token of each row is never learned."""
        return [token if learnt else IGNORED for token, learnt in zip(self.ids, self.mask, strict=True)]

    def block_mask(self) -> list[list[bool]]:
        """Which token (row) may look at which (column): those before it, and itself, in its own row. (T, T)."""
        owner = [place for place, length in enumerate(self.lengths) for _ in range(length)]
        return [[seen <= at and owner[seen] == owner[at] for seen in range(len(owner))] for at in range(len(owner))]


def plan_packs(lengths: Sequence[int], room: int) -> list[list[int]]:
    """Which rows go together: lists of places in ``lengths``, each with at most ``room`` tokens in all.

    The same lengths give the same packs. Packs are in the order of the first row in each; so do the rows in a pack.

    Raises:
        ContractError: A row is longer than ``room`` or empty.
    """
    packs: list[list[int]] = []
    open_packs: list[tuple[int, int]] = []  # (tokens left, pack), sorted
    for place in sorted(range(len(lengths)), key=lambda at: (-lengths[at], at)):
        need = lengths[place]
        if not 0 < need <= room:
            raise ContractError(f"row {place} has {need} tokens; a pack holds 1 to {room}")
        fit = bisect_left(open_packs, (need, -1))
        if fit < len(open_packs):
            left, pack = open_packs.pop(fit)
        else:
            left, pack = room, len(packs)
            packs.append([])
        packs[pack].append(place)
        if left > need:
            insort(open_packs, (left - need, pack))
    return sorted(sorted(pack) for pack in packs)


def pack_rows(rows: Sequence[TokenRow], room: int) -> list[PackedRow]:
    """All rows in as few packs as best fit finds; every token once.

    Raises:
        ContractError: As `plan_packs`.
    """
    return list(iter_packs(rows, plan_packs([len(row.ids) for row in rows], room)))


def iter_packs(rows: Sequence[TokenRow], plan: Sequence[Sequence[int]]) -> Iterator[PackedRow]:
    """The packs of a plan one by one; memory holds one."""
    return (build_pack([rows[place] for place in places]) for places in plan)


def build_pack(rows: Sequence[TokenRow]) -> PackedRow:
    """These rows in one."""
    ids = array("i")
    mask = bytearray()
    for row in rows:
        ids.extend(row.ids)
        mask += b"\x00" + row.mask[1:]
    return PackedRow(tuple(row.number for row in rows), ids, bytes(mask), tuple(len(row.ids) for row in rows))
