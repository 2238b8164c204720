"""What preference methods measure change from: the model before training, and kto's reference point.

Written over numbers, so that every rail shares it: a rail brings `SumLogProbs`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from bp_data.loop.examples import AnyExamples, Batch, JudgedExamples, Mismatch, RowExamples
from bp_data.loop.memory import MemoryGuard
from bp_data.loop.protocols import Group
from bp_data.loop.sampler import split_evenly

SumLogProbs = Callable[[Batch], Sequence[float]]
"""Log-probabilities of each row's trained tokens, summed, in nats; without gradients and dropout."""


class References:
    """Measures completions under the model as it is now.

    Args:
        measure: Runs the model.
        batch_size: Examples that run at once.
        reader: Cuts batches that do not fit into chunks.
        group: The processes that share the work.
        runs_empty: Whether a process without examples must run the model as often as the others: weights that are
            sharded are gathered by all.
    """

    def __init__(
        self,
        measure: SumLogProbs,
        batch_size: int,
        *,
        reader: MemoryGuard,
        group: Group,
        runs_empty: bool = False,
    ) -> None:
        self._measure = measure
        self._batch_size = batch_size
        self._reader = reader
        self._group = group
        self._runs_empty = runs_empty

    def measure_in_order(self, heldout: AnyExamples, longest: Sequence[int] = ()) -> None:
        """As `measure`, for all held-out examples in the batches of a validation.

        Args:
            longest: Examples that a preflight will measure together.
        """
        size = self._batch_size * self._group.count
        everything = range(heldout.count)
        batches = [everything[start : start + size] for start in everything[::size]]
        self.measure(heldout, everything, [*batches, longest] if longest else batches)

    def measure(self, examples: AnyExamples, indexes: Iterable[int], batches: Iterable[Sequence[int]]) -> None:
        """Let the model as it is now be what ``examples`` are compared with.

        Args:
            indexes: Examples to measure.
            batches: The examples of each step to come, for kto's reference point.
        """
        if isinstance(examples, RowExamples):
            return
        examples.reference = None
        wanted = sorted(set(indexes))
        found = self._measure_all(wanted, examples.tokens, examples.collate, examples.width)
        examples.reference = dict(zip(wanted, found, strict=True))
        if isinstance(examples, JudgedExamples):
            pairs = sorted({pair for batch in batches for pair in examples.mismatched(batch)})
            logs = self._measure_all(pairs, lambda pair: examples.tokens(pair[0]), examples.collate_mismatched, 1)
            examples.mismatched_reference = dict(zip(pairs, (log[0] for log in logs), strict=True))

    def _measure_all(
        self, items: Sequence[Any], length: Callable[[Any], int], collate: Callable[[Sequence[Any]], Batch], width: int
    ) -> list[Sequence[float]]:
        """(len(items), width) log-probabilities of completions. The processes share the work."""
        found = [0.0] * (len(items) * width)
        ordered = sorted(range(len(items)), key=lambda place: -length(items[place]))  # little padding
        size, together = self._batch_size, self._batch_size * self._group.count
        for start in range(0, len(ordered), together):
            mine = ordered[start : start + together][self._group.rank * size : (self._group.rank + 1) * size]

            def run(mine: Sequence[int] = mine) -> None:
                for chunk in self._chunks(mine):
                    log_probs = self._measure(collate([items[place] for place in chunk or ordered[:1]]))
                    for number, place in enumerate(chunk):
                        found[place * width : (place + 1) * width] = log_probs[number * width : (number + 1) * width]

            self._reader.split(run, max(1, len(mine)), lambda: None)
        # Each process has filled in its own and left zeros for the rest, so a sum joins them.
        found = self._group.sum_values(found) if self._group.count > 1 else found
        return [found[start : start + width] for start in range(0, len(found), width)]

    def point(self, examples: AnyExamples | None, mine: Sequence[int], everyone: Sequence[int]) -> float | None:
        """Kto's reference point: how much more likely completions are now under other prompts, at least 0, in nats.

        Args:
            mine: The examples of this process.
            everyone: Those of all processes.

        Returns:
            None for other methods.
        """
        if not isinstance(examples, JudgedExamples):
            return None
        partners = dict(examples.mismatched(everyone))
        pairs = [(index, partners[index]) for index in mine]
        change = 0.0
        size = self._batch_size
        # By the examples of all: where a process must run empty batches, all run as many.
        for start in range(0, size * -(-len(everyone) // (size * self._group.count)), size):
            change += self._sum_changes(examples, pairs[start : start + size])
        total, count = self._group.sum_values([change, float(len(pairs))])
        return max(0.0, total / max(1.0, count))

    def _sum_changes(self, examples: JudgedExamples, pairs: Sequence[Mismatch]) -> float:
        """How much more likely the completions have become, summed, in nats."""

        def run() -> float:
            change = 0.0
            for chunk in self._chunks(pairs):
                log_probs = self._measure(examples.collate_mismatched(chunk or [(0, 0)]))
                before = sum(examples.mismatched_reference[pair] for pair in chunk)
                change += sum(log_probs) - before if chunk else 0.0
            return change

        return self._reader.split(run, max(1, len(pairs)), lambda: None)

    def _chunks(self, items: Sequence[Any]) -> list[Sequence[Any]]:
        """What runs at once; an empty chunk where there is nothing to run but the model must."""
        return list(split_evenly(items, self._reader.chunks)) or ([[]] if self._runs_empty else [])
