"""Out of memory: the same optimizer step again, in smaller chunks.

The loss of a step is a sum over its trained tokens divided by their number, so the gradients of chunks add up to the
gradient of the micro-batch. A failed attempt leaves part of its gradient behind. So the step's gradients are cleared,
the random state is set back to where the step began, and all of its micro-batches run again: while all goes well,
nothing has to be copied.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

from bp_runs.errors import OomExhaustedError, first_line
from bp_runs.events import Emit, Notice

HALVINGS = 3
"""A micro-batch is cut into at most 2 ** 3 chunks, and other work is retried at most 3 times."""

Result = TypeVar("Result")


class Memory(Protocol):
    """How a framework runs out of memory."""

    out_of_memory_error: type[Exception]
    """What the framework raises, among other reasons perhaps, when the device's memory is full."""

    def is_out_of_memory(self, error: Exception) -> bool:
        """Whether an error of that type says that the device's memory is full."""
        ...

    def release_memory(self) -> None:
        """Give back what no tensor uses."""
        ...


@dataclass
class MemoryGuard:
    """Runs work again that did not fit the device's memory.

    Attributes:
        memory: The framework.
        emit: Receives a warning for every retry.
        enabled: If False, the framework's error is raised at once.
        halvings: Micro-batches run in ``2 ** halvings`` chunks. Kept from step to step: what did not fit once is not
            tried again.
        has_dropout: Whether dropout draws depend on the chunks.
        most: Halvings at most; more where micro-batches were joined to larger ones.
    """

    memory: Memory
    emit: Emit
    enabled: bool = True
    halvings: int = 0
    has_dropout: bool = field(default=False, kw_only=True)
    most: int = field(default=HALVINGS, kw_only=True)

    @property
    def chunks(self) -> int:
        """Into how many chunks a micro-batch is cut."""
        return int(2**self.halvings)

    def split(self, attempt: Callable[[], Result], examples: int, undo: Callable[[], None]) -> Result:
        """What ``attempt`` returns, which reads `chunks` each time it is called.

        Args:
            attempt: Runs the work; after it ran out of memory it is called again with more chunks.
            examples: Of the largest micro-batch; it cannot be cut into more chunks than these.
            undo: Called before each retry.

        Raises:
            OomExhaustedError: A single example, or an eighth of the micro-batch, does not fit.
        """
        while True:
            # Leaving the except clause frees the traceback, and with it the tensors of the failed attempt.
            try:
                return attempt()
            except self.memory.out_of_memory_error as error:
                reason = self._reason(error)
            self._halve(examples, reason)
            undo()
            self.memory.release_memory()

    def retry(self, action: Callable[[], Result], what: str) -> Result:
        """What ``action`` returns; after it ran out of memory, all that can be freed is freed and it is called again.

        Args:
            action: Called up to `HALVINGS` times more, so it must survive being cut off.
            what: For the warning, as in ``the optimizer step``.

        Raises:
            OomExhaustedError: It never fits.
        """
        for left in range(HALVINGS, -1, -1):
            try:
                return action()
            except self.memory.out_of_memory_error as error:
                reason = self._reason(error)
                if not left:
                    raise OomExhaustedError(f"{what} does not fit the device's memory", cause=reason) from error
            self.memory.release_memory()
            message = f"out of memory in {what}: unused memory was freed, trying again"
            self.emit(Notice(message=message, level="warning", details={"what": what, "reason": reason}))
        raise AssertionError

    def read_state(self) -> dict[str, Any]:
        """For a checkpoint."""
        return {"halvings": self.halvings}

    def restore_state(self, state: Mapping[str, Any]) -> None:
        """Continue with the chunks that fitted."""
        self.halvings = state["halvings"]

    def _reason(self, error: Exception) -> str:
        """The error's first sentence; an error of another kind is raised again, whole."""
        if not self.enabled or not self.memory.is_out_of_memory(error):
            raise error
        return first_line(error).split(". ")[0]

    def _halve(self, examples: int, reason: str) -> None:
        if self.halvings >= self.most or examples <= self.chunks:
            chunks = min(examples, self.chunks)
            raise OomExhaustedError(
                f"a micro-batch of {examples} examples does not fit in memory, not even in {chunks} chunks",
                cause=reason,
            )
        self.halvings += 1
        chunks = min(examples, self.chunks)
        same = "same examples, new dropout draws" if self.has_dropout else "same examples, same gradient"
        message = f"out of memory: micro-batches of {examples} examples now run in {chunks} chunks ({same})"
        self.emit(Notice(message=message, level="warning", details={"chunks": chunks, "reason": reason}))
