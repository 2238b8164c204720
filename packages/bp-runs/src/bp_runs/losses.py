"""What a run's losses come to: means over its first and its last steps, kept in the same room however long it is."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping
from typing import Any, Self

_MOST = 100  # steps that a mean is taken over


class LossEnds:
    """The first and the last hundred losses, in nats, and how many there were.

    Args:
        losses: Those so far.
    """

    def __init__(self, losses: Iterable[float] = ()) -> None:
        self.count = 0
        self._first: list[float] = []
        self._last: deque[float] = deque(maxlen=_MOST)
        for loss in losses:
            self.add(loss)

    def add(self, loss: float) -> None:
        """Take the next step's loss."""
        self.count += 1
        self._last.append(loss)
        if len(self._first) < _MOST:
            self._first.append(loss)

    def means(self) -> tuple[float, float]:
        """Means over the first and the last tenth of the steps, from one step to a hundred each.

        Raises:
            ZeroDivisionError: There was no step.
        """
        share = min(_MOST, max(1, self.count // 10), self.count)
        return sum(self._first[:share]) / share, sum(list(self._last)[-share:]) / share

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready, of at most two hundred numbers."""
        return {"count": self.count, "first": self._first, "last": list(self._last)}

    @classmethod
    def from_dict(cls, found: Mapping[str, Any]) -> Self:
        """What `to_dict` gave."""
        ends = cls()
        ends.count = found["count"]
        ends._first = list(found["first"])
        ends._last.extend(found["last"])
        return ends
