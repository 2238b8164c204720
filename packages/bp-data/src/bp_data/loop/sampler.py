"""Which examples are trained on when: a function of the seed and the epoch alone."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import TypeVar

Item = TypeVar("Item")
_WORDS = 624
_MIX = 0x9E3779B97F4A7C15
"""Odd, from the golden ratio: keeps the epochs of neighboring seeds apart."""


class ExampleOrder:
    """Indexes of ``count`` examples, epoch after epoch: shuffled, or in file order.

    Nothing else draws from this source of random numbers. So a resumed run, the other ranks, and a program that only
    wants to know which examples a run will visit all find the same order.
    """

    def __init__(self, count: int, seed: int, *, shuffled: bool) -> None:
        self.count = count
        self._seed = seed
        self._shuffled = shuffled
        self._read = lru_cache(maxsize=2)(self._draw)

    def epoch(self, number: int) -> Sequence[int]:
        """All indexes in the order of epoch ``number``, counted from 0."""
        return self._read(number)

    def _draw(self, number: int) -> Sequence[int]:
        if not self._shuffled:
            return range(self.count)
        return shuffle(self.count, (self._seed + number * _MIX) % 2**63)


class StepSampler:
    """The micro-batches of each optimizer step that one process runs.

    With several ranks, their micro-batches one after the other are those of a single process: rank r takes the r-th
    ``batch_size`` examples of each ``batch_size * ranks``. Every rank has as many micro-batches; where examples run
    out, the last one of some ranks is empty. A step never spans two epochs, so the last step of an epoch may be short.

    Args:
        order: The order of the examples.
        batch_size: Examples in a micro-batch.
        accumulation: Micro-batches in a step.
        rank: This process.
        ranks: How many processes train together.
    """

    def __init__(
        self, order: ExampleOrder, batch_size: int, accumulation: int = 1, *, rank: int = 0, ranks: int = 1
    ) -> None:
        self.order = order
        self.batch_size = batch_size
        self._accumulation = accumulation
        self._rank = rank
        self._ranks = ranks

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps in which every example is visited once."""
        return -(-self.order.count // (self.batch_size * self._ranks * self._accumulation))

    def step(self, number: int) -> list[list[int]]:
        """The rank's micro-batches of step ``number``, counted from 0, as indexes of examples."""
        indexes, together = self.all_indexes(number), self.batch_size * self._ranks
        mine = slice(self._rank * self.batch_size, (self._rank + 1) * self.batch_size)
        return [indexes[start : start + together][mine] for start in range(0, len(indexes), together)]

    def all_indexes(self, number: int) -> list[int]:
        """The examples of step ``number`` over all ranks, in order."""
        epoch, place = divmod(number, self.steps_per_epoch)
        size = self._accumulation * self.batch_size * self._ranks
        return list(self.order.epoch(epoch)[place * size : (place + 1) * size])

    def visited(self, steps: int) -> list[int]:
        """Indexes that ``steps`` steps visit over all ranks, each once, in the order of the first visit."""
        epochs, rest = divmod(steps, self.steps_per_epoch)
        first = self.order.epoch(0)
        return list(first) if epochs else list(first[: rest * self._accumulation * self.batch_size * self._ranks])


def split_evenly(examples: Sequence[Item], parts: int) -> Iterator[Sequence[Item]]:
    """``examples`` in at most ``parts`` runs whose sizes differ by at most one; none is empty."""
    parts = min(parts, len(examples))
    start = 0
    for part in range(parts):
        size = len(examples) // parts + (part < len(examples) % parts)
        yield examples[start : start + size]
        start += size


def shuffle(count: int, seed: int) -> list[int]:
    """A permutation of ``range(count)``, equal to ``torch.randperm`` with a CPU generator of that seed.

    The Fisher-Yates shuffle over the 32-bit draws of a Mersenne Twister (Matsumoto and Nishimura, 1998), seeded by the
    method of its 2002 reference code. Python's own seeding differs, so the state is built here.
    """
    state = [seed & 0xFFFFFFFF]
    for place in range(1, _WORDS):
        last = state[-1]
        state.append((1812433253 * (last ^ (last >> 30)) + place) & 0xFFFFFFFF)
    draws = random.Random()  # noqa: S311  # an order of examples, not a secret
    draws.setstate((3, (*state, _WORDS), None))
    found = list(range(count))
    for place in range(count - 1):
        other = place + draws.getrandbits(32) % (count - place)
        found[place], found[other] = found[other], found[place]
    return found
