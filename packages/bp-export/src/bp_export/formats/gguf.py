"""One GGUF for llama.cpp and Ollama: base and adapter, quantized in one pass, compared with the model afterwards."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar, get_args

from bp_data.templates.render_hashes import Messages
from bp_export.architectures import Via, choose_via
from bp_export.errors import ArchitectureUnsupportedError, LlamaCppMissingError, QuantizationUnknownError
from bp_export.formats.left_out import check_left_out, is_of_tower, name_parts, note_unreached, report_left_out
from bp_export.formats.mmproj import plan_towers, write_towers
from bp_export.formats.output import require_free_file
from bp_export.formats.request import (
    ExportOutcome,
    ExportPlan,
    Format,
    ModelRequest,
    PlannedTensor,
    Progress,
    ViaChoice,
    summarize_plan,
)
from bp_export.formats.via import NOTE, open_converted, plan_tensors
from bp_export.gguf.file import name_split
from bp_export.gguf.plan import GgufPlan, TensorPlan, build_plan
from bp_export.gguf.writer import Weights, cut_plan, write_gguf, write_split
from bp_export.llama_cpp.classes import VIA, converts, name_class
from bp_export.local_paths import StrPath
from bp_export.quant.imatrix import read_importance
from bp_export.quant.kernels import describe_kernels
from bp_export.quant.types import read_quantization
from bp_export.source import Source, is_model, name_after, read_config
from bp_export.verify.evidence import References
from bp_export.verify.parity import is_verifiable, verify_gguf
from bp_merge import FoldedModel, TensorReader
from bp_runs.adapter import read_adapter_folder
from bp_runs.errors import InvalidSettingError
from bp_runs.files import require_folder, require_free_space


@dataclass(frozen=True, slots=True, kw_only=True)
class GgufExport(ModelRequest):
    """The format ``gguf``."""

    format: ClassVar[Format] = "gguf"

    quantization: str | None = None
    """One of `QUANTIZATIONS`; None for ``q4_k_m``."""
    via: ViaChoice | None = None
    """Who lays it out: this package, or llama.cpp's own converter in an environment of its own, installed when it is
    first needed. None, as ``auto``: the converter, if there is no native layout for the model's class."""
    mmproj: bool | None = None
    """Whether to write the base's vision tower next to the GGUF, through llama.cpp's converter; None: if the base has
    one and the converter is installed already."""
    pre: str | None = None
    """llama.cpp's name of the tokenizer's splitting rule, instead of recognizing it."""
    importance: Path | None = None
    """An importance matrix for the quantizers: a file of llama-imatrix, GGUF or .dat."""
    split_bytes: int | None = None
    """Most bytes of tensors per file; a larger GGUF becomes several, and the outcome names the first."""
    verify: bool | None = None
    """Whether to load the GGUF in llama.cpp and compare it with the model; None: if llama.cpp is installed."""
    prompts: Sequence[Messages] | None = None
    """Conversations to compare it on, such as held-out ones; None for the package's own."""
    threads: int | None = None
    """Threads that quantize; None for the machine's cores, at most 8."""

    def plan(self) -> ExportPlan:
        """Every tensor with its type and size, and how long quantizing takes here."""
        source = self.read_source()
        with source.open() as model:
            if self._choose_via(source) == "llama.cpp":
                tensors = plan_tensors(model, read_quantization(self.quantization))
                notes = (
                    NOTE,
                    "names, types and sizes are estimates: the converter decides them",
                    *self._check_towers(model),
                )
            else:
                plan = self._build_plan(source, model)
                tensors, notes = list_planned(plan, model), plan.notes
        return summarize_plan(self._find_target(source), tensors, threads=self.threads, notes=notes)

    def write(self, progress: Progress | None = None) -> ExportOutcome:
        """Write the file or its parts, then verify."""
        begun = time.monotonic()
        read_quantization(self.quantization)
        self._check_split()
        verify = self._decide_to_verify()
        source = self.read_source()
        rendering = source.check_rendering()
        way = self._choose_via(source)
        target = self._find_target(source)
        if self.split_bytes is None:  # how many parts there are is known after the merge only
            self._require_free(target)
        mmproj, notes = plan_towers(source.base, target, wanted=self.mmproj, force=self.force)
        with source.open() as model, self._open_plan(source, model, way, progress) as (plan, weights, others):
            written = self._write_parts(plan, weights, target, progress)
            if mmproj is not None:
                mmproj, notes = write_towers(source.base, mmproj, wanted=self.mmproj)
            parity = None
            if verify:
                parity = verify_gguf(
                    written[0][0],
                    plan,
                    model,
                    base=source.base,
                    tokenizer=source.tokenizer,
                    quantization=read_quantization(self.quantization),
                    trained=self.adapter,
                    prompts=self.prompts,
                    required=bool(self.verify),
                    others=others,
                )
        return ExportOutcome(
            path=written[0][0],
            format=self.format,
            quantization=read_quantization(self.quantization).name,
            bytes=sum(size for _, size, _ in written),
            tensors=len(plan.tensors),
            seconds=time.monotonic() - begun,
            sha256=written[0][2],
            rendering=rendering,
            parity=parity,
            kernels=describe_kernels(),
            notes=(*plan.notes, *notes),
            mmproj=mmproj,
            via="native" if way == "native" else VIA,
        )

    def _choose_via(self, source: Source) -> Via:
        """The way as set, or by the class.

        Raises:
            InvalidSettingError: There is no such way.
            ArchitectureUnsupportedError: llama.cpp's converter does not know the class.
        """
        config = read_config(source.base)
        if self.via not in (None, *get_args(ViaChoice)):
            raise InvalidSettingError(
                f"a GGUF can't be written via {self.via!r}",
                fix="Choose auto, native or llama.cpp: {set:via=auto}",
                setting="via",
            )
        if self.via == "llama.cpp" and not converts(config):
            raise ArchitectureUnsupportedError(f"{VIA} does not know {name_class(config)}")
        return (
            "llama.cpp"
            if self.via == "llama.cpp" or (self.via != "native" and choose_via(config) == "llama.cpp")
            else "native"
        )

    @contextmanager
    def _open_plan(
        self, source: Source, model: FoldedModel, way: Via, progress: Progress | None
    ) -> Iterator[tuple[GgufPlan, Weights, References | None]]:
        """The plan, what its weights are read from, and what else can compute the model."""
        if way == "native":
            yield self._build_plan(source, model), model, None
            return
        notes = self._check_towers(model)
        with open_converted(
            model,
            source,
            self._find_target(source),
            quantization=read_quantization(self.quantization),
            own_type=find_largest_type(model),
            pre=self.pre,
            importance=read_importance(self.importance) if self.importance else None,
            progress=progress,
            threads=self.threads,
        ) as made:
            yield replace(made.plan, notes=(*made.plan.notes, *notes)), made.weights, made.references

    def _check_towers(self, model: FoldedModel) -> tuple[str, ...]:
        towers = [name for name in model.tensors if is_of_tower(name)]
        lost = [name for name in towers if name in model.changed]
        notes = (f"the file holds the language model only; left out: {name_parts(towers)}",) if towers else ()
        return (*notes, *report_left_out(lost, text_only=self.text_only), *note_unreached(model))

    def _find_target(self, source: Source) -> Path:
        return self.output or name_gguf(self.adapter, self.quantization, name=source.name)

    def _build_plan(self, source: Source, model: FoldedModel) -> GgufPlan:
        plan = build_plan(
            model,
            source.base,
            quantization=read_quantization(self.quantization),
            tokenizer=source.tokenizer,
            name=source.name,
            pre=self.pre,
            importance=read_importance(self.importance) if self.importance else None,
            hashes=source.hashes,
        )
        left_out = check_left_out(model, plan.architecture, text_only=self.text_only) if plan.architecture else ()
        notes = (*left_out, *note_unreached(model))
        return replace(plan, notes=(*plan.notes, *notes))

    def _write_parts(
        self, plan: GgufPlan, model: Weights, target: Path, progress: Progress | None
    ) -> list[tuple[Path, int, str]]:
        """Path, bytes and SHA-256 of each file."""
        groups: list[list[TensorPlan]] = cut_plan(plan, self.split_bytes) if self.split_bytes else [list(plan.tensors)]
        count = len(groups)
        paths = [name_split(target, i, count) for i in range(1, count + 1)] if count > 1 else [target]
        for path in paths:
            self._require_free(path)
        require_folder(target.parent)
        require_free_space(target.parent, plan.disk_bytes, f"the {read_quantization(self.quantization).name} GGUF")
        if count > 1:
            written = write_split(plan, model, target, groups, progress=progress, threads=self.threads)
        else:
            written = [write_gguf(plan, model, target, progress=progress, threads=self.threads)]
        return [(path, size, sha256) for path, (size, sha256) in zip(paths, written, strict=True)]

    def _require_free(self, path: Path) -> None:
        require_free_file(path, force=self.force, sources=[self.importance] if self.importance else [])

    def _check_split(self) -> None:
        if self.split_bytes is not None and self.split_bytes < 1:
            raise QuantizationUnknownError(
                "files of no bytes cannot be written", fix="Say how large a file may be: {set:split_bytes=2147483648}"
            )

    def _decide_to_verify(self) -> bool:
        if self.verify and not is_verifiable():
            raise LlamaCppMissingError("the export cannot be verified: xllamacpp or tokenizers is not installed")
        return is_verifiable() if self.verify is None else self.verify


