"""Export an adapter, or a model without one, as a copy, as a merged model, or as one GGUF."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias, get_args

from bp_export.conversations import Messages
from bp_export.errors import (
    BaseModelNotFoundError,
    LlamaCppMissingError,
    ModelInvalidError,
    OutputTakenError,
    QuantizationUnknownError,
)
from bp_export.gguf import MAGIC
from bp_export.importance import read_importance
from bp_export.merged import copy_adapter, write_merged
from bp_export.mixture import read_quantization
from bp_export.parity import is_verifiable, verify_gguf
from bp_export.plan import build_plan, read_config
from bp_export.report import ParityReport
from bp_export.stream import write_gguf
from bp_export.vocab import TOKENIZER_FILE
from bp_merge import FoldedModel, LoraAdapter, TensorReader, load_adapter, read_model_index
from bp_runs.adapter import CONFIG_FILE, read_adapter_folder
from bp_runs.files import require_folder, require_free_space

Format: TypeAlias = Literal["lora", "merged", "gguf"]


@dataclass(frozen=True, slots=True)
class ExportOutcome:
    """What an export wrote."""

    path: Path
    """The GGUF, or the folder."""
    format: Format
    quantization: str | None
    """None for formats that keep the base's types."""
    bytes: int
    """Size of the file, or of all files of the folder."""
    tensors: int
    seconds: float
    sha256: str
    """Of the GGUF, of model.safetensors (or of its index, where there are shards), or of adapter_model.safetensors."""
    parity: ParityReport | None = None
    """How the GGUF compares with the model in llama.cpp; None where that was not asked for or cannot be tried here."""


@dataclass(frozen=True, slots=True)
class _Source:
    """What is exported: a base folder, perhaps an adapter on it, and whose tokenizer counts."""

    base: Path
    adapter: LoraAdapter | None
    tokenizer: Path
    name: str


