"""Engines: what runs the training steps once the examples are ready. Reading starts in `bp_data.loop.loop`.

    native.py     our own loop over torch; the default
    unsloth.py    Unsloth's model and kernels, under the same loop
    trl.py        plain TRL trainers: the reference that tests compare native with
    framework.py  torch behind the loop: forward, backward, clip, update
    base.py       what every engine shares: loading, adapters, saving

Every engine takes the same examples in the same order and leaves the same adapter folder, so a run can be repeated with
another engine.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from bp_data.asked import AnyPrepared
from bp_runs.events import Emit
from bp_runs.rail import Stop, TrainOutcome
from bp_runs.spec import TrainSpec
from bp_train_cuda.cache import BaseCache
from bp_train_cuda.distributed.process_group import ProcessGroup


def train(
    spec: TrainSpec,
    prepared: AnyPrepared,
    heldout: Sequence[Any],
    emit: Emit,
    stop: Stop,
    *,
    cache: BaseCache | None = None,
    group: ProcessGroup,
) -> TrainOutcome:
    """Load, train, save and answer the sample prompts with the engine of ``spec.training.engine``.

    Args:
        prepared: The examples to train on.
        heldout: Examples to validate on; may be empty.
        cache: Keeps the base for the next call; None: it is not kept.
        group: The processes that train together; the main process saves and answers.

    Raises:
        CodedError: As `bp_train_cuda.rail.CudaRail.train`.
    """
    from bp_train_cuda.engines import base

    with base.quiet_framework(), base.open_base(spec, cache, spec.initial_adapter) as loaded:
        if spec.training.engine == "trl":
            from bp_train_cuda.engines import trl

            return trl.train(spec, prepared, heldout, emit, stop, loaded=loaded)
        from bp_train_cuda.engines import native

        return native.train(spec, prepared, heldout, emit, stop, loaded=loaded, group=group)
