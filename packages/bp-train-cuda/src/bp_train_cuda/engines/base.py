"""What every engine shares: the base model in memory, what is trained on it, and the folder that comes out."""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import constants as hub_constants
from safetensors import SafetensorError
from transformers import set_seed
from transformers.utils import logging as transformers_logging

from bp_data.loop.checkpoint_adapter import copied_bytes
from bp_data.loop.memory import MemoryGuard
from bp_data.preparation import AnyPrepared
from bp_runs.errors import (
    CodedError,
    DiskFullError,
    GpuOutOfMemoryError,
    InvalidSettingError,
    OomExhaustedError,
    TrainingDivergedError,
    TrainingFailedError,
    first_line,
)
from bp_runs.events import AdapterSaved, Emit, ModelLoaded, Notice, SampleAnswer
from bp_runs.files import require_free_space
from bp_runs.spec import TrainingSpec, TrainSpec
from bp_runs.witness import Witness
from bp_train_cuda import backend, check, witness
from bp_train_cuda.backend import TorchMemory
from bp_train_cuda.distributed.process_group import ProcessGroup
from bp_train_cuda.engines import unsloth
from bp_train_cuda.generate import answer
from bp_train_cuda.memory.estimate import is_narrow
from bp_train_cuda.model import full, load, lora
from bp_train_cuda.model.kernels import apply_kernels, use_fp8
from bp_train_cuda.model.load import BaseCache
from bp_train_cuda.model.lora_linear import restore_lora
from bp_train_cuda.optim import choose_optimizer

_log = logging.getLogger("bp_train_cuda")
_SMALL_FILES = 2**20  # bytes for settings and metrics


@dataclass(frozen=True, slots=True)
class Loaded:
    """A base model in memory."""

    device: backend.Device
    mode: backend.Mode
    parameters: int
    base: Any
    kernels: str
    """Which fused kernels are in it, or why none."""
    warnings: tuple[str, ...] = ()
    """As `bp_train_cuda.check.Checked.warnings`."""

    @property
    def autocast(self) -> torch.dtype | None:
        """The dtype of products where weights and adapter differ in theirs: bfloat16 models on a GPU."""
        return torch.bfloat16 if self.device.kind == "cuda" and self.base.dtype == torch.bfloat16 else None


@contextlib.contextmanager
def open_base(spec: TrainSpec, cache: BaseCache | None, adapter: Path | None) -> Iterator[Loaded]:
    """The base model without an adapter, after everything that can be rejected before weights are loaded.

    Args:
        cache: Keeps the base for the next call; None: it is not kept.
        adapter: An adapter that will continue the base; its shapes are checked.

    Raises:
        CodedError: As `bp_train_cuda.check.check_model` and `bp_train_cuda.model.load.load_model`.
    """
    checked, trust = check.check_model(spec, spec.base, adapter), spec.model.trust_remote_code
    device, mode = checked.device, checked.mode
    is_sharded = spec.ranks is not None and spec.ranks.sharded
    changes_base = mode.name == "full" or spec.training.fp8 or spec.lora.init_lora_weights != "default" or is_sharded
    changes_base = changes_base or spec.training.engine in ("trl", "unsloth")
    key = (spec.base.resolve(), spec.base_commit, mode.name, spec.model.dtype, trust, spec.training.kernels)
    load_base = partial(load.load_model, spec.base, device, mode, dtype=spec.model.dtype, trust_remote_code=trust)
    if is_sharded:  # a GPU may have room for its shard alone
        load_base = partial(load_base, place="cpu")
    if spec.training.engine == "unsloth":
        load_base = partial(unsloth.load_model, spec, device, mode)
    with (BaseCache() if cache is None or changes_base else cache).borrow(key, load_base) as base:
        if spec.training.fp8:
            use_fp8(base)
        own_kernels = spec.training.engine == "unsloth"
        kernels = "Unsloth's kernels" if own_kernels else apply_kernels(base, spec.training.kernels, device)
        yield Loaded(device, mode, checked.parameters, base, kernels, checked.warnings)


