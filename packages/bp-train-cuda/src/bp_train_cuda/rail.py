"""The CUDA rail: rows → tokens → LoRA on transformers, PEFT and TRL → adapter folder. Small models also on a CPU."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from bp_data.loop.rows import pick_rows
from bp_runs.errors import CodedError
from bp_runs.events import Emit
from bp_runs.rail import Check, EvalOutcome, MemoryEstimate, Part, Probe, Replay, RowOutcome, Stop, TrainOutcome
from bp_runs.record import RunRecord
from bp_runs.spec import Ranks, RunFolders, Settings, TrainSpec

if TYPE_CHECKING:
    from bp_data import Prepared, TokenRow
    from bp_runs.checkpoint_store import Checkpoint
    from bp_train_cuda.model.load import BaseCache


_log = logging.getLogger("bp_train_cuda")


class CudaRail:
    """Trains on the first CUDA device that it sees, or on the CPU models of up to one billion parameters.

    Of several ranks (`bp_runs.rail.TrainsTogether`) each must see its own GPU alone.
    """

    name = "cuda"

    def __init__(self) -> None:
        self._cache: BaseCache | None = None

    def probe(self) -> Probe:
        """Usable on a CUDA device, and on a CPU for small models."""
        from bp_train_cuda.backend import choose_device

        device = choose_device()
        note = "" if device.kind == "cuda" else "; models of up to 1 billion parameters train on the CPU"
        return Probe(usable=True, why=device.why + note, device=device.kind, memory=device.memory)

    def checks(self) -> Sequence[Check]:
        """What to try of this machine; nothing is imported before a check runs."""
        from bp_train_cuda import doctor

        return doctor.checks()

    def check(self, settings: Settings, folder: Path) -> None:
        """Reject a model that is too large, unknown, brings its own code, or cannot be trained as set.

        What the user should know besides is logged as a warning.

        Raises:
            CodedError: As `bp_train_cuda.check.check_model`.
        """
        from bp_train_cuda import start

        with start.importing(folder):
            from bp_train_cuda import check

        for warning in check.check_model(settings, folder).warnings:
            _log.warning(warning)

    def estimate(
        self,
        settings: Settings,
        config: Mapping[str, Any],
        *,
        memory: int | None = None,
        machine: Path | None = None,
    ) -> MemoryEstimate:
        """What training with ``settings`` would take of a GPU; imports no framework for the known kinds of model.

        Raises:
            ShapesUnknownError, ModelLoadError: The config describes no language model.
        """
        from bp_data.loop.shapes import FAMILIES, read_shapes
        from bp_train_cuda.memory.estimate import choose_base, estimate, read_load
        from bp_train_cuda.memory.fit import FitMemory

        if config.get("model_type") in FAMILIES:
            shapes = read_shapes(config)
        else:
            from bp_train_cuda.model.load import measure_shapes

            shapes = measure_shapes(config)
        mode: str = settings.training.mode
        mode = choose_base(shapes.parameters, memory) if mode == "auto" else mode
        factor, runs = FitMemory(machine).calibration(mode)
        return replace(estimate(shapes, read_load(settings, mode), factor), measured_runs=runs)

    def train(self, spec: TrainSpec, emit: Emit, stop: Stop) -> TrainOutcome:
        """Train an adapter by ``spec.training.method``, with loss on the assistant's tokens only.

        Raises:
            DataError, DatasetGateError: The rows cannot be trained on; nothing has been loaded then.
            GpuNotAvailableError, RemoteCodeError, ModelLoadError, TargetModulesError: The model cannot be trained here.
            GpuOutOfMemoryError: Too little GPU memory.
            RanksError, RanksChangedError, RankLostError: Several processes cannot train this, or one of them is gone.
            TrainingDivergedError: The loss is no longer finite.
            TrainingFailedError: The framework raised.
        """
        from bp_train_cuda import start

        with start.importing(spec.base):
            from bp_train_cuda import check, engines  # noqa: F401  # which the engine imports, after the examples
            from bp_train_cuda.distributed import launch, process_group
            from bp_train_cuda.engines import native  # noqa: F401

        alone = contextlib.nullcontext(process_group.ProcessGroup())
        with alone if spec.ranks is None else launch.open_group(spec, stop) as group:
            return engines.train(spec, emit, stop, cache=self._cache, group=group)

    def follow(self, ranks: Ranks, stop: Stop) -> RunFolders | None:
        """Train along with rank 0, as `bp_runs.rail.TrainsTogether` says; rank 0 reports what goes wrong.

        Raises:
            RankLostError: The store where the ranks meet cannot be reached.
        """
        from bp_train_cuda import engines
        from bp_train_cuda.distributed import launch

        folders = None
        for spec, membership in launch.join_groups(ranks, stop):
            folders = spec.folders
            try:
                with membership as group:
                    engines.train(spec, group.record_warning, stop, cache=self._cache, group=group)
            except CodedError:
                if spec.ranks is not None and spec.ranks.sharded:
                    break  # only the end of this process frees ranks that wait for its share of a layer
        return folders

    def write_adapter(self, checkpoint: Checkpoint, record: RunRecord, folder: Path, *, best: bool = False) -> None:
        """Publish the adapter folder of a checkpoint, as `bp_data.loop.checkpoint_adapter.write_adapter`.

        Raises:
            CheckpointInvalidError: The checkpoint holds no such adapter.
        """
        from bp_data.loop import checkpoint_adapter

        checkpoint_adapter.write_adapter(checkpoint, record, folder, best=best)

    def write_witness(self, spec: TrainSpec, adapter: Path, emit: Emit) -> None:
        """Measure the base with ``adapter`` on the spec's rows, and put ``witness.json`` into its folder.

        Raises:
            CodedError: As `evaluate`.
        """
        from bp_train_cuda import evaluate

        evaluate.write_adapter_witness(spec, pick_rows(spec, "all"), adapter, emit, cache=self._cache)

    def release(self, ranks: Ranks) -> None:
        """Let the other ranks' `follow` come back."""
        from bp_train_cuda.distributed import launch

        launch.release(ranks)

    def evaluate(self, spec: TrainSpec, adapter: Path | None, emit: Emit, *, part: Part = "all") -> EvalOutcome:
        """Measure the base with ``adapter`` on the spec's rows as validation in training does; answer the prompts.

        Raises:
            NothingHeldOutError: Training with these settings would hold out none of the rows.
            AdapterInvalidError: The folder is no adapter, or not one for this base.
            CodedError: As `train`.
        """
        from bp_train_cuda import start

        with start.importing(spec.base):
            from bp_train_cuda import evaluate

        return evaluate.evaluate(spec, pick_rows(spec, part), adapter, emit, cache=self._cache)

    def load(self, spec: TrainSpec, adapter: Path | None) -> tuple[Any, Any]:
        """As `bp_runs.rail.LoadsModels.load`: a `transformers` model, or a `PeftModel`, in eval mode."""
        from bp_train_cuda.evaluate import load_for_inference

        return load_for_inference(spec, adapter)

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
        from bp_train_cuda import evaluate

        spec = replace(spec, training=replace(spec.training, method="sft"))
        rows = cast("Prepared[TokenRow]", pick_rows(spec, part))
        return evaluate.examine(
            spec, rows, adapter, emit, answers=answers, answer_tokens=answer_tokens, cache=self._cache
        )

    def replay_steps(self, spec: TrainSpec, record: RunRecord, steps: int) -> Replay:
        """Train the first steps of a recorded run again in an independent loop; see `bp_train_cuda.prove_loop`.

        Raises:
            ProofUnsupportedError: The run, its data or this machine can't be replayed.
            GpuOutOfMemoryError, TrainingFailedError: The replay broke.
        """
        from bp_train_cuda import prove

        return prove.replay_steps(spec, record, steps)

    def unpack_gguf(self, file: Path, folder: Path) -> None:
        """Write the de-quantized model of a GGUF, with config and tokenizer, into ``folder``."""
        from bp_train_cuda.model import load

        load.unpack_gguf(file, folder)

    def build_pico(self, base: Path, folder: Path) -> None:
        """Write a random model of two layers of the config in ``base``, with its tokenizer, into ``folder``."""
        from bp_train_cuda.model import pico

        pico.write_pico(base, folder)

    def check_packing(self, base: Path) -> None:
        """Prove on a small model of the config in ``base`` that packed examples give what they give alone."""
        from bp_train_cuda.backend import choose_device
        from bp_train_cuda.model import load, packing

        packing.check_packing(load.read_config(base, trust_remote_code=False), choose_device().kind)

    @contextlib.contextmanager
    def keep_base(self) -> Iterator[None]:
        """While the context lasts, the base that was loaded last stays in memory."""
        from bp_train_cuda.model.load import BaseCache

        before, self._cache = self._cache, BaseCache()
        try:
            yield
        finally:
            self._cache = before
