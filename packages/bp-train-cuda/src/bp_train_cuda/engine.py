"""One run from prepared rows to a saved adapter, on transformers, PEFT and TRL."""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from huggingface_hub import constants as hub_constants
from safetensors import SafetensorError
from transformers import TrainerCallback, set_seed
from transformers.utils import logging as transformers_logging

from bp_data import Prepared, TokenRows
from bp_runs.errors import CodedError, DiskFullError, TrainingDivergedError
from bp_runs.events import AdapterSaved, Emit, ModelLoaded, Notice, SampleAnswer
from bp_runs.files import require_free_space
from bp_runs.rail import Stop, TrainOutcome, mean_ends
from bp_runs.spec import TrainSpec
from bp_train_cuda import load, lora, probe
from bp_train_cuda.answers import answer
from bp_train_cuda.batches import pad_rows
from bp_train_cuda.errors import GpuOutOfMemoryError, TrainingFailedError
from bp_train_cuda.evaluation import Validator
from bp_train_cuda.guarded import Parts
from bp_train_cuda.guards.oom import StepSplitter
from bp_train_cuda.loop import StepReporter
from bp_train_cuda.methods import METHODS

_log = logging.getLogger("bp_train_cuda")
_SAVE_MARGIN = 64 * 2**20  # tokenizer, settings, metrics


def train(spec: TrainSpec, prepared: Prepared, heldout: TokenRows, emit: Emit, stop: Stop) -> TrainOutcome:
    """Load, train, answer the sample prompts, save.

    Args:
        prepared: The rows to train on.
        heldout: Rows to validate on; may be empty.

    Raises:
        CodedError: As `bp_train_cuda.rail.CudaRail.train`.
    """
    hub_constants.HF_HUB_DISABLE_TELEMETRY = True  # TRL reports each trainer; the variable is read at import only
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    with _logged_warnings(), _coded_framework_errors():
        return _train(spec, prepared, heldout, emit, stop)


def _train(spec: TrainSpec, prepared: Prepared, heldout: TokenRows, emit: Emit, stop: Stop) -> TrainOutcome:
    device = probe.choose_device()
    memory = probe.PeakMemory(device)
    mode, model = _load(spec, device, emit)
    _emit_answers(spec, prepared, model, emit, step=0)
    reporter = StepReporter(emit, stop, memory, spec.training.steps)
    # Guards and checkpoints join here; a callback is told of the loop's start, of every step and of the end.
    callbacks: list[TrainerCallback] = [reporter]
    parts = Parts(
        spec=spec,
        device=device,
        mode=mode,
        model=model,
        tokenizer=_trl_tokenizer(spec, prepared),
        splitter=StepSplitter(list(lora.trainable_weights(model).values()), emit, enabled=spec.training.oom_recovery),
        callbacks=callbacks,
    )
    trainer = METHODS["sft"].build(parts, prepared)
    reporter.count_tokens = lambda: trainer.tokens
    if len(heldout):
        reporter.validator = _build_validator(parts, trainer, heldout, emit)
    _run(trainer)
    if reporter.validator is not None:
        reporter.validator.restore_best(len(reporter.losses))
    _emit_answers(spec, prepared, model, emit, step=len(reporter.losses))
    _save(spec, prepared, model, emit)
    return _outcome(spec, reporter, memory)


def _load(spec: TrainSpec, device: probe.Device, emit: Emit) -> tuple[probe.Mode, Any]:
    """The mode, and the model with its adapter, after all that can be refused before weights are loaded."""
    trust = spec.model.trust_remote_code
    parameters = load.measure_model(spec.base, device, trust_remote_code=trust)
    mode = probe.choose_mode(spec.training.mode, parameters, device)
    base = load.load_model(spec.base, device, mode, dtype=spec.model.dtype, trust_remote_code=trust)
    set_seed(spec.training.seed)
    model = lora.add_lora(base, spec.lora)
    require_free_space(spec.folders.run, 4 * _count_trainable(model) + _SAVE_MARGIN, "the adapter")
    emit(_model_loaded(spec, model, parameters, mode, device))
    if device.kind == "cpu":
        emit(Notice(message=f"training on the CPU ({device.why}): fine for small models, slow for others"))
    return mode, model


def _build_validator(parts: Parts, trainer: Any, heldout: TokenRows, emit: Emit) -> Validator:
    return Validator(
        parts.model,
        heldout,
        parts.spec.training,
        emit,
        splitter=parts.splitter,
        loss_sum=trainer.loss_sum,
        collate=pad_rows(parts.pad_id),
    )


def _run(trainer: Any) -> None:
    """The loop, from its first step to its last. A rehearsal goes before it; saved state is put back before it."""
    trainer.train()


def _save(spec: TrainSpec, prepared: Prepared, model: Any, emit: Emit) -> None:
    _require_finite(model)
    template = None if prepared.template.name == "tokenizer" else prepared.template.text
    size = lora.save_adapter(model, spec, template)
    emit(AdapterSaved(path=str(spec.folders.adapter), bytes=size))


def _outcome(spec: TrainSpec, reporter: StepReporter, memory: probe.PeakMemory) -> TrainOutcome:
    first, final = mean_ends(reporter.losses)
    return TrainOutcome(
        adapter=spec.folders.adapter,
        steps=len(reporter.losses),
        first_loss=first,
        final_loss=final,
        tokens=reporter.tokens,
        seconds=reporter.seconds,
        peak_memory=memory.read(),
        stopped=reporter.stopped,
        eval_loss=reporter.validator.best_loss if reporter.validator else None,
        best_step=reporter.validator.best_step if reporter.validator else None,
    )


def _require_finite(model: Any) -> None:
    """A loss is computed before the step that may break the weights, so the last step is checked here."""
    for name, weight in lora.trainable_weights(model).items():
        if not torch.isfinite(weight).all():
            raise TrainingDivergedError(f"{name} holds values that are not finite")


def _emit_answers(spec: TrainSpec, prepared: Prepared, model: Any, emit: Emit, *, step: int) -> None:
    for prompt in spec.training.sample_prompts:
        text = answer(
            model,
            prepared.tokenizer,
            prepared.template,
            prompt,
            max_tokens=spec.training.sample_tokens,
            ends=prepared.facts.stop_ids,
        )
        emit(SampleAnswer(step=step, prompt=prompt, answer=text))


def _trl_tokenizer(spec: TrainSpec, prepared: Prepared) -> Any:
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