def open_model(spec: TrainSpec, loaded: Loaded, emit: Emit, group: ProcessGroup) -> Any:
    """What is trained: the full model, or a new adapter, which may start from a saved one.

    Adapters are float32 whatever the base's dtype, since 16 bits would lose small updates; of high rank bfloat16 where
    the optimizer rounds stochastically.
    """
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
        optimizer = choose_optimizer(spec.training, loaded.mode, loaded.device, is_sharded=group.is_sharded)
        narrow = loaded.base.dtype == torch.bfloat16 and is_narrow(spec, optimizer)
        for weight in weights:  # the base may still be on the CPU
            weight.data = weight.data.to(loaded.device.kind, torch.bfloat16 if narrow else torch.float32)
        # Drawn from the same seed; GPUs of two kinds may draw, or decompose, in other bits.
        group.broadcast_weights([weight.data for weight in weights])
        if group.rank == 0:
            lora.note_start(model, spec)
    if spec.training.gradient_checkpointing and loaded.device.kind == "cuda" and spec.training.engine != "unsloth":
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    _require_room(spec, model, loaded.mode)
    emit(_model_loaded(spec, model, loaded))
    for warning in loaded.warnings:
        emit(Notice(message=warning, level="warning"))
    if loaded.device.kind == "cpu":
        emit(Notice(message=f"training on the CPU ({loaded.device.why}): fine for small models, slow for others"))
    else:
        emit(Notice(message=loaded.kernels))
    return model


def _require_room(spec: TrainSpec, model: Any, mode: backend.Mode) -> None:
    """Check for disk space before training, so that hours of work can be saved."""
    size = sum(weight.nbytes for weight in lora.trainable_weights(model).values())
    besides = copied_bytes(spec.base)
    what = "the model" if mode.name == "full" else "the adapter"
    what = f"{what} ({size / 2**20:,.1f} MiB) and its tokenizer ({besides / 2**20:,.1f} MiB)"
    require_free_space(spec.folders.run, size + besides + _SMALL_FILES, what)


def close_model(model: Any, mode: backend.Mode) -> None:
    """Give the base its own layers back, so that the next run can use it."""
    if mode.name != "full":
        restore_lora(model)
        lora.remove_adapter(model)


def save_result(
    spec: TrainSpec,
    prepared: AnyPrepared,
    model: Any,
    loaded: Loaded,
    emit: Emit,
    *,
    heldout: Sequence[Any],
    guard: MemoryGuard,
    group: ProcessGroup,
    weights: Callable[[], dict[str, torch.Tensor]] | None = None,
) -> Path:
    """Publish what was trained with its witness, on the main process; returns its folder.

    Args:
        prepared: Rows that were trained on.
        heldout: Validation rows; the witness is measured on these, if there are any.
        weights: Gathers all weights of a model of which each rank holds a shard. Such a model gets no witness.

    Raises:
        TrainingDivergedError: A weight is not finite.
    """
    if error := group.try_all(partial(_require_finite, model)):
        raise error
    is_full = loaded.mode.name == "full"
    write: Callable[..., int] = full.save_model if is_full else lora.save_adapter
    folder = spec.folders.model if is_full else spec.folders.adapter
    if is_full and weights is not None:
        write = partial(write, weights=weights())
    if group.rank:
        return folder
    measure = partial(
        witness.measure_witness,
        spec,
        heldout,
        prepared.rows,
        model,
        device=loaded.device,
        mode=loaded.mode,
        parameters=loaded.parameters,
        autocast=loaded.autocast,
    )
    seen = None if group.is_sharded else _try_witness(measure, guard, emit)
    size = guard.retry(lambda: write(model, spec, prepared.template, witness=seen), "the save")
    emit(AdapterSaved(path=str(folder), bytes=size))
    return folder


def _try_witness(measure: Callable[[], Witness | None], guard: MemoryGuard, emit: Emit) -> Witness | None:
    """What the trained model says; without memory for it, the run ends without a witness."""
    try:
        return guard.retry(measure, "the witness")
    except OomExhaustedError as error:
        emit(Notice(message="exports have no witness: too little GPU memory", details={"reason": error.cause}))
        return None


