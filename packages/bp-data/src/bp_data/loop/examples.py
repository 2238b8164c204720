"""Prepared rows as batches of numbers: what the loop knows by index becomes padded rows, packs, or completions.

Nothing here needs a framework. A batch is flat arrays of the standard library, which every framework reads through the
buffer protocol without a copy: `torch.frombuffer`, `mlx.core.array(memoryview(...))`.
"""

from __future__ import annotations

from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import compress
from random import Random
from typing import Any, Literal, Protocol, TypeAlias

from bp_data import JudgedRow, PairRow, TokenRow, TokenRows, plan_packs
from bp_runs.methods import METHODS

Mismatch = tuple[int, int]
"""An example whose prompt is read, and the one whose completion follows it."""
_CACHED = 512
"""Rows that stay in memory, since a step counts them before it runs them."""
_FULL_ENOUGH = 0.95
"""Share of own tokens from which a padded batch, with its simpler attention, is as fast as a flat one."""

FlatRule: TypeAlias = Literal["never", "packs", "ragged"]
"""Which batches are one row without padding: none; those of packs; also those that padding would make much larger."""


@dataclass(frozen=True, slots=True)
class Batch:
    """Rows of tokens side by side, padded on the right.

    There is no attention mask: padding comes after a row's own tokens, which never look ahead, and its outputs carry no
    loss. Packed rows hold several examples, whose lengths say where each begins.
    """

    ids: array[int]
    """(rows * width,) token ids, int32, row by row."""
    width: int
    """Tokens of a row, padding included."""
    positions: array[int]
    """(N,) flat places, row * width + column, of the tokens that predict a trained token; int32."""
    targets: array[int]
    """(N,) the trained tokens that they predict; int32."""
    lengths: tuple[tuple[int, ...], ...]
    """Tokens of each example of each row; one a row without packing."""
    is_flat: bool = False
    """Whether all examples are laid end to end in one row, without padding, and the model must keep them apart."""

    @property
    def rows(self) -> int:
        """How many rows there are."""
        return len(self.lengths)

    @property
    def is_packed(self) -> bool:
        """Whether a row holds more than one example."""
        return any(len(lengths) > 1 for lengths in self.lengths)


class Examples(Protocol):
    """The examples of a method. Indexes are what the loop orders and counts."""

    count: int
    """What an epoch visits: packs with packing, else rows."""

    def expand(self, indexes: Sequence[int]) -> Sequence[int]:
        """Rows of these packs; the indexes themselves without packing."""
        ...

    def lengths(self) -> Sequence[int]:
        """Tokens of each of ``count``; of completions the longest."""
        ...

    def weigh(self, index: int) -> int:
        """What a row counts in the mean loss."""
        ...

    def tokens(self, index: int) -> int:
        """Tokens of a row, over all its completions."""
        ...

    def trained(self, index: int) -> int:
        """Tokens that are trained on."""
        ...

    def collate(self, indexes: Sequence[int]) -> Batch:
        """The rows of these examples, or their completions one after the other."""
        ...


