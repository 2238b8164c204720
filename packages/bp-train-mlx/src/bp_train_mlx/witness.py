"""The witness of a trained model: log-probabilities from memory, before anything is merged, rounded or saved."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

import mlx.core as mx

from bp_data.witness import LONGEST, Measured, build_witness
from bp_runs.spec import TrainSpec
from bp_runs.witness import TOP_TOKENS, BaseFacts, Witness
from bp_train_mlx.check import Checked
from bp_train_mlx.model.lora import Adapter

_CPU_WORK = 3e11
"""Weights times tokens of the long prompt that a CPU gets through in some seconds."""


def measure_witness(
    spec: TrainSpec,
    heldout: Sequence[Any],
    rows: Sequence[Any],
    model: Any,
    trained: Any,
    *,
    checked: Checked,
    dtype: Any,
) -> Witness | None:
    """Measure ``model`` on validation rows, else on rows that it was trained on; None without rows.

    Args:
        spec: The run's.
        heldout: Validation rows; may be empty.
        rows: Rows that were trained on.
        model: In memory, with its adapter.
        trained: The adapter, which is taken off to measure the base; or the full model.
        checked: Where the model is and how its base is held.
        dtype: The base's.
    """
    was_training = model.training
    model.eval()

    def measure(ids: Sequence[int], places: Sequence[int]) -> Measured:
        found = _compute_logprobs(model, ids, places)
        tokens = mx.argsort(-found, axis=1)[:, :TOP_TOKENS]
        top = mx.take_along_axis(found, tokens, axis=1).tolist()
        base = None
        if isinstance(trained, Adapter):
            with trained.disabled():
                base = mx.take_along_axis(_compute_logprobs(model, ids, places), tokens, axis=1).tolist()
        return tokens.tolist(), top, base

    with contextlib.ExitStack() as stack:
        stack.callback(lambda: model.train(was_training))
        return build_witness(
            heldout,
            rows,
            measure,
            run_id=spec.folders.run_id,
            base=BaseFacts(mode=checked.mode.name, dtype=str(dtype).removeprefix("mlx.core.")),
            config=checked.config,
            longest=LONGEST if checked.device.is_gpu else int(_CPU_WORK / max(1, checked.parameters)),
        )


def _compute_logprobs(model: Any, ids: Sequence[int], places: Sequence[int]) -> Any:
    """(places, V) log-probabilities in float32."""
    logits = model(mx.array([list(ids)]))[0][mx.array(list(places))].astype(mx.float32)
    return logits - mx.logsumexp(logits, axis=1, keepdims=True)