def _require_finite(model: Any) -> None:
    """A loss is computed before the step that may break the weights, so the last step is checked here."""
    for name, weight in lora.trainable_weights(model).items():
        if not torch.isfinite(weight.detach()).all():
            raise TrainingDivergedError(f"{name} holds values that are not finite")


def answer_prompts(
    spec: TrainSpec,
    prepared: AnyPrepared,
    model: Any,
    emit: Emit,
    *,
    step: int,
    generate: Callable[..., torch.Tensor] | None = None,
) -> None:
    """Answer the sample prompts; without memory for them, the run continues.

    Args:
        generate: Used instead of the model's own.
    """
    guard = MemoryGuard(TorchMemory(), emit, enabled=spec.training.oom_recovery)
    ask = partial(
        answer,
        model,
        prepared.tokenizer,
        prepared.template,
        max_tokens=spec.training.sample_tokens,
        ends=prepared.facts.stop_ids,
        generate=generate,
    )
    for prompt in spec.training.sample_prompts:
        try:
            text = guard.retry(partial(ask, prompt), "a sample answer")
        except OomExhaustedError as error:
            emit(Notice(message="no sample answers: too little GPU memory", details={"reason": error.cause}))
            return
        emit(SampleAnswer(step=step, prompt=prompt, answer=text))


def _model_loaded(spec: TrainSpec, model: Any, loaded: Loaded) -> ModelLoaded:
    return ModelLoaded(
        name=spec.model.name,
        revision=spec.base_commit,
        config_sha256=load.config_digest(spec.base),
        parameters=loaded.parameters,
        trainable=sum(weight.numel() for weight in lora.trainable_weights(model).values()),
        mode=loaded.mode.label,
        dtype=str(model.dtype).removeprefix("torch."),
        device=loaded.device.label,
    )


@contextlib.contextmanager
def determinism(training: TrainingSpec, *, on_gpu: bool) -> Iterator[None]:
    """While the context lasts, torch rejects whatever may give other bits the next time, if the settings ask for that.

    Raises:
        InvalidSettingError: cuBLAS was not told to be deterministic, which only the environment can do.
    """
    if not training.deterministic:
        yield
        return
    before = (
        torch.are_deterministic_algorithms_enabled(),
        torch.backends.cudnn.deterministic,
        torch.backends.cudnn.benchmark,
    )
    torch.use_deterministic_algorithms(mode=True)
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = True, False
    try:
        if on_gpu:
            _require_deterministic_products()
        yield
    finally:
        torch.use_deterministic_algorithms(before[0])
        torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = before[1:]


def _require_deterministic_products() -> None:
    """Multiply once: cuBLAS is deterministic only if the environment says so, and torch raises if it does not."""
    square = torch.zeros(2, 2, device="cuda")
    try:
        torch.mm(square, square)
    except RuntimeError as error:
        raise InvalidSettingError(
            "deterministic training needs the environment variable CUBLAS_WORKSPACE_CONFIG",
            cause=first_line(error),
            fix="Set it before Python starts: export CUBLAS_WORKSPACE_CONFIG=:4096:8",
        ) from error


@contextlib.contextmanager
def quiet_framework() -> Iterator[None]:
    """No usage reports and no progress bars; warnings go to our log; the frameworks' errors get a code."""
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
    """Give the framework's own errors a code; ours keep their own."""
    try:
        yield
    except CodedError:
        raise
    except torch.OutOfMemoryError as error:
        raise GpuOutOfMemoryError("the GPU ran out of memory", cause=str(error).split(". ")[0]) from error
    except SafetensorError as error:
        if "os error 28" in str(error):  # ENOSPC, in Rust's words
            raise DiskFullError("no room left while writing the adapter", cause=str(error)) from error
        raise TrainingFailedError(f"the adapter could not be written: {error}") from error
    except (RuntimeError, ValueError, TypeError, KeyError, AttributeError, IndexError, OSError) as error:
        raise TrainingFailedError(f"{type(error).__name__}: {error}") from error
