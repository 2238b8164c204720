"""Rows of tokens: each alone, in pairs or judged; kept on disk, so that memory holds none but the one in use.

A store is two files: an index with one record of 24 bytes a row, and the rows' token ids (int32) and masks (one byte a
token), one row after the other.
"""

from __future__ import annotations

import random
import struct
import tempfile
import threading
import weakref
from abc import abstractmethod
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import IO, Any, Final, Generic, Literal, Self, TypeVar, overload

from bp_runs.errors import ContractError
from bp_runs.files import coded_disk_errors

IGNORED: Final = -100
"""The label of a token that does not count in the loss; what PyTorch's cross-entropy ignores by default."""


@dataclass(frozen=True, slots=True)
class TokenRow:
    """A row of tokens, no longer than ``max_seq_length``.

    Attributes:
        number: As in `bp_data.example.Row`.
        ids: Token ids, int32, one a token.
        mask: One byte a token: 1 where it is learnt, 0 where it is only read.
        kind: ``chat`` (assistant's turns are learnt) or ``text`` (everything is).
        truncated: Whether its end was cut off.
        cut: Tokens that were cut off; known while rows are made, 0 in rows that are read back from a store.
        source: As in `bp_data.example.Row`, while rows are made; rows that are read back from a store have none.
        continues: Whether it is a further piece of the row before it, which was split; known while rows are made.
    """

    number: int
    ids: array[int]
    mask: bytes
    kind: Literal["chat", "text"] = "chat"
    truncated: bool = False
    cut: int = field(default=0, compare=False)
    source: str = field(default="", compare=False)
    continues: bool = field(default=False, compare=False)

    @property
    def trained(self) -> int:
        """Tokens that count in the loss; the first token of a row is never predicted, so it is not one of them."""
        return self.mask.count(1, 1)

    def labels(self) -> list[int]:
        """Ids where learnt, `IGNORED` elsewhere.

        Labels come from the mask and from nothing else; comparing ids with the pad token would unlearn the end of a
        turn wherever pad and end token are the same.
        """
        return [token if learnt else IGNORED for token, learnt in zip(self.ids, self.mask, strict=True)]


_RECORD: Final = struct.Struct("=qqiB3x")  # number, place in bytes, tokens, flags
_TRUNCATED, _TEXT, _CUT, _CONTINUES = 1, 2, 4, 8
_IN_MEMORY = 16 * 2**20  # bytes of a temporary store that stay in memory
INDEX_FILE: Final = "index.bin"
TOKENS_FILE: Final = "tokens.bin"


class TokenRows(Sequence[TokenRow]):
    """Rows of a store; each is read when it is asked for. Threads may share it, processes may not."""

    def __init__(self, index: IO[bytes], tokens: IO[bytes], count: int, order: array[int] | None = None) -> None:
        self._index, self._tokens, self._count = index, tokens, count
        self._order = order
        self._lock = threading.Lock()

    @classmethod
    def open(cls, folder: Path, count: int) -> TokenRows:
        """The rows of a folder that `TokenWriter` wrote."""
        rows = cls((folder / INDEX_FILE).open("rb"), (folder / TOKENS_FILE).open("rb"), count)
        weakref.finalize(rows, _close, rows._index, rows._tokens)
        return rows

    def __len__(self) -> int:
        return self._count if self._order is None else len(self._order)

    @overload
    def __getitem__(self, place: int) -> TokenRow: ...
    @overload
    def __getitem__(self, place: slice) -> list[TokenRow]: ...
    def __getitem__(self, place: int | slice) -> TokenRow | list[TokenRow]:
        if isinstance(place, slice):
            return [self[one] for one in range(*place.indices(len(self)))]
        if not -len(self) <= place < len(self):
            raise IndexError(f"row {place} of {len(self)}")
        return self._read(place % len(self))

    def __iter__(self) -> Iterator[TokenRow]:
        return (self._read(place) for place in range(len(self)))

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, Sequence)
            and len(self) == len(other)
            and all(a == b for a, b in zip(self, other, strict=True))
        )

    __hash__ = None  # type: ignore[assignment]

    def lengths(self) -> array[int]:
        """Tokens of each row, without reading the tokens."""
        found = array("i", (length for _, _, length, _ in self._records()))
        return found if self._order is None else array("i", (found[place] for place in self._order))

    def origins(self) -> array[int]:
        """Which of the rows that were read each row comes from, from 0; the pieces of a split row have the same."""
        found = array("q", accumulate((not flags & _CONTINUES for *_, flags in self._records()), initial=-1))[1:]
        return found if self._order is None else array("q", (found[place] for place in self._order))

    def cut_flags(self) -> bytes:
        """1 for each row of which tokens were cut off, else 0; of a split row its first piece tells it."""
        found = bytes(bool(flags & _CUT) for *_, flags in self._records())
        return found if self._order is None else bytes(found[place] for place in self._order)

    def _records(self) -> Iterator[tuple[int, int, int, int]]:
        with self._lock:
            self._index.seek(0)
            records = self._index.read(self._count * _RECORD.size)
        return _RECORD.iter_unpack(records)

    def pick(self, places: Iterable[int]) -> TokenRows:
        """A view of some rows in another order; nothing is copied."""
        order = array("q", places if self._order is None else (self._order[place] for place in places))
        view = TokenRows(self._index, self._tokens, self._count, order)
        view._lock = self._lock
        view._whole = self  # type: ignore[attr-defined]  # the files stay open as long as a view lives
        return view

    def _read(self, place: int) -> TokenRow:
        at = place if self._order is None else self._order[place]
        with self._lock:
            self._index.seek(at * _RECORD.size)
            number, start, length, flags = _RECORD.unpack(self._index.read(_RECORD.size))
            self._tokens.seek(start)
            data = self._tokens.read(5 * length)
        ids = array("i")
        ids.frombytes(data[: 4 * length])
        kind = "text" if flags & _TEXT else "chat"
        return TokenRow(number, ids, data[4 * length :], kind, bool(flags & _TRUNCATED))  # type: ignore[arg-type]


