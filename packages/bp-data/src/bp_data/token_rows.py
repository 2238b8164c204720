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
from typing import IO, Any, Final, Generic, Literal, Self, TypeAlias, TypeVar, overload

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
        mask: One byte a token: 1 where it is learned, 0 where it is only read.
        kind: ``chat`` (assistant's turns are learned) or ``text`` (everything is).
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
        """Ids where learned, `IGNORED` elsewhere.

        Labels come from the mask and from nothing else; comparing ids with the pad token would unlearn the end of a
        turn wherever pad and end token are the same.
        """
        return [token if learnt else IGNORED for token, learnt in zip(self.ids, self.mask, strict=True)]


@dataclass(frozen=True, slots=True)
class PairRow:
    """One prompt with a better and a worse answer; both rows hold the prompt, and only the answers are learned.

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
        """Tokens with which both rows begin and of which none is learned."""
        return min(self.chosen.mask.find(1), self.rejected.mask.find(1))


@dataclass(frozen=True, slots=True)
class JudgedRow:
    """A prompt with an answer that is good or bad.

    Attributes:
        number: As in `Row`.
        row: Prompt and answer; only the answer is learned.
        label: True for a good answer.
    """

    number: int
    row: TokenRow
    label: bool


_RECORD: Final = struct.Struct("=qqiB3x")  # number, place in bytes, tokens, flags
_TRUNCATED, _TEXT, _CUT, _CONTINUES, _GOOD = 1, 2, 4, 8, 16
_IN_MEMORY = 16 * 2**20  # bytes of a temporary store that stay in memory
INDEX_FILE: Final = "index.bin"
TOKENS_FILE: Final = "tokens.bin"


AnyRow: TypeAlias = TokenRow | PairRow | JudgedRow
R_co = TypeVar("R_co", bound=AnyRow, covariant=True)


class _Store:
    """The two files of a store, open as long as any view of its rows lives. Threads may share it, processes may not."""

    def __init__(self, index: IO[bytes], tokens: IO[bytes], count: int) -> None:
        self._index, self._tokens, self.count = index, tokens, count
        self._lock = threading.Lock()
        weakref.finalize(self, _close, index, tokens)

    def records(self) -> list[tuple[int, int, int, int]]:
        """Number, place in bytes, tokens and flags of each row; the tokens are not read."""
        with self._lock:
            self._index.seek(0)
            return list(_RECORD.iter_unpack(self._index.read(self.count * _RECORD.size)))

    def read(self, at: int) -> tuple[TokenRow, int]:
        """A row and its flags."""
        with self._lock:
            self._index.seek(at * _RECORD.size)
            number, start, length, flags = _RECORD.unpack(self._index.read(_RECORD.size))
            self._tokens.seek(start)
            data = self._tokens.read(5 * length)
        ids = array("i")
        ids.frombytes(data[: 4 * length])
        kind: Literal["chat", "text"] = "text" if flags & _TEXT else "chat"
        return TokenRow(number, ids, data[4 * length :], kind, bool(flags & _TRUNCATED)), flags


class StoredRows(Sequence[R_co], Generic[R_co]):
    """Rows of a store in some order; each is read when it is indexed.

    Args:
        store: The files; token rows that belong to one row are next to each other.
        order: Places of the rows; None: all as they were written.
    """

    parts = 1
    """Token rows that make one row."""

    def __init__(self, store: _Store, order: Sequence[int] | None = None) -> None:
        self._store = store
        self._order = range(store.count // self.parts) if order is None else order

    @classmethod
    def open(cls, folder: Path, count: int) -> Self:
        """The rows of a folder that `TokenWriter` wrote, ``count`` token rows in all."""
        return cls(_Store((folder / INDEX_FILE).open("rb"), (folder / TOKENS_FILE).open("rb"), count))

    @abstractmethod
    def _read(self, place: int) -> R_co: ...

    def __len__(self) -> int:
        return len(self._order)

    @overload
    def __getitem__(self, place: int) -> R_co: ...
    @overload
    def __getitem__(self, place: slice) -> list[R_co]: ...
    def __getitem__(self, place: int | slice) -> R_co | list[R_co]:
        if isinstance(place, slice):
            return [self._read(at) for at in self._order[place]]
        if not -len(self) <= place < len(self):
            raise IndexError(f"row {place} of {len(self)}")
        return self._read(self._order[place])

    def __iter__(self) -> Iterator[R_co]:
        return map(self._read, self._order)

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, Sequence)
            and len(self) == len(other)
            and all(a == b for a, b in zip(self, other, strict=True))
        )

    __hash__ = None  # type: ignore[assignment]

    def lengths(self) -> array[int]:
        """Tokens of each row, of both completions where there are two; the tokens are not read."""
        found = [length for _, _, length, _ in self._store.records()]
        return array("q", (sum(self._parts_of(found, place)) for place in self._order))

    def origins(self) -> array[int]:
        """Which of the rows that were read each row comes from, from 0; the pieces of a split row have the same."""
        found = list(accumulate((not flags & _CONTINUES for *_, flags in self._store.records()), initial=-1))[1:]
        return array("q", (found[place * self.parts] // self.parts for place in self._order))

    def cut_flags(self) -> bytes:
        """1 for each row of which tokens were cut off, else 0; of a split row its first piece shows it."""
        found = [flags & _CUT for *_, flags in self._store.records()]
        return bytes(any(self._parts_of(found, place)) for place in self._order)

    def _parts_of(self, values: list[int], place: int) -> list[int]:
        return values[place * self.parts : (place + 1) * self.parts]

    def pick(self, places: Iterable[int]) -> Self:
        """A view of some rows in another order; nothing is copied."""
        return type(self)(self._store, array("q", (self._order[place] for place in places)))

    def as_kind(self, kind: type[K]) -> K:
        """The same store seen as rows of another kind, all in the order in which they were written."""
        return kind(self._store)


K = TypeVar("K", bound=StoredRows[Any])


class TokenRows(StoredRows[TokenRow]):
    """Rows that are trained on each alone."""

    def _read(self, place: int) -> TokenRow:
        return self._store.read(place)[0]


class PairRows(StoredRows[PairRow]):
    """Pairs, stored as two token rows after one another: chosen, rejected."""

    parts = 2

    def _read(self, place: int) -> PairRow:
        chosen, rejected = self._store.read(2 * place)[0], self._store.read(2 * place + 1)[0]
        return PairRow(chosen.number, chosen, rejected)


class JudgedRows(StoredRows[JudgedRow]):
    """Completions with a label, one token row each."""

    def _read(self, place: int) -> JudgedRow:
        row, flags = self._store.read(place)
        return JudgedRow(row.number, row, bool(flags & _GOOD))

    def labels(self) -> list[bool]:
        """Whether each completion is good; the tokens are not read."""
        found = [bool(flags & _GOOD) for *_, flags in self._store.records()]
        return [found[place] for place in self._order]


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

    def append(self, row: TokenRow, *, good: bool = True) -> None:
        """Take one row, and whether its completion is good.

        Raises:
            DiskFullError: No room left.
        """
        flags = _TRUNCATED * row.truncated | _TEXT * (row.kind == "text")
        flags |= _CUT * (row.cut > 0) | _CONTINUES * row.continues | _GOOD * good
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
        return TokenRows(_Store(self._index, self._tokens, self.count))

    def close(self) -> None:
        """Let go of the files; of a temporary store nothing is left."""
        _close(self._index, self._tokens)


def _close(*files: IO[bytes]) -> None:
    for file in files:
        file.close()


Item = TypeVar("Item")
Stored = TypeVar("Stored", bound=StoredRows[Any])


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
    if isinstance(rows, StoredRows):
        return rows.pick(kept), rows.pick(sorted(places))
    return [rows[place] for place in kept], [rows[place] for place in sorted(places)]
