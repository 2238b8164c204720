"""What the loop asks of a rail and of its surroundings: small protocols, so that nothing here imports a framework."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from bp_data.loop.memory import Memory
from bp_runs.checkpoint_store import Reason
from bp_runs.errors import CodedError
from bp_runs.events import Notice


class Framework(Memory, Protocol):
    """What a rail brings to the loop: a model, its loss, its gradients and its optimizer.

    Examples are known by their indexes. Numbers stay on the device until `Pending` is called, so that the host never
    waits for the device inside a step.
    """

    def expand(self, indexes: Sequence[int]) -> Sequence[int]:
        """Examples of a micro-batch that can run apart: the rows of its packs, or, without packing, the indexes."""
        ...

    def weigh(self, examples: Sequence[int]) -> float:
        """What the loss is a mean of: trained tokens, or examples for methods that compare answers."""
        ...

    def count_tokens(self, examples: Sequence[int]) -> int:
        """Tokens of the examples, prompts included and padding not."""
        ...

    def prepare(self, mine: Sequence[int], everyone: Sequence[int]) -> Any:
        """What all chunks of a step share, measured without gradients; None for most methods.

        Args:
            mine: The step's examples of this process.
            everyone: Those of all processes.
        """
        ...

    def backward(self, chunk: Sequence[int], total: float, shared: Any) -> Any:
        """Add the gradient of the chunk's loss divided by ``total``; returns sums of loss and metrics, on the device.

        An empty chunk has no gradient and sums of zero; it exists because every rank runs as many micro-batches.
        """
        ...

    def add(self, sums: Any, more: Any) -> Any:
        """Both sums together, on the device."""
        ...

    def clear_gradients(self) -> None:
        """Set all gradients to zero or none."""
        ...

    def random_state(self) -> Any:
        """Of the generators that dropout draws from."""
        ...

    def set_random_state(self, state: Any) -> None:
        """Undo draws since `random_state`."""
        ...

    def sum_gradients(self) -> None:
        """Sum the gradients over the processes; nothing for one process."""
        ...

    def clip(self, max_norm: float, sums: Any) -> Pending:
        """Scale the gradients down to ``max_norm`` (0: leave them), and start to read the step's numbers."""
        ...

    def update(self, rate: float) -> None:
        """One optimizer step at this learning rate, then clear the gradients.

        May be called again after it ran out of memory: no weight is left out, none is updated twice.
        """
        ...

    def peak_memory(self) -> int:
        """Bytes: the most that the device's allocator, or on a CPU the process, has held."""
        ...


Pending = Callable[[], Mapping[str, float]]
"""Waits for a step's gradients, not for its update: ``grad_norm``, and sums of ``loss`` and the method's metrics."""


class Monitor(Protocol):
    """Guards of the device, such as its temperature."""

    @property
    def temperature(self) -> float | None:
        """Degrees Celsius when last read."""
        ...

    @property
    def paused(self) -> float:
        """Seconds of all pauses so far."""
        ...

    def before_batch(self) -> None:
        """Wait while the device is too hot."""
        ...

    def end_step(self, tokens_per_second: float) -> None:
        """Called after every step; raises a CodedError where the run cannot continue."""
        ...


class Group(Protocol):
    """The processes that train together; a process alone is a group of one."""

    rank: int
    count: int

    def sum_values(self, values: Sequence[float]) -> list[float]:
        """Sums over the processes, position by position."""
        ...


class LoopGroup(Group, Protocol):
    """The processes that train together, with what the loop needs beyond sums."""

    def any(self, mine: bool) -> bool:
        """Whether it is so in any process."""
        ...

    def all_gather(self, mine: Any) -> list[Any]:
        """What each process gives, by rank."""
        ...

    def try_all(self, action: Callable[[], None]) -> CodedError | None:
        """Run ``action`` in each process; an error of one is returned in all."""
        ...

    def take_warnings(self) -> list[Notice]:
        """Warnings of this process that the main process has not shown yet."""
        ...


class Saver(Protocol):
    """Saves checkpoints."""

    def is_due(self, step: int) -> bool:
        """Whether the schedule wants one after ``step``."""
        ...

    def save(self, step: int, reason: Reason) -> None:
        """Save the state after ``step``, once for each step."""
        ...


class Measured(Protocol):
    """What a framework does for a validation."""

    def measure(self, indexes: Sequence[int], shared: Any) -> Mapping[str, float]:
        """Sums over some held-out examples, without gradients; zeros of the same names for none.

        Returns:
            ``loss``, ``count`` of what the loss is a mean of, ``tokens`` trained on, and the method's own metrics.
        """
        ...

    def prepare_measure(self, mine: Sequence[int], everyone: Sequence[int]) -> Any:
        """As `Framework.prepare`, for held-out examples."""
        ...

    def copy_weights(self) -> Any:
        """The trained weights, in memory that training does not need."""
        ...

    def load_weights(self, weights: Any) -> None:
        """Set the trained weights to what `copy_weights` gave."""
        ...


class OneProcess:
    """`LoopGroup` of a process that trains alone."""

    rank = 0
    count = 1

    def sum_values(self, values: Sequence[float]) -> list[float]:
        """The values."""
        return list(values)

    def any(self, mine: bool) -> bool:
        """``mine``."""
        return mine

    def all_gather(self, mine: Any) -> list[Any]:
        """``mine`` alone."""
        return [mine]

    def try_all(self, action: Callable[[], None]) -> CodedError | None:
        """The error of ``action``, if it raises one."""
        try:
            action()
        except CodedError as error:
            return error
        return None

    def take_warnings(self) -> list[Notice]:
        """None: a process alone shows its warnings itself."""
        return []


class NoMonitor:
    """`Monitor` of a device without guards."""

    temperature: float | None = None
    paused = 0.0

    def before_batch(self) -> None:
        """Nothing to wait for."""

    def end_step(self, tokens_per_second: float) -> None:
        """Nothing to check."""
