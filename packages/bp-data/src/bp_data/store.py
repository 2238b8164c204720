"""Token rows on disk, so that memory holds none of them but the one in use.

A store is two files: an index with one record of 24 bytes a row, and the rows' token ids (int32) and masks (one byte a
token), one row after the other.
"""

from __future__ import annotations

import struct
import tempfile
import threading
import weakref
from array import array
from collections.abc import Iterable, Iterator, Sequence
from itertools import accumulate
from pathlib import Path
from typing import IO, Final, overload

from bp_data.tokenrow import TokenRow
from bp_runs.files import coded_disk_errors

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
