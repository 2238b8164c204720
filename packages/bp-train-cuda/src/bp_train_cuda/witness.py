"""The witness of a trained model: log-probabilities from memory, before anything is merged, rounded or saved."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

import orjson
import torch
from peft import PeftModel

from bp_data.witness import LONGEST, Measured, build_witness
from bp_runs.spec import TrainSpec
from bp_runs.witness import TOP_TOKENS, BaseFacts, Witness
from bp_train_cuda.backend import Device, Mode
from bp_train_cuda.model.head import evaluating

_CPU_WORK = 3e11
"""Weights times tokens of the long prompt that a CPU gets through in some seconds."""


def measure_witness(
    spec: TrainSpec,
    heldout: Sequence[Any],
    rows: Sequence[Any],
    model: Any,
    *,
    device: Device,
    mode: Mode,
    parameters: int,
    autocast: torch.dtype | None,
) -> Witness | None:
    """Measure ``model`` on validation rows, else on rows that it was trained on; None without rows.

    Modes, random state and gradients of the model stay as they are.

    Args:
        spec: The run's.
        heldout: Validation rows; may be empty.
        rows: Rows that were trained on.
        model: A transformers model, or a PEFT model of one, in memory.
        device: Where it is.
        mode: How its base is held.
        parameters: The base's.
        autocast: The dtype that products were computed in while training; None: the weights' own.
    """
    place = torch.device(device.kind)

    def measure(ids: Sequence[int], places: Sequence[int]) -> Measured:
        with evaluating(model, place), _computing(place, autocast):
            top = _compute_logprobs(model, ids, places, place).topk(TOP_TOKENS)
            base = None
            if isinstance(model, PeftModel) and spec.lora.init_lora_weights == "default":
                with model.disable_adapter():
                    base = _compute_logprobs(model, ids, places, place).gather(1, top.indices).tolist()
        return top.indices.tolist(), top.values.tolist(), base

    return build_witness(
        heldout,
        rows,
        measure,
        run_id=spec.folders.run_id,
        base=_describe_base(model, mode),
        config=orjson.loads((spec.base / "config.json").read_bytes()),
        longest=LONGEST if device.kind == "cuda" else int(_CPU_WORK / max(1, parameters)),
    )


def _computing(place: torch.device, autocast: torch.dtype | None) -> contextlib.AbstractContextManager[None]:
    return contextlib.nullcontext() if autocast is None else torch.autocast(place.type, dtype=autocast)


def _compute_logprobs(model: Any, ids: Sequence[int], places: Sequence[int], device: torch.device) -> torch.Tensor:
    """(places, V) log-probabilities in float32; the head runs at those places only."""
    tokens, kept = torch.tensor([list(ids)], device=device), torch.tensor(list(places), device=device)
    logits = model(input_ids=tokens, use_cache=False, logits_to_keep=kept).logits[0]
    if len(logits) != len(kept):  # a model that takes the argument and ignores it
        logits = logits[kept]
    return logits.float().log_softmax(-1)


def _describe_base(model: Any, mode: Mode) -> BaseFacts:
    packed = {name: module.weight for name, module in model.named_modules() if type(module).__name__ == "Linear4bit"}
    states = [getattr(weight, "quant_state", None) for weight in packed.values()]
    return BaseFacts(
        mode=mode.name,
        dtype=str(model.dtype).removeprefix("torch."),
        packed=tuple(f"{_strip(name)}.weight" for name in packed if not name.endswith(".base_layer.base_layer")),
        double_quantized=any(getattr(state, "nested", False) for state in states),
    )


def _strip(name: str) -> str:
    """A module's name as the base's files have it, without PEFT's wrappers."""
    return name.removeprefix("base_model.model.").removesuffix(".base_layer")
