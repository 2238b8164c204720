"""One run from prepared rows to a saved adapter, on transformers, PEFT and TRL."""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import constants as hub_constants
from safetensors import SafetensorError
from transformers import TrainerCallback, enable_full_determinism, set_seed
from transformers.utils import logging as transformers_logging

from bp_data import Prepared
from bp_data.asked import AnyPrepared
from bp_runs.errors import CodedError, DiskFullError, TrainingDivergedError
from bp_runs.events import AdapterSaved, Emit, ModelLoaded, Notice, SampleAnswer
from bp_runs.files import require_free_space
from bp_runs.rail import EvalOutcome, RowOutcome, Stop, TrainOutcome
from bp_runs.spec import LoraSpec, TrainingSpec, TrainSpec
from bp_train_cuda import check, full, load, lora, probe, unsloth
from bp_train_cuda.answers import answer
from bp_train_cuda.checkpoint import Checkpointer
from bp_train_cuda.distributed.process_group import ProcessGroup
from bp_train_cuda.distributed.sharding import gather_weights, local_weights, shard_model
from bp_train_cuda.errors import GpuOutOfMemoryError, OomExhaustedError, TrainingFailedError
from bp_train_cuda.evaluation import Validator
from bp_train_cuda.fp8 import use_fp8
from bp_train_cuda.guarded import Parts
from bp_train_cuda.guards.fit import CardFit
from bp_train_cuda.guards.oom import StepSplitter, try_again
from bp_train_cuda.guards.optimizer import release_model
from bp_train_cuda.kept import KeptBase, take_off_adapter
from bp_train_cuda.kernels import apply_kernels
from bp_train_cuda.loop import StepReporter
from bp_train_cuda.methods import METHODS
from bp_train_cuda.rehearsal import Rehearsal
from bp_train_cuda.rowwise import examine_rows
from bp_train_cuda.watch import open_watch

_log = logging.getLogger("bp_train_cuda")
_SAVE_MARGIN = 64 * 2**20  # tokenizer, settings, metrics


def train(
    spec: TrainSpec,
    prepared: AnyPrepared,
    heldout: Sequence[Any],
    emit: Emit,
    stop: Stop,
    *,
    kept: KeptBase | None = None,
    team: ProcessGroup,
) -> TrainOutcome:
    """Load, train, save, answer the sample prompts; of several ranks the first saves and answers.

    Args:
        prepared: The rows to train on.
        heldout: Rows to validate on; may be empty.
        kept: Where the base stays for the next call; None: nowhere.
        team: The ranks that train together.

    Raises:
        CodedError: As `bp_train_cuda.rail.CudaRail.train`.
    """
    with _quiet_framework(), _determinism(spec.training), _base(spec, kept, spec.initial_adapter) as loaded:
        return _train(spec, prepared, heldout, emit, stop, loaded=loaded, team=team)


def evaluate(
    spec: TrainSpec, prepared: AnyPrepared, adapter: Path | None, emit: Emit, *, kept: KeptBase | None = None
) -> EvalOutcome:
    """Load, measure the loss on all of ``prepared``, answer the sample prompts.

    Args:
        adapter: An adapter folder, or None for the base alone.
        kept: As for `train`.

    Raises:
        CodedError: As `bp_train_cuda.rail.CudaRail.evaluate`.
    """
    with _quiet_framework(), _base(_as_read(spec), kept, adapter) as loaded:
        set_seed(spec.training.seed)
        model = lora.add_lora(loaded.base, LoraSpec(r=1)) if adapter is None else lora.load_lora(loaded.base, adapter)
        parts, trainer = _build_trainer(spec, prepared, model, loaded, emit)
        with model.disable_adapter():  # what the base says is what answers are measured against
            validator = _build_validator(parts, trainer, prepared.rows, emit)
        loss, tokens, _ = validator.measure()
        _emit_answers(spec, prepared, model, emit, step=0)
        take_off_adapter(model)
        return EvalOutcome(loss=loss, tokens=tokens, rows=len(prepared.rows))


def examine(
    spec: TrainSpec,
    prepared: Prepared,
    adapter: Path | None,
    emit: Emit,
    *,
    answers: int,
    answer_tokens: int,
    kept: KeptBase | None = None,
) -> list[RowOutcome]:
    """Load, measure and answer row by row; for the method sft.

    Args:
        adapter: As for `evaluate`.
        answers: As for `bp_train_cuda.rail.CudaRail.examine`.
        answer_tokens: As for `bp_train_cuda.rail.CudaRail.examine`.
        kept: As for `train`.

    Raises:
        CodedError: As `evaluate`.
    """
    with _quiet_framework(), _base(_as_read(spec), kept, adapter) as loaded:
        set_seed(spec.training.seed)
        model = lora.add_lora(loaded.base, LoraSpec(r=1)) if adapter is None else lora.load_lora(loaded.base, adapter)
        _, trainer = _build_trainer(spec, prepared, model, loaded, emit)
        outcomes = examine_rows(
            model,
            prepared,
            measure=trainer.measure,
            collate=trainer.collate,
            answers=answers,
            answer_tokens=answer_tokens,
        )
        take_off_adapter(model)
        return outcomes


