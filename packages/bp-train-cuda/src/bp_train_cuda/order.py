"""In which order rows are trained on: a function of the seed and the epoch alone; and which of them are a rank's."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch.utils.data import Sampler


class RowOrder(Sampler[int]):  # type: ignore[misc]  # torch is not typed for a strict check
    """Places of ``rows`` rows, epoch after epoch: shuffled, or as they lie.

    No other draw of random numbers moves it, so a resumed run, and whoever wants to know beforehand which rows will be
    visited, find the same places.
    """

    def __init__(self, rows: int, seed: int, *, shuffled: bool) -> None:
        self._rows = rows
        self._seed = seed
        self._shuffled = shuffled
        self._epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Go to epoch ``epoch``, from 0; the loader calls it."""
        self._epoch = epoch

    def __len__(self) -> int:
        return self._rows

    def __iter__(self) -> Iterator[int]:
        return iter(self._places(self._epoch))

    def first(self, places: int) -> list[int]:
        """The first so many places that are visited; all of them where there are no more."""
        return self._places(0)[:places]

    def _places(self, epoch: int) -> list[int]:
        if not self._shuffled:
            return list(range(self._rows))
        # Seeds of neighbouring runs must not meet in their epochs, so the two are mixed by a large odd factor.
        generator = torch.Generator().manual_seed((self._seed + epoch * 0x9E3779B97F4A7C15) % 2**63)
        return [int(place) for place in torch.randperm(self._rows, generator=generator)]


class RankBatches(Sampler[list[int]]):  # type: ignore[misc]
    """The micro-batches of one rank: the ranks' micro-batches, one after the other, are those of a process alone.

    Every rank has as many; where rows run out, the last of some ranks is empty.

    Args:
        order: All places, in the order that a process alone would visit them.
        rows: Rows in a rank's micro-batch.
        rank: Whose.
        count: How many ranks there are.
    """

    def __init__(self, order: RowOrder | Sequence[int], rows: int, rank: int, count: int) -> None:
        self._order = order
        self._rows = rows
        self._rank = rank
        self._together = rows * count

    def set_epoch(self, epoch: int) -> None:
        """As `RowOrder.set_epoch`."""
        if isinstance(self._order, RowOrder):
            self._order.set_epoch(epoch)

    def __len__(self) -> int:
        return (len(self._order) + self._together - 1) // self._together

    def __iter__(self) -> Iterator[list[int]]:
        places, mine = list(self._order), slice(self._rank * self._rows, (self._rank + 1) * self._rows)
        for start in range(0, len(places), self._together):
            yield places[start : start + self._together][mine]
