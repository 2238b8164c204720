"""Measuring a model without training it: the loss over examples, and row by row with answers."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, set_seed

from bp_data import Prepared, TokenRow
from bp_data.loop.evaluation import examine_rows, measure_rows
from bp_data.loop.examples import build_examples
from bp_data.loop.memory import MemoryGuard
from bp_data.loop.rows import pad_token
from bp_data.preparation import AnyPrepared
from bp_runs.adapter import WEIGHTS_FILE, add_to_manifest
from bp_runs.events import Emit
from bp_runs.rail import EvalOutcome, RowOutcome
from bp_runs.spec import TrainSpec
from bp_runs.witness import WITNESS_FILE, write_witness
from bp_train_cuda import backend, check
from bp_train_cuda.backend import TorchMemory
from bp_train_cuda.distributed.process_group import ProcessGroup
from bp_train_cuda.engines.base import Loaded, answer_prompts, open_base, quiet_framework
from bp_train_cuda.engines.framework import TorchFramework
from bp_train_cuda.generate import complete
from bp_train_cuda.model import lora
from bp_train_cuda.model.load import BaseCache, load_model
from bp_train_cuda.model.log_probs import LogProbModel
from bp_train_cuda.witness import measure_witness


def evaluate(
    spec: TrainSpec, prepared: AnyPrepared, adapter: Path | None, emit: Emit, *, cache: BaseCache | None = None
) -> EvalOutcome:
    """Load, measure the loss on all of ``prepared``, answer the sample prompts.

    Args:
        adapter: An adapter folder, or None for the base alone.
        cache: Keeps the base for the next call; None: it is not kept.

    Raises:
        CodedError: As `bp_train_cuda.rail.CudaRail.evaluate`.
    """
    with quiet_framework(), _open(spec, adapter, cache) as (model, loaded):
        framework = measure_with(spec, prepared, model, loaded, emit)
        with model.disable_adapter() if adapter is not None else contextlib.nullcontext():
            framework.measure_heldout_references()  # the base is what completions are compared with
        outcome = measure_rows(framework, spec.training, emit)
        answer_prompts(spec, prepared, model, emit, step=0)
        return outcome


def write_adapter_witness(
    spec: TrainSpec, prepared: AnyPrepared, adapter: Path, emit: Emit, *, cache: BaseCache | None = None
) -> None:
    """Store what the base with an adapter says on ``prepared``, next to the adapter.

    Args:
        adapter: An adapter folder that was made of others; its manifest lists the new file.
        cache: As for `evaluate`.
    """
    del emit
    with quiet_framework(), _open(spec, adapter, cache) as (model, loaded):
        seen = measure_witness(
            spec,
            prepared.rows,
            (),
            model,
            device=loaded.device,
            mode=loaded.mode,
            parameters=loaded.parameters,
            autocast=loaded.autocast,
        )
    if seen is not None:
        write_witness(adapter, seen, weights=adapter / WEIGHTS_FILE)
        add_to_manifest(adapter, WITNESS_FILE)


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
    """Load, measure and answer row by row, as in supervised fine-tuning.

    Args:
        adapter: As for `evaluate`.
        answers: As for `bp_train_cuda.rail.CudaRail.examine`.
        answer_tokens: As for `bp_train_cuda.rail.CudaRail.examine`.
        cache: As for `evaluate`.

    Raises:
        CodedError: As `evaluate`.
    """
    with quiet_framework(), _open(spec, adapter, cache) as (model, loaded):
        framework = measure_with(spec, prepared, model, loaded, emit)
        return examine_rows(framework, prepared, partial(complete, model), answers=answers, answer_tokens=answer_tokens)


def measure_with(spec: TrainSpec, prepared: AnyPrepared, model: Any, loaded: Loaded, emit: Emit) -> TorchFramework:
    """A framework that only measures: ``model`` on the rows of ``prepared`` by the spec's method."""
    training, room = spec.training, prepared.max_seq_length
    examples = build_examples(training.method, prepared.rows, pad_token(prepared), room=room, seed=training.seed)
    return TorchFramework(
        model=LogProbModel(model),
        examples=examples,
        heldout=examples,
        training=training,
        group=ProcessGroup(),
        reader=MemoryGuard(TorchMemory(), emit, enabled=training.oom_recovery),
        device=torch.device(loaded.device.kind),
        autocast=loaded.autocast,
        peak=backend.PeakMemory(loaded.device),
    )


@contextlib.contextmanager
def _open(spec: TrainSpec, adapter: Path | None, cache: BaseCache | None) -> Iterator[tuple[Any, Loaded]]:
    """The base, or the base with an adapter on it."""
    mode = "lora" if spec.training.mode == "full" else spec.training.mode
    spec = replace(spec, training=replace(spec.training, mode=mode, engine="native", fp8=False))
    with open_base(spec, cache, adapter) as loaded:
        set_seed(spec.training.seed)
        model = loaded.base if adapter is None else lora.load_lora(loaded.base, adapter)
        model.eval()
        yield model, loaded
        if adapter is not None:
            lora.remove_adapter(model)


def load_for_inference(spec: TrainSpec, adapter: Path | None) -> tuple[Any, Any]:
    """The base with an adapter on it, in eval mode, and the tokenizer that was trained with; the caller owns both.

    Raises:
        CodedError: As `evaluate`.
    """
    spec = replace(spec, training=replace(spec.training, engine="native", fp8=False))
    with quiet_framework():
        checked, trust = check.check_model(spec, spec.base, adapter), spec.model.trust_remote_code
        base = load_model(spec.base, checked.device, checked.mode, dtype=spec.model.dtype, trust_remote_code=trust)
        model = base if adapter is None else lora.load_lora(base, adapter)
        model.eval()
        return model, AutoTokenizer.from_pretrained(adapter or spec.base, trust_remote_code=trust)