def name_gguf(adapter: StrPath, quantization: str | None = None, *, name: str | None = None) -> Path:
    """Where `GgufExport` writes if no ``output`` is named.

    Args:
        adapter: As there, and so are the others.

    Raises:
        AdapterInvalidError: It is neither an adapter nor a model folder.
        QuantizationUnknownError: There is no such quantization.
    """
    adapter = Path(adapter)
    if name is None:
        name = adapter.resolve().name if is_model(adapter) else name_after(read_adapter_folder(adapter).base)
    return adapter.parent / f"{name}-{read_quantization(quantization).name}.gguf"


def find_own_type(source: Source) -> str:
    """The quantization that changes nothing: the type of the largest tensor of an adapter's base, or of a model.

    Raises:
        CodedError: As `bp_merge.open_model`.
    """
    return find_largest_type(source.open_base())


def find_largest_type(model: FoldedModel | TensorReader) -> str:
    """The type of a model's largest tensor: ``bf16``."""
    return max(model.tensors.values(), key=lambda info: info.bytes).dtype.lower()


def list_planned(plan: GgufPlan, model: FoldedModel) -> tuple[PlannedTensor, ...]:
    """The plan's tensors, for people."""
    return tuple(
        PlannedTensor(t.name, t.source, t.kind.name, t.shape, t.bytes, not model.changed.isdisjoint(t.sources))
        for t in plan.tensors
    )
