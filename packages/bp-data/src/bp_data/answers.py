"""Rows for the methods that compare answers, kept on disk like all token rows."""

from __future__ import annotations

from abc import abstractmethod
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Generic, Self, TypeVar, overload

from bp_data.store import TokenRows
from bp_data.tokenrow import TokenRow


@dataclass(frozen=True, slots=True)
class PairRow:
    """One prompt with a better and a worse answer; both rows hold the prompt, and only the answers are learnt.

    Attributes:
        number: As in `Row`.
        chosen: Prompt and better answer.
        rejected: Prompt and worse answer.
    """

    number: int
    chosen: TokenRow
    rejected: TokenRow

    @property
    def prompt(self) -> int:
        """Tokens with which both rows begin and of which none is learnt."""
        return min(self.chosen.mask.find(1), self.rejected.mask.find(1))


@dataclass(frozen=True, slots=True)
class JudgedRow:
    """A prompt with an answer that is good or bad.

    Attributes:
        number: As in `Row`.
        row: Prompt and answer; only the answer is learnt.
        label: True for a good answer.
    """

    number: int
    row: TokenRow
    label: bool


T = TypeVar("T", PairRow, JudgedRow)


class AnswerRows(Sequence[T], Generic[T]):
    """Compared or judged answers of a store; each is read when it is asked for."""

    def __init__(self, rows: TokenRows, order: Sequence[int]) -> None:
        self._rows, self._order = rows, order

    @abstractmethod
    def _read(self, place: int) -> T: ...

    @abstractmethod
    def _length(self, lengths: Sequence[int], place: int) -> int: ...

    @abstractmethod
    def _view(self, order: Sequence[int]) -> Self: ...

    def __len__(self) -> int:
        return len(self._order)

    @overload
    def __getitem__(self, place: int) -> T: ...
    @overload
    def __getitem__(self, place: slice) -> list[T]: ...
    def __getitem__(self, place: int | slice) -> T | list[T]:
        if isinstance(place, slice):
            return [self._read(at) for at in self._order[place]]
        if not -len(self) <= place < len(self):
            raise IndexError(f"row {place} of {len(self)}")
        return self._read(self._order[place])

    def __iter__(self) -> Iterator[T]:
        return map(self._read, self._order)

    def lengths(self) -> array[int]:
        """Tokens of each row, of both answers together where there are two; the tokens are not read."""
        lengths = self._rows.lengths()
        return array("q", (self._length(lengths, at) for at in self._order))

    def origins(self) -> array[int]:
        """As `TokenRows.origins`: here each row is one that was read."""
        return array("q", self._order)

    def cut_flags(self) -> bytes:
        """1 for each row of which tokens were cut off, from one of its answers or both; else 0."""
        flags = self._rows.cut_flags()
        return bytes(self._length(flags, at) > 0 for at in self._order)

    def pick(self, places: Iterable[int]) -> Self:
        """A view of some rows in another order; nothing is copied."""
        return self._view(array("q", (self._order[place] for place in places)))


class PairRows(AnswerRows[PairRow]):
    """Pairs, stored as two token rows after one another: chosen, rejected.

    Args:
        rows: The token rows.
        order: Places of the pairs; None: all as they stand.
    """

    def __init__(self, rows: TokenRows, order: Sequence[int] | None = None) -> None:
        super().__init__(rows, range(len(rows) // 2) if order is None else order)

    def _read(self, place: int) -> PairRow:
        chosen, rejected = self._rows[2 * place], self._rows[2 * place + 1]
        return PairRow(chosen.number, chosen, rejected)

    def _length(self, lengths: Sequence[int], place: int) -> int:
        return lengths[2 * place] + lengths[2 * place + 1]

    def _view(self, order: Sequence[int]) -> PairRows:
        return PairRows(self._rows, order)


class JudgedRows(AnswerRows[JudgedRow]):
    """Judged answers, one token row each.

    Args:
        rows: The token rows.
        labels: A byte for each of them, 1 for a good answer.
        order: Places of the rows; None: all as they stand.
    """

    def __init__(self, rows: TokenRows, labels: bytes, order: Sequence[int] | None = None) -> None:
        super().__init__(rows, range(len(rows)) if order is None else order)
        self._labels = labels

    def labels(self) -> list[bool]:
        """Whether each answer is good; the tokens are not read."""
        return [self._labels[place] == 1 for place in self._order]

    def _read(self, place: int) -> JudgedRow:
        row = self._rows[place]
        return JudgedRow(row.number, row, self._labels[place] == 1)

    def _length(self, lengths: Sequence[int], place: int) -> int:
        return lengths[place]

    def _view(self, order: Sequence[int]) -> JudgedRows:
        return JudgedRows(self._rows, self._labels, order)
