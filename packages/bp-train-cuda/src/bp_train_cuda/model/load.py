"""The base model from a local folder: checked first, then loaded; kept for the next run; unpacked from a GGUF."""

from __future__ import annotations

import contextlib
import hashlib
import io
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoTokenizer,
    BitsAndBytesConfig,
    GgufConfig,
    PreTrainedTokenizerFast,
)
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)
from transformers.utils import logging

from bp_data.loop import base_cache
from bp_data.loop.shapes import Linear, Shapes
from bp_runs.errors import ModelLoadError, RemoteCodeError, first_line
from bp_train_cuda.backend import CPU_PARAMETER_LIMIT, Device, Mode, choose_dtype
from bp_train_cuda.errors import DriverTooOldError, GpuNotAvailableError
from bp_train_cuda.model.experts import find_experts

_LOAD_ERRORS = (OSError, ValueError, KeyError, AttributeError, TypeError, RuntimeError, ImportError, SafetensorError)


def read_config(base: Path, *, trust_remote_code: bool) -> Any:
    """The model's transformers config.

    Raises:
        RemoteCodeError: It needs the model's own code and that was not allowed.
        ModelLoadError: transformers does not understand it.
    """
    try:
        config = AutoConfig.from_pretrained(base, trust_remote_code=trust_remote_code, local_files_only=True)
    except _LOAD_ERRORS as error:
        if "trust_remote_code" in str(error):
            raise RemoteCodeError(f"{base} needs its own Python code", cause=first_line(error)) from error
        raise ModelLoadError(f"the config of {base} cannot be used", cause=first_line(error)) from error
    if (
        getattr(config, "auto_map", None)
        and not trust_remote_code
        and type(config).__module__.startswith("transformers_")
    ):
        raise RemoteCodeError(f"{base} needs its own Python code")
    return config


def choose_auto_class(config: Any) -> Any:
    """What loads a model: a kind that exists only with its vision tower, such as Mistral Small 3, with the tower."""
    kind = config.model_type
    is_whole = kind in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES and kind not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    return AutoModelForImageTextToText if is_whole else AutoModelForCausalLM


def sketch_model(config: Any, *, trust_remote_code: bool) -> Any:
    """The model that ``config`` describes, without its weights: on torch's meta device.

    Raises:
        ModelLoadError: No causal language model has such a config.
    """
    try:
        with torch.device("meta"):
            return choose_auto_class(config).from_config(config, trust_remote_code=trust_remote_code)
    except _LOAD_ERRORS as error:
        raise ModelLoadError("the config describes no causal language model", cause=first_line(error)) from error


def count_parameters(model: Any) -> int:
    """Parameters of a model; tied ones once."""
    return sum(p.numel() for p in model.parameters())


def measure_shapes(config: Mapping[str, Any]) -> Shapes:
    """The shapes of a model of a kind that `bp_data.loop.shapes` does not know, built without weights.

    Args:
        config: The content of a config.json.

    Raises:
        ModelLoadError: transformers does not know it either.
    """
    try:
        built = AutoConfig.for_model(**config)
    except _LOAD_ERRORS as error:
        raise ModelLoadError("the config describes no causal language model", cause=first_line(error)) from error
    model = sketch_model(built, trust_remote_code=False)
    head, text = model.get_output_embeddings(), built.get_text_config()
    found = Counter(
        (name.rsplit(".", 1)[-1], module.in_features, module.out_features)
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and module is not head
    )
    linears = tuple(Linear(name, inp, out, count) for (name, inp, out), count in found.items())
    experts = _measure_experts(model)
    parameters = sum(p.numel() for p in model.parameters())
    tied = head is None or head.weight is model.get_input_embeddings().weight
    hidden, vocabulary = int(text.hidden_size), int(text.vocab_size)
    embedding = vocabulary * hidden * (1 if tied else 2)
    return Shapes(
        model_type=str(built.model_type),
        hidden=hidden,
        layers=int(text.num_hidden_layers),
        vocabulary=vocabulary,
        feed_forward=max((max(a.inp, a.out) for a in linears), default=hidden),
        experts=experts,
        active_experts=int(getattr(text, "num_experts_per_tok", 1) or 1) if experts else 0,
        queries=hidden,
        keys=hidden,
        linears=linears,
        others=parameters - embedding - sum(a.parameters for a in (*linears, *experts)),
        tied=tied,
    )