class RowExamples:
    """Rows of supervised fine-tuning, padded or packed.

    Args:
        rows: Prepared rows.
        pad_id: The token that fills rows up.
        room: Tokens of a pack; None: not packed.
        flat: Which batches are one row without padding.
    """

    def __init__(
        self, rows: Sequence[TokenRow], pad_id: int, room: int | None = None, *, flat: FlatRule = "never"
    ) -> None:
        self.flat = flat
        self._rows = rows
        self._pad_id = pad_id
        self._room = room
        self._lengths = list(rows.lengths()) if isinstance(rows, TokenRows) else [len(row.ids) for row in rows]
        self.packs = None if room is None else plan_packs(self._lengths, room)
        self.count = len(rows) if self.packs is None else len(self.packs)
        self._row = lru_cache(maxsize=_CACHED)(rows.__getitem__)

    def expand(self, indexes: Sequence[int]) -> Sequence[int]:
        """As `Examples.expand`."""
        return indexes if self.packs is None else [row for pack in indexes for row in self.packs[pack]]

    def lengths(self) -> Sequence[int]:
        """As `Examples.lengths`."""
        if self.packs is None:
            return self._lengths
        return [sum(self._lengths[row] for row in rows) for rows in self.packs]

    def weigh(self, index: int) -> int:
        """Trained tokens."""
        return self._row(index).trained

    trained = weigh

    def tokens(self, index: int) -> int:
        """Tokens of the row."""
        return self._lengths[index]

    def collate(self, indexes: Sequence[int]) -> Batch:
        """Rows, or one flat row; with packing as few rows as hold them, each of at most ``room`` tokens.

        A chunk may hold a part of a pack, or of several, so its rows are packed again.
        """
        rows = [self._row(index) for index in indexes]
        if self._lays_flat(rows):
            return replace(pad_rows([rows], self._pad_id), is_flat=True)
        if self._room is None:
            return pad_rows([(row,) for row in rows], self._pad_id)
        packs = plan_packs([len(row.ids) for row in rows], self._room)
        return pad_rows([[rows[place] for place in sorted(pack)] for pack in packs], self._pad_id)

    def _lays_flat(self, rows: Sequence[TokenRow]) -> bool:
        if self._room is not None:
            return self.flat != "never"
        lengths = [len(row.ids) for row in rows]
        return self.flat == "ragged" and sum(lengths) < _FULL_ENOUGH * len(lengths) * max(lengths)


class _CompletionExamples:
    """What pairs and judged completions share: every example counts the same, however its step is cut."""

    count: int
    width: int
    """Completions of an example."""
    reference: Mapping[int, Sequence[float]] | None
    """Log-probabilities of each example's completions before training, in nats; None: the method needs none."""

    def expand(self, indexes: Sequence[int]) -> Sequence[int]:
        """The indexes themselves."""
        return indexes

    def weigh(self, index: int) -> int:  # noqa: ARG002
        """One."""
        return 1

    def references(self, indexes: Sequence[int]) -> list[Sequence[float]] | None:
        """(B, A) of `reference`."""
        return None if self.reference is None else [self.reference[index] for index in indexes]

    def labels(self, indexes: Sequence[int]) -> list[bool] | None:  # noqa: ARG002
        """(B,) whether completions are good; None where the method does not say."""
        return None


class PairExamples(_CompletionExamples):
    """A chosen and a rejected completion of each prompt: dpo, orpo, simpo."""

    width = 2

    def __init__(self, rows: Sequence[PairRow], pad_id: int) -> None:
        self.count = len(rows)
        self.reference = None
        self._pad_id = pad_id
        self._rows = rows
        self._row = lru_cache(maxsize=_CACHED)(rows.__getitem__)

    def lengths(self) -> Sequence[int]:
        """Tokens of each example's longer completion, its prompt included."""
        return [max(len(row.chosen.ids), len(row.rejected.ids)) for row in self._rows]

    def tokens(self, index: int) -> int:
        """Tokens of both completions, each with its prompt."""
        return sum(len(one.ids) for one in self.completions(index))

    def trained(self, index: int) -> int:
        """Trained tokens of both completions."""
        return sum(one.trained for one in self.completions(index))

    def completions(self, index: int) -> Sequence[TokenRow]:
        """The chosen one first."""
        row = self._row(index)
        return row.chosen, row.rejected

    def collate(self, indexes: Sequence[int]) -> Batch:
        """Each example's completions next to each other: 2 * B rows."""
        return pad_rows([(one,) for index in indexes for one in self.completions(index)], self._pad_id)