class TokenWriter:
    """Takes rows one after the other; `finish` gives them back.

    Args:
        folder: Where the two files go; None: to a temporary place that vanishes with the rows.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self._folder = folder
        self._index, self._tokens = (self._open(folder, name) for name in (INDEX_FILE, TOKENS_FILE))
        self._place = 0
        self.count = self.tokens = self.trained_tokens = 0

    @staticmethod
    def _open(folder: Path | None, name: str) -> IO[bytes]:
        if folder is None:
            return tempfile.SpooledTemporaryFile(_IN_MEMORY)
        return (folder / name).open("wb")

    def append(self, row: TokenRow) -> None:
        """Take one row.

        Raises:
            DiskFullError: No room left.
        """
        flags = _TRUNCATED * row.truncated | _TEXT * (row.kind == "text")
        flags |= _CUT * (row.cut > 0) | _CONTINUES * row.continues
        with coded_disk_errors(self._folder or Path(tempfile.gettempdir())):
            self._index.write(_RECORD.pack(row.number, self._place, len(row.ids), flags))
            self._tokens.write(row.ids.tobytes() + row.mask)
        self._place += 5 * len(row.ids)
        self.count += 1
        self.tokens += len(row.ids)
        self.trained_tokens += row.trained

    def finish(self) -> TokenRows | None:
        """The rows, of a temporary store; a folder is closed, and `TokenRows.open` reads it."""
        with coded_disk_errors(self._folder or Path(tempfile.gettempdir())):
            self._index.flush()
            self._tokens.flush()
        if self._folder is not None:
            self.close()
            return None
        rows = TokenRows(self._index, self._tokens, self.count)
        weakref.finalize(rows, _close, self._index, self._tokens)
        return rows

    def close(self) -> None:
        """Let go of the files; of a temporary store nothing is left."""
        _close(self._index, self._tokens)


def _close(*files: IO[bytes]) -> None:
    for file in files:
        file.close()


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


Item = TypeVar("Item")
Stored = TypeVar("Stored", TokenRows, AnswerRows[Any])


@overload
def split_rows(  # type: ignore[overload-overlap]  # stored rows are a sequence too, and come back as stored rows
    rows: Stored, heldout: float, seed: int
) -> tuple[Stored, Stored]: ...
@overload
def split_rows(rows: Sequence[Item], heldout: float, seed: int) -> tuple[list[Item], list[Item]]: ...
def split_rows(rows: Sequence[Any], heldout: float, seed: int) -> tuple[Sequence[Any], Sequence[Any]]:
    """Part ``rows`` into those to train on and those held out, both in their order; stored rows are not copied.

    Args:
        rows: Any rows.
        heldout: A whole number (int) counts rows; a fraction (float, 0 to below 1) is a share, rounded, at least one
            row where it is above 0. At least one row always stays for training.
        seed: The same seed and number of rows hold out the same places.

    Raises:
        ContractError: ``heldout`` is negative, or a float of 1 or more.
    """
    if heldout < 0 or (isinstance(heldout, float) and heldout >= 1):
        raise ContractError(f"heldout={heldout!r}: a number of rows, or a share from 0 to below 1")
    wanted = max(1, round(heldout * len(rows))) if isinstance(heldout, float) and heldout else int(heldout)
    count = max(0, min(wanted, len(rows) - 1))
    places = set(random.Random(seed).sample(range(len(rows)), count))  # noqa: S311 - a choice that must repeat
    kept = (place for place in range(len(rows)) if place not in places)
    if isinstance(rows, TokenRows | AnswerRows):
        return rows.pick(kept), rows.pick(sorted(places))
    return [rows[place] for place in kept], [rows[place] for place in sorted(places)]
