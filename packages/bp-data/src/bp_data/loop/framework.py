"""What every framework does with its examples, whatever computes: it counts them, validates, and keeps references."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

from bp_data.loop.examples import AnyExamples, find_longest
from bp_data.loop.references import References
from bp_data.loop.sampler import StepSampler
from bp_runs.events import Emit, Notice
from bp_runs.methods import METHODS
from bp_runs.spec import TrainingSpec

_PREFERENCE_SUMS = ("loss", "accuracy", "margin")


class ExampleFramework(ABC):
    """The part of `bp_data.loop.protocols.Framework` and `Measured` that knows examples by index and no array."""

    examples: AnyExamples
    """To train on."""
    heldout: AnyExamples | None
    """To validate on; None without validation."""
    training: TrainingSpec
    references: References
    """What preference methods measure change from."""
    runs_empty = False
    """Whether a process without examples must run the model as often as the others."""

    @property
    def sum_names(self) -> tuple[str, ...]:
        """What `backward` and `sum_heldout` sum: the loss, and metrics of methods that compare completions."""
        return ("loss",) if METHODS[self.training.method].loss is None else _PREFERENCE_SUMS

    @abstractmethod
    def sum_heldout(self, heldout: AnyExamples, indexes: Sequence[int], shared: Any) -> list[float]:
        """`sum_names` over some held-out examples, without gradients and dropout."""

    def expand(self, indexes: Sequence[int]) -> Sequence[int]:
        """Rows of packs, or the indexes themselves."""
        return self.examples.expand(indexes)

    def weigh(self, examples: Sequence[int]) -> float:
        """Trained tokens of supervised fine-tuning, examples of other methods."""
        return float(sum(self.examples.weigh(index) for index in examples))

    def count_tokens(self, examples: Sequence[int]) -> int:
        """Tokens, padding left out."""
        return sum(self.examples.tokens(index) for index in examples)

    def measure(self, indexes: Sequence[int], shared: Any) -> Mapping[str, float]:
        """Sums over held-out examples."""
        heldout, names = self.heldout, (*self.sum_names, "count", "tokens")
        if heldout is None or not (indexes or self.runs_empty):
            return dict.fromkeys(names, 0.0)
        values = self.sum_heldout(heldout, indexes or [0], shared)
        if not indexes:
            return dict.fromkeys(names, 0.0)
        count = sum(heldout.weigh(index) for index in indexes)
        tokens = sum(heldout.trained(index) for index in indexes)
        return dict(zip(names, [*values, float(count), float(tokens)], strict=True))

    def prepare(self, mine: Sequence[int], everyone: Sequence[int]) -> float | None:
        """Kto's reference point over the step's examples; None for other methods."""
        return self.references.point(self.examples, mine, everyone)

    def prepare_measure(self, mine: Sequence[int], everyone: Sequence[int]) -> float | None:
        """As `prepare`, over held-out examples."""
        return self.references.point(self.heldout, mine, everyone)

    def longest_heldout(self) -> Sequence[int]:
        """The held-out examples that a preflight measures: as many of the longest as a micro-batch has."""
        return () if self.heldout is None else find_longest(self.heldout.lengths(), self.training.batch_size)

    def measure_references(self, sampler: StepSampler, steps: int, emit: Emit) -> None:
        """Let the model as it is now be what a run compares its examples with, if its method compares."""
        if not METHODS[self.training.method].needs_reference:
            return
        longest = find_longest(self.examples.lengths(), sampler.batch_size)
        visited = sorted({*sampler.visited(steps), *longest})
        # All steps and the preflight's batches, also in a resumed run: so the same batches give the same bits.
        batches = [*(sampler.all_indexes(step) for step in range(steps)), longest]
        emit(Notice(message=f"measuring the model before training on {len(visited)} examples"))
        self.references.measure(self.examples, visited, batches)
        self.measure_heldout_references(self.longest_heldout())

    def measure_heldout_references(self, longest: Sequence[int] = ()) -> None:
        """The same for held-out examples alone.

        Args:
            longest: Those that a preflight will measure together.
        """
        if METHODS[self.training.method].needs_reference and self.heldout is not None:
            self.references.measure_in_order(self.heldout, longest)
