"""Torch's fused AdamW, whose step can be called again after it ran out of memory."""

from __future__ import annotations

from typing import Any

import torch


class AdamW(torch.optim.AdamW):  # type: ignore[misc]  # torch is not typed for a strict check
    """AdamW (Loshchilov and Hutter, arXiv:1711.05101), fused, that finishes an interrupted step when called again.

    Memory can run out only while the state of a weight is made, at its first step; the fused kernel updates in place.
    So what is left to do after a failure is told by counting updates per group: asking the device would make the host
    wait at every step.
    """

    param_groups: list[dict[str, Any]]

    def __init__(self, params: Any, **options: Any) -> None:
        super().__init__(params, fused=True, **options)
        self._updated: set[int] = set()
        """Groups that the step in progress has updated."""

    @torch.no_grad()  # type: ignore[untyped-decorator]
    def step(self, closure: Any = None) -> Any:
        """One step over the groups that an interrupted call has not updated; ``closure`` is not supported.

        Raises:
            torch.OutOfMemoryError: Call it again once memory is free.
        """
        everything: list[dict[str, Any]] = self.param_groups
        for number, group in enumerate(everything):
            if number in self._updated:
                continue
            self.param_groups = [group]
            try:
                super().step(closure)
            except torch.OutOfMemoryError:
                for weight in group["params"]:
                    if weight in self.state and "exp_avg_sq" not in self.state[weight]:
                        del self.state[weight]  # half made
                raise
            finally:
                self.param_groups = everything
            self._updated.add(number)
        self._updated.clear()
