"""One training run on mlx: builds what `bp_data.loop.loop.run_loop` needs, runs it, and saves what comes out."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx

from bp_data.loop.checkpoint_adapter import copied_bytes
from bp_data.loop.examples import build_examples
from bp_data.loop.loop import LoopParts, LoopState, run_loop
from bp_data.loop.memory import MemoryGuard
from bp_data.loop.preflight import is_due
from bp_data.loop.protocols import NoMonitor, OneProcess
from bp_data.loop.rows import pad_token, plan_rows
from bp_data.loop.run import build_loop, choosing_weights, summarize_run
from bp_data.loop.sampler import ExampleOrder, StepSampler
from bp_data.preparation import AnyPrepared
from bp_runs.errors import (
    CodedError,
    GpuOutOfMemoryError,
    OomExhaustedError,
    TrainingDivergedError,
    TrainingFailedError,
    first_line,
)
from bp_runs.events import AdapterSaved, Emit, ModelLoaded, Notice
from bp_runs.files import require_free_space
from bp_runs.rail import Stop, TrainOutcome
from bp_runs.spec import TrainSpec
from bp_runs.witness import Witness
from bp_train_mlx import backend, check
from bp_train_mlx.checkpoint import Checkpointer
from bp_train_mlx.framework import MlxFramework, Trained
from bp_train_mlx.generate import answer_prompts
from bp_train_mlx.model import load, lora
from bp_train_mlx.model.base_cache import BaseCache
from bp_train_mlx.model.full import AllWeights, checkpoint_layers, open_weights, plain_layers
from bp_train_mlx.model.log_probs import LogProbModel
from bp_train_mlx.model.packing import require_packable
from bp_train_mlx.model.save import save_adapter, save_model
from bp_train_mlx.optim import AdamW
from bp_train_mlx.preflight import run_preflight
from bp_train_mlx.witness import measure_witness

_SMALL_FILES = 2**20  # bytes for settings and metrics


@dataclass(frozen=True, slots=True)
class Loaded:
    """A base model in memory."""

    checked: check.Checked
    model: Any
    dtype: Any


@contextlib.contextmanager
def open_base(spec: TrainSpec, cache: BaseCache | None, adapter: Path | None) -> Iterator[Loaded]:
    """The base model without an adapter, after everything that can be rejected before weights are loaded.

    Args:
        spec: Names the base and how it is held.
        cache: Keeps the base for the next call; None: it is not kept.
        adapter: An adapter that will continue the base.

    Raises:
        CodedError: As `bp_train_mlx.check.check_model` and `bp_train_mlx.model.load.load_model`.
    """
    checked, trust = check.check_model(spec, spec.base, adapter), spec.model.trust_remote_code
    dtype = backend.choose_dtype(spec.model.dtype, checked.device)
    key = (spec.base.resolve(), spec.base_commit, checked.mode.name, str(dtype), trust)
    make = partial(load.load_model, spec.base, checked.config, checked.mode, dtype, trust_remote_code=trust)
    with (
        coded_framework_errors(),
        backend.process_settings(checked.device),
        (BaseCache() if cache is None or checked.mode.name == "full" else cache).borrow(key, make) as model,
    ):
        yield Loaded(checked, model, dtype)


def train(spec: TrainSpec, emit: Emit, stop: Stop, *, cache: BaseCache | None = None) -> TrainOutcome:
    """Prepare the examples, load, train, save and answer the sample prompts.

    Raises:
        CodedError: As `bp_train_mlx.rail.MlxRail.train`.
    """
    check.require_not_ranked(spec)
    spec, rows = plan_rows(spec, emit, OneProcess(), partial(check.require_rows_fit, spec))
    with open_base(spec, cache, spec.initial_adapter) as loaded:
        outcome = MlxRun(spec, rows.train, rows.validation, emit, stop, loaded).train()
    return replace(outcome, rows=rows.count_after(outcome.steps))


@dataclass(frozen=True, slots=True)
class MlxRun:
    """One training run, from a base model in memory to a saved adapter; `train` runs it."""

    spec: TrainSpec
    prepared: AnyPrepared
    heldout: Sequence[Any]
    emit: Emit
    stop: Stop
    loaded: Loaded

    def train(self) -> TrainOutcome:
        """Build what the loop needs, run it, save what comes out."""
        trained = self._open_trained()
        model = self.loaded.model
        if self.spec.training.gradient_checkpointing and self.loaded.checked.device.is_gpu:
            checkpoint_layers(model)
        try:
            parts, state = self._build(trained)
            save = partial(self._save, trained, parts.guard)
            with choosing_weights(parts, state, save, self.spec.folders.run_id):
                run_loop(parts, state)
            folder = save()  # before anything that may still fail
            parts.sample(state.step)
            return summarize_run(parts, state, folder, parts.framework.peak_memory())
        finally:
            plain_layers(model)
            if isinstance(trained, lora.Adapter):
                trained.remove()

    def _open_trained(self) -> lora.Adapter | AllWeights:
        """A new adapter, which may start from a saved one, or the full model."""
        spec, checked, model = self.spec, self.loaded.checked, self.loaded.model
        trained: lora.Adapter | AllWeights
        if checked.mode.name == "full":
            trained = open_weights(model, spec.base)
        else:
            targets = lora.choose_targets(model, spec.base, checked.config, spec.lora.target_modules)
            trained = lora.add_lora(model, targets, spec.lora, spec.training.seed)
            if spec.initial_adapter is not None:
                lora.set_weights(trained, spec.initial_adapter, spec.lora)
        weights = trained.weights().values()
        size, beside = sum(weight.nbytes for weight in weights), copied_bytes(spec.base)
        what = "the model" if checked.mode.name == "full" else "the adapter"
        what = f"{what} ({size / 2**20:,.1f} MiB) and its tokenizer ({beside / 2**20:,.1f} MiB)"
        require_free_space(spec.folders.run, size + beside + _SMALL_FILES, what)
        self.emit(
            ModelLoaded(
                name=spec.model.name,
                revision=spec.base_commit,
                config_sha256=load.config_digest(spec.base),
                parameters=checked.parameters,
                trainable=sum(weight.size for weight in weights),
                mode=checked.mode.label,
                dtype=str(self.loaded.dtype).removeprefix("mlx.core."),
                device=checked.device.label,
            )
        )
        for warning in checked.warnings:
            self.emit(Notice(message=warning, level="warning"))
        if not checked.device.is_gpu:
            why = f"training on the CPU ({checked.device.why}): fine for small models, slow for others"
            self.emit(Notice(message=why))
        return trained

    def _build(self, trained: Trained) -> tuple[LoopParts, LoopState]:
        """The loop at its first step, or where its checkpoint was."""
        spec, training, model = self.spec, self.spec.training, self.loaded.model
        if training.packing:
            kind = str(self.loaded.checked.config.get("model_type"))
            require_packable(model, self.prepared.facts.vocab_size, kind)
        sample = partial(self._answer, model)
        if spec.checkpoint is None:
            sample(0)
        framework = build_framework(spec, self.prepared, self.heldout, self.loaded, trained, emit=self.emit)
        framework.optimizer = AdamW(model, training.weight_decay, training.seed)
        model.train()
        has_dropout = bool(trained.dropouts)
        guard = MemoryGuard(framework, self.emit, enabled=training.oom_recovery, has_dropout=has_dropout)
        order = ExampleOrder(framework.examples.count, training.seed, shuffled=training.curriculum == "none")
        sampler = StepSampler(order, training.batch_size, training.gradient_accumulation)
        parts, state, saver = build_loop(
            framework,
            spec,
            guard,
            sampler,
            lambda state, validator: Checkpointer(spec, self.emit, framework, state, validator, guard),
            monitor=NoMonitor(),
            group=OneProcess(),
            emit=self.emit,
            stop=self.stop,
            sample=sample,
        )
        self._start(parts, framework)
        saver.restore()
        return parts, state

    def _start(self, parts: LoopParts, framework: MlxFramework) -> None:
        """Measure the reference of methods that have one, and run the preflight."""
        framework.measure_references(parts.sampler, parts.steps, self.emit)
        if is_due(self.spec, on_gpu=self.loaded.checked.device.is_gpu):
            run_preflight(self.spec, parts, framework, self.loaded.checked.device)

    def _answer(self, model: Any, step: int) -> None:
        answer_prompts(self.spec, self.prepared, model, self.emit, step=step)

    def _save(self, trained: lora.Adapter | AllWeights, guard: MemoryGuard) -> Path:
        """Publish what was trained.

        Raises:
            TrainingDivergedError: A weight is not finite: a loss is computed before the step that may break weights.
        """
        spec, template = self.spec, self.prepared.template
        for name, weight in trained.weights().items():
            if not bool(mx.isfinite(weight).all()):
                raise TrainingDivergedError(f"{name} holds values that are not finite")
        witness = self._measure_witness(trained, guard)
        if isinstance(trained, AllWeights):
            folder, write = spec.folders.model, partial(save_model, trained.weights(), spec, template, witness=witness)
        else:
            folder, write = spec.folders.adapter, partial(save_adapter, trained, spec, template, witness=witness)
        size = guard.retry(write, "the save")
        self.emit(AdapterSaved(path=str(folder), bytes=size))
        return folder

    def _measure_witness(self, trained: lora.Adapter | AllWeights, guard: MemoryGuard) -> Witness | None:
        """What the trained model says; without memory for it, the run ends without a witness."""
        loaded = self.loaded
        measure = partial(
            measure_witness, self.spec, self.heldout, self.prepared.rows, loaded.model, trained, checked=loaded.checked,
            dtype=loaded.dtype,
        )  # fmt: skip
        try:
            return guard.retry(measure, "the witness")
        except OomExhaustedError as error:
            message = "exports have no witness: too little GPU memory"
            self.emit(Notice(message=message, details={"reason": error.cause}))
            return None


def build_framework(
    spec: TrainSpec, prepared: AnyPrepared, heldout: Sequence[Any], loaded: Loaded, trained: Trained, *, emit: Emit
) -> MlxFramework:
    """The framework over a run's examples, without an optimizer."""
    training, device = spec.training, loaded.checked.device
    build = partial(
        build_examples, training.method, pad_id=pad_token(prepared), room=prepared.max_seq_length, seed=training.seed
    )
    return MlxFramework(
        model=LogProbModel(loaded.model),
        trained=trained,
        examples=build(rows=prepared.rows, packing=training.packing),
        heldout=build(rows=heldout) if len(heldout) else None,
        training=training,
        reader=MemoryGuard(backend.MlxMemory(), emit, enabled=training.oom_recovery),
        peak=backend.PeakMemory(),
        limit=backend.memory_limit(device),
    )


@contextlib.contextmanager
def coded_framework_errors() -> Iterator[None]:
    """Give mlx's own errors a code; ours keep their own."""
    try:
        yield
    except CodedError:
        raise
    except (RuntimeError, ValueError, TypeError, KeyError, AttributeError, IndexError, OSError) as error:
        if backend.MlxMemory().is_out_of_memory(error):
            raise GpuOutOfMemoryError("mlx ran out of memory", cause=first_line(error)) from error
        raise TrainingFailedError(f"{type(error).__name__}: {error}") from error
