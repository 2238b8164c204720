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

from dataclasses import replace
from functools import partial

from bp_runs.events import Emit
from bp_runs.rail import Stop, TrainOutcome
from bp_runs.spec import TrainSpec
from bp_train_cuda.distributed.process_group import ProcessGroup
from bp_train_cuda.model.load import BaseCache


def train(
    spec: TrainSpec, emit: Emit, stop: Stop, *, cache: BaseCache | None = None, group: ProcessGroup
) -> TrainOutcome:
    """Prepare the examples, load, train, save and answer the sample prompts, with the engine of the settings.

    Args:
        cache: Keeps the base for the next call; None: it is not kept.
        group: The processes that train together; the main process saves and answers.

    Raises:
        CodedError: As `bp_train_cuda.rail.CudaRail.train`.
    """
    from bp_data.loop.rows import plan_rows
    from bp_train_cuda import check
    from bp_train_cuda.distributed import rules
    from bp_train_cuda.engines import base

    rules.require_supported(spec, group)
    if group.is_sharded:
        spec = replace(spec, training=rules.sharded_training(spec.training))
    spec, rows = plan_rows(spec, emit, group, partial(check.require_rows_fit, spec))
    if group.count > 1:
        emit(rules.ranks_notice(spec, group.count))
    with (
        base.quiet_framework(),
        base.open_base(spec, cache, spec.initial_adapter) as loaded,
        base.determinism(spec.training, on_gpu=loaded.device.kind == "cuda"),
    ):
        if spec.training.engine == "trl":
            from bp_train_cuda.engines import trl

            outcome = trl.train(spec, rows.train, rows.validation, emit, stop, loaded=loaded)
        else:
            from bp_train_cuda.engines.native import NativeRun

            outcome = NativeRun(spec, rows.train, rows.validation, emit, stop, loaded, group).train()
    return replace(outcome, rows=rows.count_after(outcome.steps))