def _as_read(spec: TrainSpec) -> TrainSpec:
    """The spec with a mode and an engine by which a base is only read."""
    mode = "lora" if spec.training.mode == "full" else spec.training.mode
    return replace(spec, training=replace(spec.training, mode=mode, engine="native", fp8=False))


@dataclass(frozen=True, slots=True)
class _Loaded:
    """A base in memory, and how it came there."""

    device: probe.Device
    mode: probe.Mode
    parameters: int
    base: Any
    kernels: str
    """Which fused kernels are in it, or why none."""


@contextlib.contextmanager
def _base(spec: TrainSpec, kept: KeptBase | None, adapter: Path | None) -> Iterator[_Loaded]:
    """The base without an adapter, after all that can be refused before weights are loaded."""
    checked, trust = check.check_model(spec, spec.base, adapter), spec.model.trust_remote_code
    device, mode = checked.device, checked.mode
    changes_base = mode.name == "full" or spec.training.fp8 or spec.lora.init_lora_weights != "default"
    is_sharded = spec.ranks is not None and spec.ranks.sharded
    changes_base = changes_base or is_sharded
    key = (spec.base.resolve(), spec.base_commit, mode.name, spec.model.dtype, trust, spec.training.kernels)
    load_base = partial(load.load_model, spec.base, device, mode, dtype=spec.model.dtype, trust_remote_code=trust)
    if is_sharded:  # a card may have room for its share alone
        load_base = partial(load_base, place="cpu")
    if spec.training.engine == "unsloth":
        load_base, changes_base = partial(unsloth.load_model, spec, device, mode), True
    with (KeptBase() if kept is None or changes_base else kept).borrow(key, load_base) as base:
        if spec.training.fp8:
            use_fp8(base)
        try:
            yield _Loaded(device, mode, checked.parameters, base, apply_kernels(base, spec.training.kernels, device))
        finally:
            release_model(base)


def _train(
    spec: TrainSpec,
    prepared: AnyPrepared,
    heldout: Sequence[Any],
    emit: Emit,
    stop: Stop,
    *,
    loaded: _Loaded,
    team: ProcessGroup,
) -> TrainOutcome:
    memory = probe.PeakMemory(loaded.device)
    model = _open_model(spec, loaded, emit, team)
    answers = team.rank == 0 or team.is_sharded  # parted weights answer on all ranks together
    tell_answers = partial(_emit_answers, spec, prepared, model, emit) if answers else _tell_nothing
    if spec.checkpoint is None:
        tell_answers(step=0)
    reporter = StepReporter(emit, stop, memory, spec.training.steps, team)
    fit = CardFit(spec, loaded.mode.name, loaded.device, emit)
    rehearsal = Rehearsal(spec, loaded.device, emit, trainer=lambda: trainer, validator=lambda: reporter.validator)
    # Guards join here; a callback is told of the loop's start, of every step and of the end.
    callbacks = [rehearsal, reporter]
    parts, trainer = _build_trainer(
        spec, prepared, model, loaded, emit, callbacks=callbacks, halvings=fit.recall_halvings(), team=team
    )
    reporter.count_tokens, reporter.take_metrics = lambda: trainer.tokens, trainer.take_metrics
    reporter.watch = open_watch(spec.training, loaded.device, emit, stop)
    trainer.look = reporter.watch.look
    reporter.tell_answers = lambda step: tell_answers(step=step)
    if len(heldout):
        reporter.validator = _build_validator(parts, trainer, heldout, emit)
        reporter.validator.look = reporter.watch.look
    trainer.checkpointer = Checkpointer(
        spec,
        emit,
        model,
        {"trainer": trainer, "reporter": reporter, "splitter": parts.splitter, "reader": trainer.reader},
        validation=reporter.validator,
        is_stopping=lambda: reporter.stopped,
        team=team,
    )
    save_hot = partial(trainer.checkpointer.save_now, trainer, "temperature")
    if team.count == 1:
        reporter.watch.save_before_end(save_hot)
    else:
        reporter.save_hot = save_hot
        set_seed(spec.training.seed + team.rank)  # dropout differs from rank to rank
    _run(trainer, spec.checkpoint, emit)
    reporter.validate_stopped()
    if reporter.validator is not None:
        reporter.validator.restore_best(reporter.losses.count)
    folder = _save(spec, prepared, model, loaded.mode, emit, team=team)  # before all that may still fail
    if team.rank == 0 and not team.is_sharded:
        fit.remember(parts.splitter.halvings, memory.read())
    tell_answers(step=reporter.losses.count)
    peaks = team.all_gather(memory.read())
    if team.count > 1:
        told = ", ".join(f"{peak / 2**30:.1f}" for peak in peaks)
        emit(Notice(message=f"the most memory of each process: {told} GiB", details={"peaks": peaks}))
    if loaded.mode.name != "full" and not team.is_sharded:
        take_off_adapter(model)
    return _outcome(folder, reporter, max(peaks))