def export_adapter(
    adapter: Path,
    *,
    output: Path | None = None,
    format: Format = "gguf",
    quantization: str = "q4_k_m",
    base: Path | None = None,
    pre: str | None = None,
    name: str | None = None,
    importance: Path | None = None,
    threads: int | None = None,
    verify: bool | None = None,
    prompts: Sequence[Messages] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> ExportOutcome:
    """Export an adapter folder, or a model folder that has no adapter.

    Args:
        adapter: A PEFT adapter folder, or a Hugging Face model folder (config.json and safetensors).
        output: The GGUF's path, or the folder for the other formats. By default beside ``adapter``:
            ``<name>-<quantization>.gguf``, ``<name>-merged`` or ``<name>-lora``.
        format: ``lora`` copies the adapter, ``merged`` writes a Hugging Face folder, ``gguf`` one file for llama.cpp.
        quantization: For ``gguf``: one of `QUANTIZATIONS`.
        base: The base's folder, instead of the one that the adapter names. The adapter's own counts if it is a
            folder on this machine; Hub ids are for the caller to resolve.
        pre: llama.cpp's name of the tokenizer's splitting rule, instead of recognising it.
        name: Becomes the GGUF's ``general.name``, and part of the default output. By default ``<base>-tuned`` for an
            adapter, and the folder's name for a model.
        importance: An importance matrix for the GGUF's quantizers: a file of llama-imatrix, GGUF or .dat.
        threads: Threads that quantize; None for the machine's cores, at most 8.
        verify: Whether to load the GGUF in llama.cpp and compare it with the model; None for where that is installed.
        prompts: Conversations to compare it on, such as held-out ones; None for the package's own.
        progress: Called with bytes done and bytes in all.

    Raises:
        CodedError: Anything in `bp_export.errors` and `bp_merge.errors`, AdapterInvalidError, DiskFullError,
            OutputNotWritableError. Nothing half-written is left, nor after Ctrl-C. Only after ParityFailedError, and
            where llama.cpp fails (ChatFailedError), the whole GGUF is there.
    """
    begun = time.monotonic()
    if format not in get_args(Format):
        raise QuantizationUnknownError(f"there is no format {format!r}; there are {', '.join(get_args(Format))}")
    if format == "lora":
        return _export_lora(adapter, output, name, begun)
    asked = read_quantization(quantization)
    verify = _decide_to_verify(verify)
    source = _read_source(adapter, base, name)
    with FoldedModel(TensorReader(read_model_index(source.base)), source.adapter) as model:
        if format == "merged":
            target = output or adapter.parent / f"{source.name}-merged"
            _require_free_folder(target)
            size, sha256 = write_merged(model, source.base, source.tokenizer, target, progress=progress)
            seconds = time.monotonic() - begun
            return ExportOutcome(target, format, None, size, len(model.tensors), seconds, sha256)
        target = output or adapter.parent / f"{source.name}-{asked.name}.gguf"
        plan = build_plan(
            model,
            source.base,
            quantization=asked,
            tokenizer=source.tokenizer,
            name=source.name,
            pre=pre,
            importance=read_importance(importance) if importance else None,
        )
        _require_free_file(target)
        require_folder(target.parent)
        require_free_space(target.parent, plan.disk_bytes, f"the {asked.name} GGUF")
        size, sha256 = write_gguf(plan, model, target, progress=progress, threads=threads)
        parity = None
        if verify:
            parity = verify_gguf(
                target,
                plan,
                model,
                base=source.base,
                tokenizer=source.tokenizer,
                quantization=asked,
                prompts=prompts,
            )
    seconds = time.monotonic() - begun
    return ExportOutcome(target, format, asked.name, size, len(plan.tensors), seconds, sha256, parity)


def _decide_to_verify(asked: bool | None) -> bool:
    if asked and not is_verifiable():
        raise LlamaCppMissingError("the export cannot be verified: xllamacpp or tokenizers is not installed")
    return is_verifiable() if asked is None else asked


def _export_lora(adapter: Path, output: Path | None, name: str | None, begun: float) -> ExportOutcome:
    folder = read_adapter_folder(adapter)
    target = output or adapter.parent / f"{name or _name_after(folder.base)}-lora"
    _require_free_folder(target)
    tensors, size, sha256 = copy_adapter(folder, target)
    return ExportOutcome(target, "lora", None, size, tensors, time.monotonic() - begun, sha256)


def _read_source(folder: Path, base: Path | None, name: str | None) -> _Source:
    """Find the base of an adapter folder; a folder without an adapter is its own base."""
    if not (folder / CONFIG_FILE).is_file() and (folder / "config.json").is_file():
        _require_unpacked(read_config(folder), folder)
        return _Source(folder, None, folder, name or folder.resolve().name)
    adapter = load_adapter(folder)
    named = Path(adapter.folder.base)
    where = base or named
    if not where.is_dir():
        raise BaseModelNotFoundError(
            f"the base model {where} is not a folder on this machine", details={"base": adapter.folder.base}
        )
    _require_unpacked(read_config(where), where)
    tokenizer = folder if (folder / TOKENIZER_FILE).is_file() else where
    return _Source(where, adapter, tokenizer, name or _name_after(adapter.folder.base))


def _require_unpacked(config: Mapping[str, Any], folder: Path) -> None:
    """A base in 4 bits was made from one in 16, and the adapter's changes belong on that."""
    packed = config.get("quantization_config")
    if packed:
        kind = packed.get("quant_method", "some") if isinstance(packed, dict) else "some"
        original = re.sub(r"(-unsloth)?-bnb-4bit$", "", str(config.get("_name_or_path") or folder.name))
        raise ModelInvalidError(
            f"{folder} holds weights packed by {kind} quantization; the export needs them in 16 or 32 bits",
            way_out=f"Name the model that it was made from: --base {original}",
        )


def _name_after(base: str) -> str:
    """The last part of a Hub id or path, and that it was tuned; a folder of the Hub's cache counts as its id."""
    parts = [part for part in base.replace(os.sep, "/").split("/") if part]
    if len(parts) > 2 and parts[-2] == "snapshots":
        parts = parts[-3].split("--")
    return f"{parts[-1] if parts else 'model'}-tuned"


def _require_free_folder(path: Path) -> None:
    """An output folder replaces only an empty one: what else stands there might be anything."""
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise OutputTakenError(f"{path} exists and is not empty")


def _require_free_file(path: Path) -> None:
    """An output file replaces only an earlier GGUF."""
    if path.is_dir():
        raise OutputTakenError(f"{path} is a folder", way_out=f"Name a file: --output {path / 'model.gguf'}")
    if path.exists():
        with path.open("rb") as file:
            if file.read(len(MAGIC)) not in (MAGIC, b""):
                raise OutputTakenError(f"{path} exists and is no GGUF")