class JudgedExamples(_CompletionExamples):
    """One completion of each prompt, labeled good or bad: kto."""

    width = 1

    def __init__(self, rows: Sequence[JudgedRow], pad_id: int, *, room: int, seed: int) -> None:
        self.count = len(rows)
        self.reference = None
        self.mismatched_reference: Mapping[Mismatch, float] = {}
        """Log-probabilities before training of the completions in `mismatched`, in nats."""
        self._pad_id = pad_id
        self._room = room
        self._rows = rows
        self._row = lru_cache(maxsize=_CACHED)(rows.__getitem__)
        self._offset = Random(seed).randrange(1, max(2, self.count))  # noqa: S311  # must repeat

    def lengths(self) -> Sequence[int]:
        """Tokens of each example."""
        return [len(row.row.ids) for row in self._rows]

    def tokens(self, index: int) -> int:
        """Tokens of prompt and completion."""
        return len(self._row(index).row.ids)

    def trained(self, index: int) -> int:
        """Trained tokens."""
        return self._row(index).row.trained

    def labels(self, indexes: Sequence[int]) -> list[bool]:
        """(B,) whether completions are good."""
        return [self._row(index).label for index in indexes]

    def collate(self, indexes: Sequence[int]) -> Batch:
        """B rows."""
        return pad_rows([(self._row(index).row,) for index in indexes], self._pad_id)

    def mismatched(self, indexes: Sequence[int]) -> list[Mismatch]:
        """Each example's prompt with the completion of the one before it, in a circle, for the reference point.

        KTO's authors take the completions from the same batch, so that every completion has the same support. An
        example alone gets a completion of another one of the data set.
        """
        if len(indexes) == 1:
            return [(indexes[0], (indexes[0] + self._offset) % self.count)]
        return list(zip(indexes, [indexes[-1], *indexes[:-1]], strict=True))

    def collate_mismatched(self, pairs: Sequence[Mismatch]) -> Batch:
        """Prompts with others' completions, as `mismatched` says: B rows."""
        rows = [join_prompt(self._row(a).row, self._row(b).row, self._room) for a, b in pairs]
        return pad_rows([(row,) for row in rows], self._pad_id)


CompletionExamples: TypeAlias = PairExamples | JudgedExamples
AnyExamples: TypeAlias = RowExamples | CompletionExamples


def join_prompt(prompt: TokenRow, answer: TokenRow, longest: int) -> TokenRow:
    """The prompt of one row with the completion of another, cut at ``longest`` tokens."""
    split, start = prompt.mask.find(1), answer.mask.find(1)
    ids = array("i", [*prompt.ids[:split], *answer.ids[start:]][:longest])
    return TokenRow(prompt.number, ids, (bytes(split) + answer.mask[start:])[:longest])


def pad_rows(packs: Sequence[Sequence[TokenRow]], pad_id: int) -> Batch:
    """A batch of one row for each pack, as wide as the longest.

    Labels come from the mask, never from a comparison with the pad token, which may be the end of a turn. The first
    token of an example is never predicted: what stands before it is another example, or nothing.

    Args:
        packs: The examples of each row, one or several.
        pad_id: Fills rows up.
    """
    lengths = tuple(tuple(len(row.ids) for row in pack) for pack in packs)
    width = max(map(sum, lengths))
    ids, positions, targets = array("i"), array("i"), array("i")
    for pack in packs:
        start = len(ids)
        end = start + width
        for row in pack:
            first = len(ids)
            positions.extend(compress(range(first, first + len(row.ids) - 1), row.mask[1:]))
            targets.extend(compress(row.ids[1:], row.mask[1:]))
            ids.extend(row.ids)
        ids.extend([pad_id] * (end - len(ids)))
    return Batch(ids, width, positions, targets, lengths)


def find_longest(lengths: Sequence[int], count: int) -> list[int]:
    """Indexes of the ``count`` longest, the longest first; fewer if there are not as many."""
    return sorted(range(len(lengths)), key=lambda place: -lengths[place])[:count]


def build_examples(
    method: str, rows: Any, pad_id: int, *, room: int, packing: bool = False, seed: int = 0, flat: FlatRule = "never"
) -> AnyExamples:
    """The examples of a method over prepared rows.

    Args:
        room: Longest row, in tokens; also of a pack.
        flat: As for `RowExamples`.
    """
    match METHODS[method].learns_from:
        case "rows":
            return RowExamples(rows, pad_id, room if packing else None, flat=flat)
        case "pairs":
            return PairExamples(rows, pad_id)
        case "judged":
            return JudgedExamples(rows, pad_id, room=room, seed=seed)
