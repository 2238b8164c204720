"""Merging finished adapters: `backprop merge` and its Python mirror."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from backpropagate import system
from bp_runs.paths import new_run_id

if TYPE_CHECKING:
    from bp_merge import MergeOutcome


def merge_adapters(
    adapters: Sequence[str | Path],
    output: str | Path = "merged",
    *,
    method: str = "linear",
    weights: Sequence[float] | None = None,
    density: float | None = None,
    scale: float | None = None,
    rank: int | None = None,
    seed: int | None = None,
    base: str | None = None,
    force: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> MergeOutcome:
    """Merge adapters of one base into a new adapter folder, which `Trainer.export` and `backprop export` take.

    Args:
        adapters: Adapter folders; for ``slao`` in the order of training.
        output: The folder to write.
        method: slao, linear, cat, ties, dare or magmax; see `bp_merge.METHODS`.
        weights: Share of each adapter; they sum to 1. Default: equal shares.
        density: Share of each change's entries that ties and dare keep.
        scale: Factor on the merged change; default 1.
        rank: Rank of the result; default: the largest of the adapters'.
        seed: Of the entries that dare drops.
        base: Name of the base model, where the adapters name the same one differently.
        force: Whether an adapter that was trained may be replaced; an earlier merge always is.
        progress: Called with layers done and layers in all.

    Raises:
        CodedError: As `bp_merge.merge_adapters`.
    """
    import bp_merge

    options = bp_merge.MergeOptions(
        weights=None if weights is None else tuple(weights), density=density, scale=scale, rank=rank, seed=seed
    )
    return bp_merge.merge_adapters(
        [system.to_path(path) for path in adapters],
        system.to_path(output),
        run_id=new_run_id(),
        method=method,
        options=options,
        base=base,
        force=force,
        progress=progress,
    )
