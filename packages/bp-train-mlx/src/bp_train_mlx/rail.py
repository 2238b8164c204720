"""The MLX rail: examples → tokens → LoRA by mlx-lm's layers → PEFT adapter folder. Small models also on a CPU."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from bp_runs.errors import CodedError
from bp_runs.events import Emit
from bp_runs.rail import Check, EvalOutcome, MemoryEstimate, Part, Probe, RowOutcome, Stop, TrainOutcome
from bp_runs.spec import Settings, TrainSpec

if TYPE_CHECKING:
    from bp_data import Prepared, TokenRow
    from bp_runs.checkpoint_store import Checkpoint
    from bp_runs.record import RunRecord
    from bp_train_mlx.model.base_cache import BaseCache

_log = logging.getLogger("bp_train_mlx")


class MlxRail:
    """Trains on the GPU of Apple silicon; on mlx's CUDA build; and on a CPU models of up to one billion parameters."""

    name = "mlx"

    def __init__(self) -> None:
        self._cache: BaseCache | None = None

    def probe(self) -> Probe:
        """Usable where mlx and mlx-lm import."""
        from bp_train_mlx.backend import choose_device

        try:
            device = choose_device()
        except CodedError as error:
            return Probe(usable=False, why=error.message)
        note = "" if device.is_gpu else "; models of up to 1 billion parameters train on the CPU"
        return Probe(usable=True, why=device.why + note, device=device.kind, memory=device.memory)

    def checks(self) -> Sequence[Check]:
        """What to try on this machine; nothing is imported before a check runs."""
        from bp_train_mlx import doctor

        return doctor.checks()

    def estimate(
        self,
        settings: Settings,
        config: Mapping[str, Any],
        *,
        memory: int | None = None,
        machine: Path | None = None,  # noqa: ARG002  # nothing is remembered of this machine yet
    ) -> MemoryEstimate:
        """What training with ``settings`` would take of unified memory; imports no framework.

        Raises:
            ShapesUnknownError: The config does not tell the sizes.
        """
        from bp_train_mlx.memory import estimate

        return estimate(settings, config, memory)

    def check(self, settings: Settings, folder: Path) -> None:
        """Reject a model that is too large, unknown, brings its own code, or cannot be trained with the settings.

        What the user should know besides is logged as a warning.

        Raises:
            CodedError: As `bp_train_mlx.check.check_model`.
        """
        from bp_train_mlx import check

        for warning in check.check_model(settings, folder).warnings:
            _log.warning(warning)

    def train(self, spec: TrainSpec, emit: Emit, stop: Stop) -> TrainOutcome:
        """Train an adapter or the full model by ``spec.training.method``, with loss on the assistant's tokens only.

        Raises:
            DataError, DatasetGateError: The rows cannot be trained on; nothing has been loaded then.
            MlxUnavailableError, RemoteCodeError, ModelLoadError, TargetModulesError: The model cannot be trained here.
            PackingError: Packed examples would not be kept apart.
            GpuOutOfMemoryError, OomExhaustedError: Too little memory.
            TrainingDivergedError: The loss is no longer finite.
            TrainingFailedError: mlx raised.
        """
        from bp_train_mlx import train

        return train.train(spec, emit, stop, cache=self._cache)

    def evaluate(self, spec: TrainSpec, adapter: Path | None, emit: Emit, *, part: Part = "all") -> EvalOutcome:
        """Measure the base with ``adapter`` on the spec's rows as validation in training does; answer the prompts.

        Raises:
            NothingHeldOutError: Training with these settings would hold out none of the rows.
            AdapterInvalidError: The folder is no adapter, or not one for this base.
            CodedError: As `train`.
        """
        from bp_data.loop.rows import pick_rows
        from bp_train_mlx import evaluate

        return evaluate.evaluate(spec, pick_rows(spec, part), adapter, emit, cache=self._cache)

    def examine(
        self,
        spec: TrainSpec,
        adapter: Path | None,
        emit: Emit,
        *,
        part: Part = "all",
        answers: int = 0,
        answer_tokens: int = 128,
    ) -> list[RowOutcome]:
        """Measure each of the rows by itself, and answer the first ``answers`` that have a prompt.

        Raises:
            CodedError: As `evaluate`.
        """
        from bp_data.loop.rows import pick_rows
        from bp_train_mlx import evaluate

        spec = replace(spec, training=replace(spec.training, method="sft"))
        rows = cast("Prepared[TokenRow]", pick_rows(spec, part))
        return evaluate.examine(
            spec, rows, adapter, emit, answers=answers, answer_tokens=answer_tokens, cache=self._cache
        )

    def write_adapter(self, checkpoint: Checkpoint, record: RunRecord, folder: Path, *, best: bool = False) -> None:
        """Publish the adapter folder of a checkpoint, as `bp_data.loop.checkpoint_adapter.write_adapter`.

        Raises:
            CheckpointInvalidError: The checkpoint holds no such adapter.
        """
        from bp_data.loop import checkpoint_adapter

        checkpoint_adapter.write_adapter(checkpoint, record, folder, best=best)

    @contextlib.contextmanager
    def keep_base(self) -> Iterator[None]:
        """While the context lasts, the base that was loaded last stays in memory."""
        from bp_train_mlx.model.base_cache import BaseCache

        before, self._cache = self._cache, BaseCache()
        try:
            yield
        finally:
            self._cache = before
