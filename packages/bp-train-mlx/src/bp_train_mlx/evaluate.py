"""Measuring a model without training it: the loss over examples, and row by row with answers."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from bp_data import Prepared, TokenRow
from bp_data.loop.evaluation import examine_rows, measure_rows
from bp_data.preparation import AnyPrepared
from bp_runs.events import Emit
from bp_runs.rail import EvalOutcome, RowOutcome
from bp_runs.spec import TrainSpec
from bp_train_mlx.framework import MlxFramework
from bp_train_mlx.generate import answer_prompts, complete
from bp_train_mlx.model import lora
from bp_train_mlx.model.base_cache import BaseCache
from bp_train_mlx.model.lora import KeyedDropout
from bp_train_mlx.train import Loaded, build_framework, open_base


@dataclass
class Nothing:
    """`bp_train_mlx.framework.Trained` of a model that is only measured."""

    dropouts: list[KeyedDropout] = field(default_factory=list)

    def weights(self) -> dict[str, Any]:
        """None."""
        return {}

    def load(self, weights: Mapping[str, Any]) -> None:
        """Nothing to set."""

    def rename(self, name: str) -> str:
        """The name."""
        return name

    def turn(self, weight: Any) -> Any:
        """The array."""
        return weight


def evaluate(
    spec: TrainSpec, prepared: AnyPrepared, adapter: Path | None, emit: Emit, *, cache: BaseCache | None = None
) -> EvalOutcome:
    """Load, measure the loss on all of ``prepared``, answer the sample prompts.

    Args:
        spec: Names the base and the method.
        prepared: Rows to measure.
        adapter: An adapter folder, or None for the base alone.
        emit: Receives answers and warnings.
        cache: Keeps the base for the next call; None: it is not kept.

    Raises:
        CodedError: As `bp_train_mlx.rail.MlxRail.evaluate`.
    """
    with _open(spec, adapter, cache) as loaded:
        framework = _measured(spec, prepared, emit, loaded)
        framework.measure_heldout_references()  # the base is what completions are compared with
        with _adapted(loaded, spec, adapter):
            outcome = measure_rows(framework, spec.training, emit)
            answer_prompts(spec, prepared, loaded.model, emit, step=0)
        return outcome


def examine(
    spec: TrainSpec,
    prepared: Prepared[TokenRow],
    adapter: Path | None,
    emit: Emit,
    *,
    answers: int,
    answer_tokens: int,
    cache: BaseCache | None = None,
) -> list[RowOutcome]:
    """Each row's loss, and answers to the first ``answers`` rows that have a prompt; as `evaluate`.

    Raises:
        CodedError: As `bp_train_mlx.rail.MlxRail.examine`.
    """
    with _open(spec, adapter, cache) as loaded, _adapted(loaded, spec, adapter):
        framework = _measured(spec, prepared, emit, loaded)
        return examine_rows(
            framework, prepared, partial(complete, loaded.model), answers=answers, answer_tokens=answer_tokens
        )


def _measured(spec: TrainSpec, prepared: AnyPrepared, emit: Emit, loaded: Loaded) -> MlxFramework:
    return build_framework(spec, prepared, prepared.rows, loaded, Nothing(), emit=emit)


@contextlib.contextmanager
def _open(spec: TrainSpec, adapter: Path | None, cache: BaseCache | None) -> Iterator[Loaded]:
    mode = "lora" if spec.training.mode == "full" else spec.training.mode
    spec = replace(spec, training=replace(spec.training, mode=mode, packing=False))
    if adapter is not None:
        spec = replace(spec, lora=lora.saved_spec(adapter, spec.lora))
    with open_base(spec, cache, adapter) as loaded:
        yield loaded


@contextlib.contextmanager
def _adapted(loaded: Loaded, spec: TrainSpec, adapter: Path | None) -> Iterator[None]:
    """While the context lasts, the saved adapter is on the base."""
    if adapter is None:
        yield
        return
    own = lora.saved_spec(adapter, spec.lora)
    targets = lora.choose_targets(loaded.model, spec.base, loaded.checked.config, own.target_modules)
    added = lora.add_lora(loaded.model, targets, own, spec.training.seed)
    try:
        lora.set_weights(added, adapter, own)
        loaded.model.eval()
        yield
    finally:
        added.remove()