def _tell_nothing(*, step: int) -> None:
    """For ranks that do not speak to the user."""


def _open_model(spec: TrainSpec, loaded: _Loaded, emit: Emit, team: ProcessGroup) -> Any:
    """What is trained: all weights, or the base's adapter: a new one, or the one that the spec starts from."""
    set_seed(spec.training.seed)
    if loaded.mode.name == "full":
        model = full.open_weights(loaded.base)
    else:
        if spec.training.engine == "unsloth":
            model = unsloth.add_lora(loaded.base, spec.lora, seed=spec.training.seed)
        else:
            model = lora.add_lora(loaded.base, spec.lora, spec.base)
        if spec.initial_adapter is not None:
            lora.set_weights(model, spec.initial_adapter, spec.lora)
        weights = lora.trainable_weights(model).values()
        for weight in weights:
            weight.data = weight.data.to(loaded.device.kind)  # the base may not be there yet
        # Drawn from the same seed; cards of two kinds may draw, or decompose, in other bits.
        team.broadcast_weights([weight.data for weight in weights])
        if team.rank == 0:
            lora.note_start(model, spec)
    size = sum(weight.nbytes for weight in lora.trainable_weights(model).values())
    what = "the model" if loaded.mode.name == "full" else "the adapter"
    require_free_space(spec.folders.run, size + _SAVE_MARGIN, what)
    emit(_model_loaded(spec, model, loaded.parameters, loaded.mode, loaded.device))
    if loaded.device.kind == "cpu":
        emit(Notice(message=f"training on the CPU ({loaded.device.why}): fine for small models, slow for others"))
    else:
        emit(Notice(message=loaded.kernels))
    if team.is_sharded:
        shard_model(model, loaded.base, loaded.device.kind)
    return model


def _build_trainer(
    spec: TrainSpec,
    prepared: AnyPrepared,
    model: Any,
    loaded: _Loaded,
    emit: Emit,
    *,
    callbacks: Sequence[TrainerCallback] = (),
    halvings: int = 0,
    team: ProcessGroup | None = None,
) -> tuple[Parts, Any]:
    weights = list(lora.trainable_weights(model).values())
    parts = Parts(
        spec=spec,
        device=loaded.device,
        mode=loaded.mode,
        model=model,
        tokenizer=_trl_tokenizer(spec, prepared),
        splitter=StepSplitter(weights, emit, enabled=spec.training.oom_recovery, halvings=halvings),
        callbacks=callbacks,
        team=team or ProcessGroup(),
    )
    return parts, METHODS[spec.training.method].build(parts, prepared)


def _build_validator(parts: Parts, trainer: Any, heldout: Sequence[Any], emit: Emit) -> Validator:
    return Validator(
        parts.model,
        trainer.heldout_set(heldout),
        parts.spec.training,
        emit,
        measure=trainer.measure,
        collate=trainer.collate,
        team=parts.team,
    )


def _run(trainer: Any, checkpoint: Path | None, emit: Emit) -> None:
    """The loop, from its first step or the checkpoint's to its last. A rehearsal goes before it."""
    if count := trainer.rows_to_meet():
        emit(Notice(message=f"asking the untrained model about {count} rows first"))
    trainer.meet_rows()
    trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))


def _save(
    spec: TrainSpec, prepared: AnyPrepared, model: Any, mode: probe.Mode, emit: Emit, *, team: ProcessGroup
) -> Path:
    """Publish what was trained, on rank 0; returns its folder."""
    if error := team.try_all(partial(_require_finite, model)):
        raise error
    template = None if prepared.template.name == "tokenizer" else prepared.template.text
    is_full = mode.name == "full"
    write: Callable[..., int] = full.save_model if is_full else lora.save_adapter
    folder = spec.folders.model if is_full else spec.folders.adapter
    if is_full and team.is_sharded:
        write = partial(write, weights=gather_weights(model, _dtype_of(spec)))
    if team.rank:
        return folder
    size = try_again(lambda: write(model, spec, template), "the save", emit, enabled=spec.training.oom_recovery)
    emit(AdapterSaved(path=str(folder), bytes=size))
    return folder


