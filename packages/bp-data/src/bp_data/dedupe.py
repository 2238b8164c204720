"""Rows that say the same: exactly, nearly (MinHash), and across two files (contamination).

Near duplicates: MinHash signatures (Broder, 1997) over runs of three words, banded for look-up (LSH), by the rensa
library. Two rows count as near duplicates where 128 hashes estimate a Jaccard similarity of at least the threshold; the
estimate's standard error is about 0.03 at 0.85.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Literal

from bp_data.columns import PLAIN, ReadOptions
from bp_data.errors import RowFault
from bp_data.example import Rejected, Row
from bp_data.read import excerpt, read_rows

THRESHOLD: Final = 0.85
"""Jaccard similarity from which two rows are near duplicates."""

_HASHES, _BANDS, _SEED = 128, 16, 42
_BATCH = 1024  # rows
_WORD = re.compile(r"\w+")
# Columns that differ between rows which say the same.
_LEFT_ASIDE = frozenset({"id", "uuid", "idx", "index", "source", "prompt_id", "timestamp", "created_at"})


@dataclass(frozen=True, slots=True)
class Duplicate:
    """A row that repeats an earlier one.

    Attributes:
        place: The row's place among all rows, from 0.
        number: As in `Row`.
        of: Place of the earlier row.
        of_number: Number of the earlier row.
        kind: ``exact``: the same texts but for blanks around them; ``near``: the same runs of words, mostly.
        source: As in `Row`.
        of_source: Of the earlier row.
    """

    place: int
    number: int
    of: int
    of_number: int
    kind: Literal["exact", "near"]
    source: str = field(default="", compare=False)
    of_source: str = field(default="", compare=False)


def row_text(row: Row) -> str:
    """All texts of a row, one after the other, a line each."""
    return "\n".join(row_texts(row))


def row_texts(row: Row) -> list[str]:
    """The texts of a row in the order of its fields; ids and the like are left aside."""
    pieces: list[str] = []
    left: list[Any] = [(name, value) for name, value in reversed([*row.data.items()]) if name not in _LEFT_ASIDE]
    while left:
        item = left.pop()
        if isinstance(item, str):
            pieces.append(item)
        elif isinstance(item, tuple):
            left.append(item[1])
        elif isinstance(item, dict):
            left += reversed([*item.values()])
        elif isinstance(item, list):
            left += reversed(item)
        elif item is not None:
            pieces.append(str(item))
    return pieces


def exact_key(row: Row) -> bytes:
    """The same 16 bytes for rows whose texts differ at most in the blanks around each."""
    whole = "\0".join(text.strip() for text in row_texts(row))
    return hashlib.blake2b(whole.encode(errors="surrogatepass"), digest_size=16).digest()


def shingles(text: str) -> list[str]:
    """Runs of three words, lower case; one run where there are fewer."""
    words = _WORD.findall(text.lower())
    return list(map(" ".join, zip(words, words[1:], words[2:], strict=False))) or [" ".join(words) or text]


def find_duplicates(
    rows: Iterable[Row | Rejected], *, near: bool = True, threshold: float = THRESHOLD
) -> Iterator[Duplicate]:
    """Rows that repeat an earlier row, in order; rows that cannot be read are passed over.

    Memory grows with the rows: about 60 bytes each for exact duplicates, about 1 KiB for near ones.
    """
    return _Finder(near=near, threshold=threshold).find(rows)


class _Finder:
    def __init__(self, *, near: bool, threshold: float) -> None:
        self._exact: dict[bytes, int] = {}
        self._numbers: list[int] = []
        self._sources: list[str] = []
        self._near = _near_index(threshold) if near else None

    def find(self, rows: Iterable[Row | Rejected]) -> Iterator[Duplicate]:
        batch: list[tuple[int, str]] = []
        found: list[Duplicate] = []
        for place, row in enumerate(rows):
            self._numbers.append(row.number)
            self._sources.append(row.source)
            if isinstance(row, Rejected):
                continue
            earlier = self._exact.setdefault(exact_key(row), place)
            if earlier != place:
                found.append(self._duplicate(place, earlier, "exact"))
            elif self._near is not None:
                batch.append((place, row_text(row)))
            if len(batch) >= _BATCH:
                yield from self._flush(batch, found)
        yield from self._flush(batch, found)

    def _flush(self, batch: list[tuple[int, str]], found: list[Duplicate]) -> list[Duplicate]:
        if self._near is not None and batch:
            signatures = _signatures([text for _, text in batch])
            for (place, _), signature in zip(batch, signatures, strict=True):
                if not self._near.add(str(place), signature):
                    alike = map(int, self._near.get_duplicates(signature))
                    found.append(self._duplicate(place, min(alike), "near"))
        result = sorted(found, key=lambda duplicate: duplicate.place)
        batch.clear()
        found.clear()
        return result

    def _duplicate(self, place: int, of: int, kind: Literal["exact", "near"]) -> Duplicate:
        numbers, sources = self._numbers, self._sources
        return Duplicate(place, numbers[place], of, numbers[of], kind, sources[place], sources[of])


def _near_index(threshold: float) -> Any:
    from rensa import RMinHashDeduplicator  # type: ignore[import-untyped]

    return RMinHashDeduplicator(threshold, _HASHES, True, _BANDS, _SEED)


def _signatures(texts: list[str]) -> list[Any]:
    from rensa import RMinHash

    return list(RMinHash.from_token_sets([shingles(text) for text in texts], _HASHES, _SEED))


def reject_duplicates(
    read: Callable[[], Iterable[Row | Rejected]], *, near: bool, threshold: float = THRESHOLD
) -> Iterator[Row | Rejected]:
    """All rows, those that repeat an earlier one as `Rejected`; the rows are read twice."""
    repeated: Mapping[int, Duplicate] = {d.place: d for d in find_duplicates(read(), near=near, threshold=threshold)}
    for place, row in enumerate(read()):
        duplicate = repeated.get(place)
        if duplicate is None or isinstance(row, Rejected):
            yield row
        else:
            what = "the same as" if duplicate.kind == "exact" else "nearly the same as"
            where = "" if duplicate.of_source == row.source else f" of {duplicate.of_source}"
            reason = f"it is {what} row {duplicate.of_number}{where}"
            shown = excerpt(row_text(row))
            yield Rejected(row.number, RowFault.DUPLICATE, reason, row.source, shown)


@dataclass(frozen=True, slots=True)
class Contaminated:
    """A row of one file that is in another one as well.

    Attributes:
        number: Of the row in the file that is looked at.
        of_number: Of the row in the other file.
        kind: As in `Duplicate`.
        source: File of the row, as in `Row`.
        of_source: File of the row in the other file.
    """

    number: int
    of_number: int
    kind: Literal["exact", "near"]
    source: str = field(default="", compare=False)
    of_source: str = field(default="", compare=False)


def find_contamination(
    path: str | Path, other: str | Path, *, threshold: float = THRESHOLD, options: ReadOptions = PLAIN
) -> Iterator[Contaminated]:
    """Rows of ``other``, a test or held-out file, that are in ``path`` too, exactly or nearly.

    Args:
        path: The data file.
        other: The other file.
        threshold: Jaccard similarity from which two rows count as the same.
        options: How the rows of both are read.

    Raises:
        DataError: As `read_rows`, for either file.
    """
    exact: dict[bytes, int] = {}
    numbers: list[int] = []
    sources: list[str] = []
    index = _near_index(threshold)
    for batch in _batches(read_rows(path, options)):
        for row, signature in batch:
            exact.setdefault(exact_key(row), len(numbers))
            index.add(str(len(numbers)), signature)
            numbers.append(row.number)
            sources.append(row.source)
    for batch in _batches(read_rows(other, options)):
        for row, signature in batch:
            kind: Literal["exact", "near"] = "exact"
            place = exact.get(exact_key(row))
            if place is None and (alike := index.get_duplicates(signature)):
                place, kind = min(map(int, alike)), "near"
            if place is not None:
                yield Contaminated(row.number, numbers[place], kind, row.source, sources[place])


def _batches(rows: Iterable[Row | Rejected]) -> Iterator[list[tuple[Row, Any]]]:
    batch: list[Row] = []
    for row in rows:
        if isinstance(row, Row):
            batch.append(row)
        if len(batch) >= _BATCH:
            yield list(zip(batch, _signatures([row_text(one) for one in batch]), strict=True))
            batch = []
    if batch:
        yield list(zip(batch, _signatures([row_text(one) for one in batch]), strict=True))