def _measure_experts(model: Any) -> tuple[Linear, ...]:
    """Matrices of single experts that are parameters of a layer, by name and size."""
    names = set(find_experts(model).fused)
    found: Counter[tuple[str, int, int]] = Counter()
    for name, parameter in model.named_parameters():
        if name in names:
            count, out, inp = parameter.shape
            found[name.rsplit(".", 1)[-1], inp, out] += count
    return tuple(Linear(name, inp, out, count) for (name, inp, out), count in found.items())


def require_capable(parameters: int, device: Device) -> None:
    """Reject a CPU for models that would take days on it.

    Raises:
        GpuNotAvailableError: Over `CPU_PARAMETER_LIMIT` parameters and no CUDA device.
        DriverTooOldError: The same, and there is a GPU whose driver is too old.
    """
    if device.kind == "cpu" and parameters > CPU_PARAMETER_LIMIT:
        kind = DriverTooOldError if device.driver_too_old else GpuNotAvailableError
        raise kind(
            f"the model has {parameters / 1e9:.1f} billion parameters and there is only a CPU: {device.why}",
            details={"parameters": parameters, "limit": CPU_PARAMETER_LIMIT},
        )


def load_model(
    base: Path,
    device: Device,
    mode: Mode,
    *,
    dtype: Literal["auto", "float32", "bfloat16"],
    trust_remote_code: bool,
    place: Literal["cuda", "cpu"] | None = None,
) -> Any:
    """The base model's weights on ``device``; in mode qlora its linear layers as nf4 with double quantization.

    Args:
        place: Where they are put instead, in the type that the device computes with.

    Raises:
        ModelLoadError: Files are missing, damaged or do not fit the config.
    """
    compute = choose_dtype(dtype, device)
    loader = choose_auto_class(read_config(base, trust_remote_code=trust_remote_code))
    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute,
    )
    try:
        model, found = loader.from_pretrained(
            base,
            dtype=compute,
            quantization_config=quantization if mode.name == "qlora" else None,
            device_map={"": place or device.kind},
            trust_remote_code=trust_remote_code,
            local_files_only=True,
            output_loading_info=True,
        )
    except torch.OutOfMemoryError:
        raise
    except _LOAD_ERRORS as error:
        raise ModelLoadError(f"the weights in {base} cannot be loaded", cause=first_line(error)) from error
    if missing := sorted(found["missing_keys"]):
        # transformers would draw them at random and continue.
        raise ModelLoadError(f"the weights in {base} lack {len(missing)} tensors", cause=f"{missing[0]} is missing")
    leave_out_router_loss(model)
    return model


def leave_out_router_loss(model: Any) -> None:
    """Let a mixture of experts neither collect router logits nor add their load-balancing loss to a loss.

    Routers are not trained with an adapter, and the term would depend on how a batch is split.
    """
    config = model.config.get_text_config(decoder=True)
    if getattr(config, "output_router_logits", False):
        config.output_router_logits = False


def build_tokenizer(base: Path, *, pad: str, eos: str) -> PreTrainedTokenizerFast:
    """tokenizer.json as it stands, for TRL's padding; AutoTokenizer would rebuild the pre-tokenizer."""
    return PreTrainedTokenizerFast(tokenizer_file=str(base / "tokenizer.json"), pad_token=pad, eos_token=eos)


def config_digest(base: Path) -> str:
    """Hex SHA-256 of config.json."""
    return hashlib.sha256((base / "config.json").read_bytes()).hexdigest()


def unpack_gguf(file: Path, folder: Path) -> None:
    """As `bp_runs.rail.UnpacksModels.unpack_gguf`."""
    logging.disable_progress_bar()
    with contextlib.redirect_stderr(io.StringIO()):  # transformers' own bar cannot be switched off here
        model = AutoModelForCausalLM.from_pretrained(
            file.parent,
            gguf_file=file.name,
            dtype=torch.bfloat16,
            quantization_config=GgufConfig(dequantize=True),
        )
        model.save_pretrained(folder)
        AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(folder)


class BaseCache(base_cache.BaseCache):
    """Keeps one transformers model, in evaluation mode and without gradient checkpointing."""

    def __init__(self) -> None:
        super().__init__(_restore)


def _restore(base: Any) -> None:
    if getattr(base, "is_gradient_checkpointing", False):
        base.gradient_checkpointing_disable()
    base.eval()
