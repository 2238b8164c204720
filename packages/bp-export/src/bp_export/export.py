"""Export an adapter, or a model without one, as a copy, as a merged model, or as one GGUF."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, TypeAlias, get_args

from bp_data.templates.conversations import ConversationHashes, Messages
from bp_export.architectures import find_architecture
from bp_export.errors import (
    AdapterFormatError,
    BaseModelNotFoundError,
    LlamaCppMissingError,
    ModelInvalidError,
    QuantizationUnknownError,
)
from bp_export.formats.adapter import require_plain, write_gguf_adapter, write_mlx_adapter
from bp_export.formats.merged import copy_adapter, write_merged
from bp_export.formats.ollama_adapter import write_ollama_adapter
from bp_export.formats.output import require_free_file, require_free_folder
from bp_export.gguf.dry_run import ExportPlan, build_export_plan
from bp_export.gguf.file import name_split
from bp_export.gguf.plan import GgufPlan, build_plan, read_config
from bp_export.gguf.writer import cut_plan, write_gguf, write_split
from bp_export.local_paths import tell_model
from bp_export.quant.imatrix import read_importance
from bp_export.quant.kernels import describe_kernels
from bp_export.quant.types import Quantization, read_quantization
from bp_export.tokenizer.vocabulary import TOKENIZER_FILE, read_vocabulary
from bp_export.verify.parity import is_verifiable, verify_gguf
from bp_export.verify.report import ParityReport
from bp_export.verify.template import RenderingCheck, check_folder, read_trained_hashes
from bp_merge import AdapterMismatchError, FoldedModel, LoraAdapter, load_adapter, open_model
from bp_runs.adapter import CONFIG_FILE, MANIFEST_FILE, is_other_base, read_adapter_folder
from bp_runs.errors import InvalidSettingError
from bp_runs.files import require_folder, require_free_space
from bp_runs.wording import setting_ref

Format: TypeAlias = Literal["gguf", "merged", "lora", "gguf-adapter", "ollama-adapter", "mlx"]

_ADAPTER_ENDS: Mapping[str, str] = MappingProxyType({"gguf-adapter": "-lora.gguf", "ollama-adapter": "-ollama"})


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
    rendering: RenderingCheck
    """Whether the chat template renders ten conversations as at training."""
    parity: ParityReport | None = None
    """How the GGUF compares with the model in llama.cpp; None where that was not asked for or cannot be tried here."""
    kernels: str | None = None
    """What quantized the GGUF (`describe_kernels`); None for the other formats."""


@dataclass(frozen=True, slots=True)
class _Source:
    """What is exported: a base folder, perhaps an adapter on it, and whose tokenizer counts."""

    base: Path
    adapter: LoraAdapter | None
    tokenizer: Path
    name: str
    hashes: ConversationHashes | None
    """How training rendered ten conversations; None for adapters and models from elsewhere."""

    def check_rendering(self) -> RenderingCheck:
        """Compare the template that is going to be exported with training."""
        return check_folder(self.tokenizer, self.hashes)

    @property
    def folders(self) -> list[Path]:
        """What is read, and must not be replaced by what is written."""
        return [self.base, self.tokenizer, *([self.adapter.folder.path] if self.adapter else [])]


def export_adapter(
    adapter: Path,
    *,
    output: Path | None = None,
    format: Format = "gguf",
    quantization: str | None = None,
    base: Path | None = None,
    pre: str | None = None,
    name: str | None = None,
    importance: Path | None = None,
    split_bytes: int | None = None,
    ollama_base: str | None = None,
    dequantize: bool = False,
    force: bool = False,
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
        format: ``gguf`` writes one file for llama.cpp, ``merged`` a Hugging Face folder. The others are the adapter by
            itself: ``lora`` a copy, ``gguf-adapter`` a file that llama.cpp loads as an adapter, ``ollama-adapter``
            a folder with a Modelfile, ``mlx`` a folder for mlx-lm.
        quantization: For ``gguf``: one of `QUANTIZATIONS`; None for ``q4_k_m``.
        base: The base's folder, instead of the one that the adapter names. The adapter's own counts if it is a
            folder on this machine; Hub ids are for the caller to resolve.
        pre: llama.cpp's name of the tokenizer's splitting rule, instead of recognising it.
        name: Becomes the GGUF's ``general.name``, and part of the default output. By default ``<base>-tuned`` for an
            adapter, and the folder's name for a model.
        importance: An importance matrix for the GGUF's quantizers: a file of llama-imatrix, GGUF or .dat.
        split_bytes: Most bytes of tensors a file; a larger GGUF becomes several, and the outcome names the first.
        ollama_base: What ``ollama-adapter`` goes on: a model's name there, or the path of a GGUF of the base.
        dequantize: Whether a base that bitsandbytes packed in 4 bits is unpacked, instead of asking for the original.
        force: Whether an earlier GGUF, or the folder of an earlier export, may be replaced.
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
    _require_use(
        format, {"quantization": quantization, "importance": importance, "split_bytes": split_bytes, "pre": pre}
    )
    if format in ("lora", "mlx"):
        return _export_folder(adapter, format, output, name, force=force, begun=begun)
    asked = read_quantization(quantization)
    if split_bytes is not None and split_bytes < 1:
        raise QuantizationUnknownError(
            "files of no bytes cannot be written", fix="Say how large a file may be: {set:split_bytes=2147483648}"
        )
    is_required, verify = bool(verify), _decide_to_verify(verify)
    source = _read_source(adapter, base, name, dequantize=dequantize)
    rendering = source.check_rendering()
    with FoldedModel(open_model(source.base, dequantize=dequantize), source.adapter) as model:
        if format == "merged":
            target = output or adapter.parent / f"{source.name}-merged"
            require_free_folder(target, force=force, sources=source.folders)
            size, sha256 = write_merged(
                model,
                source.base,
                source.tokenizer,
                target,
                hashes=source.hashes,
                progress=progress,
                threads=threads,
            )
            seconds = time.monotonic() - begun
            return ExportOutcome(target, format, None, size, len(model.tensors), seconds, sha256, rendering)
        if format in ("gguf-adapter", "ollama-adapter"):
            target = output or adapter.parent / f"{source.name}{_ADAPTER_ENDS[format]}"
            return _export_adapter_alone(source, model, target, format, runs_on=ollama_base, force=force, begun=begun)
        target = output or name_gguf(adapter, asked.name, name=source.name)
        plan = _plan(source, model, asked, pre, importance)
        groups = cut_plan(plan, split_bytes) if split_bytes else [list(plan.tensors)]
        paths = [name_split(target, i, len(groups)) for i in range(1, len(groups) + 1)] if len(groups) > 1 else [target]
        for path in paths:
            require_free_file(path, force=force, sources=[importance] if importance else [])
        require_folder(target.parent)
        require_free_space(target.parent, plan.disk_bytes, f"the {asked.name} GGUF")
        if len(groups) > 1:
            written = write_split(plan, model, target, groups, progress=progress, threads=threads)
        else:
            written = [write_gguf(plan, model, target, progress=progress, threads=threads)]
        parity = None
        if verify:
            parity = verify_gguf(
                paths[0],
                plan,
                model,
                base=source.base,
                tokenizer=source.tokenizer,
                quantization=asked,
                trained=adapter,
                prompts=prompts,
                required=is_required,
            )
    seconds = time.monotonic() - begun
    size = sum(size for size, _ in written)
    return ExportOutcome(
        path=paths[0],
        format=format,
        quantization=asked.name,
        bytes=size,
        tensors=len(plan.tensors),
        seconds=seconds,
        sha256=written[0][1],
        rendering=rendering,
        parity=parity,
        kernels=describe_kernels(),
    )


def plan_export(
    adapter: Path,
    *,
    output: Path | None = None,
    quantization: str | None = None,
    base: Path | None = None,
    pre: str | None = None,
    name: str | None = None,
    importance: Path | None = None,
    dequantize: bool = False,
    threads: int | None = None,
) -> ExportPlan:
    """What `export_adapter` with the same arguments would write as ``gguf``; nothing is written.

    Raises:
        CodedError: As `export_adapter`, but for those of the disk.
    """
    asked = read_quantization(quantization)
    source = _read_source(adapter, base, name, dequantize=dequantize)
    target = output or name_gguf(adapter, asked.name, name=source.name)
    with FoldedModel(open_model(source.base, dequantize=dequantize), source.adapter) as model:
        plan = _plan(source, model, asked, pre, importance)
        return build_export_plan(plan, target, changed=model.changed, threads=threads)


def name_gguf(adapter: Path, quantization: str | None = None, *, name: str | None = None) -> Path:
    """Where `export_adapter` writes a GGUF where no ``output`` is named.

    Args:
        adapter: As there, and so are the others.

    Raises:
        AdapterInvalidError: It is neither an adapter nor a model folder.
        QuantizationUnknownError: There is no such quantization.
    """
    if name is None:
        name = adapter.resolve().name if _is_model(adapter) else _name_after(read_adapter_folder(adapter).base)
    return adapter.parent / f"{name}-{read_quantization(quantization).name}.gguf"


def find_own_type(folder: Path, base: Path | None = None, *, dequantize: bool = False) -> str:
    """The quantization that changes nothing: the type of the largest tensor of an adapter's base, or of a model.

    Raises:
        CodedError: As `export_adapter`.
    """
    source = _read_source(folder, base, None, dequantize=dequantize)
    tensors = open_model(source.base, dequantize=dequantize).tensors.values()
    return max(tensors, key=lambda info: info.bytes).dtype.lower()


def _require_use(format: Format, asked: Mapping[str, object]) -> None:
    """Refuse what only a GGUF of a whole model can have, instead of leaving it out without a word."""
    if format != "gguf" and (unused := [name for name, value in asked.items() if value is not None]):
        raise InvalidSettingError(
            f"{{set:{unused[0]}}} is for the format gguf, and this is {format}",
            fix=f"Leave it out: {{set:{unused[0]}}}",
            setting=unused[0],
        )


def _plan(
    source: _Source, model: FoldedModel, asked: Quantization, pre: str | None, importance: Path | None
) -> GgufPlan:
    return build_plan(
        model,
        source.base,
        quantization=asked,
        tokenizer=source.tokenizer,
        name=source.name,
        pre=pre,
        importance=read_importance(importance) if importance else None,
        hashes=source.hashes,
    )


def _export_adapter_alone(
    source: _Source, model: FoldedModel, target: Path, format: Format, *, runs_on: str | None, force: bool, begun: float
) -> ExportOutcome:
    if source.adapter is None:
        raise AdapterFormatError(f"{source.base} is a model and not an adapter")
    require_plain(source.adapter, format)
    rendering = source.check_rendering()
    config = read_config(source.base)
    architecture = find_architecture(config)
    if format == "gguf-adapter":
        require_free_file(target, force=force)
        require_folder(target.parent)
        written = write_gguf_adapter(model, source.adapter, architecture, target, name=source.name)
    else:
        if runs_on is None:
            raise AdapterFormatError(
                "an adapter for Ollama goes on a model there, and none is named",
                fix="Name the same base as Ollama has it, or a GGUF of it: {set:ollama_base=smollm2:135m}",
            )
        require_free_folder(target, force=force, sources=source.folders)
        words = read_vocabulary(source.tokenizer, vocab_size=None, model_config=config, pre="default")
        written = write_ollama_adapter(
            model,
            source.adapter,
            architecture,
            target,
            base=source.base,
            runs_on=runs_on,
            name=source.name,
            stop=[] if words.turn_end is None else [str(words.tokens[words.turn_end])],
            hashes=source.hashes,
        )
    tensors, size, sha256 = written
    return ExportOutcome(target, format, None, size, tensors, time.monotonic() - begun, sha256, rendering)


def _decide_to_verify(asked: bool | None) -> bool:
    if asked and not is_verifiable():
        raise LlamaCppMissingError("the export cannot be verified: xllamacpp or tokenizers is not installed")
    return is_verifiable() if asked is None else asked


def _export_folder(
    adapter: Path, format: Format, output: Path | None, name: str | None, *, force: bool, begun: float
) -> ExportOutcome:
    """The forms of an adapter that need no base."""
    folder = read_adapter_folder(adapter)
    target = output or adapter.parent / f"{name or _name_after(folder.base)}-{format}"
    require_free_folder(target, force=force, sources=[adapter])
    hashes = read_trained_hashes(adapter)
    if hashes is not None and not (adapter / TOKENIZER_FILE).is_file():
        hashes = None  # the template stayed with the base
    rendering = check_folder(adapter, hashes)
    if format == "mlx":
        loaded = load_adapter(adapter)
        require_plain(loaded, format)
        tensors, size, sha256 = write_mlx_adapter(loaded, target)
    else:
        tensors, size, sha256 = copy_adapter(folder, target)
    return ExportOutcome(target, format, None, size, tensors, time.monotonic() - begun, sha256, rendering)


def _read_source(folder: Path, base: Path | None, name: str | None, *, dequantize: bool) -> _Source:
    """Find the base of an adapter folder; a folder without an adapter is its own base."""
    if _is_model(folder):
        _require_unpacked(read_config(folder), folder, dequantize=dequantize)
        return _Source(folder, None, folder, name or folder.resolve().name, read_trained_hashes(folder))
    adapter = load_adapter(folder)
    named = Path(adapter.folder.base)
    where = base or named
    if not where.is_dir():
        raise BaseModelNotFoundError(
            f"the base model {where} is not a folder on this machine", details={"base": adapter.folder.base}
        )
    _require_unpacked(read_config(where), where, dequantize=dequantize)
    if is_other_base(folder, where):
        raise AdapterMismatchError(
            f"{where} is not the base that the adapter was trained on: its norms are others",
            cause=f"the adapter names {adapter.folder.base} as its base",
            fix="Name that one: {set:base=FOLDER}. "
            f"If you are sure of this one, take base_fingerprint out of {folder / MANIFEST_FILE}.",
        )
    tokenizer = folder if (folder / TOKENIZER_FILE).is_file() else where
    return _Source(where, adapter, tokenizer, name or _name_after(adapter.folder.base), read_trained_hashes(folder))


def _is_model(folder: Path) -> bool:
    return not (folder / CONFIG_FILE).is_file() and (folder / "config.json").is_file()


def _require_unpacked(config: Mapping[str, Any], folder: Path, *, dequantize: bool) -> None:
    """A base in 4 bits was made from one in 16, and the adapter's changes belong on that."""
    packed = config.get("quantization_config")
    if not packed:
        return
    told = packed if isinstance(packed, dict) else {}
    kind = str(told.get("quant_method", "some"))
    original = re.sub(r"(-unsloth)?-bnb-4bit$", "", str(config.get("_name_or_path") or folder.name))
    is_known = kind == "bitsandbytes" and bool(told.get("load_in_4bit"))
    if not (dequantize and is_known):
        raise ModelInvalidError(
            f"{folder} holds weights packed by {kind} quantization; the export needs them in 16 or 32 bits",
            fix=f"Name the model that it was made from: {setting_ref('base', original)}"
            + ("; or use what 4 bits left of it: {set:dequantize=true}" if is_known else ""),
        )


def _name_after(base: str) -> str:
    """The last part of a Hub id or path, and that it was tuned; a folder of the Hub's cache counts as its id."""
    return f"{tell_model(base).rpartition('/')[2] or 'model'}-tuned"