def _outcome(folder: Path, reporter: StepReporter, peak: int) -> TrainOutcome:
    first, final = reporter.losses.means()
    return TrainOutcome(
        adapter=folder,
        steps=reporter.losses.count,
        first_loss=first,
        final_loss=final,
        tokens=reporter.tokens,
        seconds=reporter.seconds,
        peak_memory=peak,
        stopped=reporter.stopped,
        eval_loss=reporter.validator.best_loss if reporter.validator else None,
        best_step=reporter.validator.best_step if reporter.validator else None,
    )


def _dtype_of(spec: TrainSpec) -> torch.dtype:
    """What parted weights were before they became float32."""
    return probe.choose_dtype(spec.model.dtype, probe.choose_device())


def _require_finite(model: Any) -> None:
    """A loss is computed before the step that may break the weights, so the last step is checked here."""
    for name, weight in local_weights(model).items():
        if not torch.isfinite(weight).all():
            raise TrainingDivergedError(f"{name} holds values that are not finite")


def _emit_answers(spec: TrainSpec, prepared: AnyPrepared, model: Any, emit: Emit, *, step: int) -> None:
    """The answers to the sample prompts; where there is no memory for them, the run goes on without."""
    ask = partial(
        answer,
        model,
        prepared.tokenizer,
        prepared.template,
        max_tokens=spec.training.sample_tokens,
        ends=prepared.facts.stop_ids,
    )
    for prompt in spec.training.sample_prompts:
        try:
            text = try_again(partial(ask, prompt), "a sample answer", emit, enabled=spec.training.oom_recovery)
        except OomExhaustedError as error:
            emit(Notice(message="no sample answers: too little GPU memory", details={"reason": error.cause}))
            return
        emit(SampleAnswer(step=step, prompt=prompt, answer=text))


def _trl_tokenizer(spec: TrainSpec, prepared: AnyPrepared) -> Any:
    """TRL asks its tokenizer for the padding token only; a model without one pads with what ends a turn."""
    pad = prepared.facts.pad_id if prepared.facts.pad_id is not None else prepared.facts.stop_ids[0]
    end = prepared.facts.eos_id if prepared.facts.eos_id is not None else pad
    texts = prepared.tokenizer.token_text
    return load.build_tokenizer(spec.base, pad=texts(pad), eos=texts(end))


def _model_loaded(spec: TrainSpec, model: Any, parameters: int, mode: probe.Mode, device: probe.Device) -> ModelLoaded:
    return ModelLoaded(
        name=spec.model.name,
        revision=spec.base_commit,
        config_sha256=load.config_digest(spec.base),
        parameters=parameters,
        trainable=_count_trainable(model),
        mode=mode.label,
        dtype=str(model.dtype).removeprefix("torch."),
        device=device.label,
    )


def _count_trainable(model: Any) -> int:
    return sum(weight.numel() for weight in lora.trainable_weights(model).values())


@contextlib.contextmanager
def _determinism(spec: TrainingSpec) -> Iterator[None]:
    """While the context lasts, torch refuses whatever may give other bits the next time, where the spec wants that."""
    if not spec.deterministic:
        yield
        return
    before = (torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.benchmark)
    enable_full_determinism(spec.seed)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0])
        torch.backends.cudnn.benchmark = before[1]


@contextlib.contextmanager
def _quiet_framework() -> Iterator[None]:
    """No usage reports, no bars; warnings to our log; errors with a code."""
    hub_constants.HF_HUB_DISABLE_TELEMETRY = True  # TRL reports each trainer; the variable is read at import only
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    with _logged_warnings(), _coded_framework_errors():
        yield


@contextlib.contextmanager
def _logged_warnings() -> Iterator[None]:
    """Frameworks' warnings go to our log, whatever the process does with warnings elsewhere."""

    def show(message: Warning | str, category: type[Warning], filename: str, lineno: int, *_: Any, **__: Any) -> None:
        _log.info("%s at %s:%d: %s", category.__name__, filename, lineno, message)

    with warnings.catch_warnings():
        warnings.simplefilter("default")
        warnings.showwarning = show
        yield


@contextlib.contextmanager
def _coded_framework_errors() -> Iterator[None]:
    """Give the framework's own errors a code; ours and a lack of memory keep their own."""
    try:
        yield
    except CodedError:
        raise
    except torch.OutOfMemoryError as error:
        raise GpuOutOfMemoryError("the GPU ran out of memory", cause=str(error).split(". ")[0]) from error
    except SafetensorError as error:
        if "os error 28" in str(error):  # ENOSPC, told in Rust's words
            raise DiskFullError("no room left while writing the adapter", cause=str(error)) from error
        raise TrainingFailedError(f"the adapter could not be written: {error}") from error
    except (RuntimeError, ValueError, TypeError, KeyError, AttributeError, IndexError, OSError) as error:
        raise TrainingFailedError(f"{type(error).__name__}: {error}") from error
