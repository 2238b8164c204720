"""What every format has in common: a request with `plan` and `write`, the plan's tensors, and the outcome."""

from __future__ import annotations

import shutil
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import ClassVar, Literal, TypeAlias

import numpy as np
from gguf import GGMLQuantizationType

from bp_export.gguf.writer import count_threads
from bp_export.quant.kernels import quantize_rows
from bp_export.source import Source, read_source
from bp_export.verify.report import ParityReport
from bp_export.verify.template import RenderingCheck

Format: TypeAlias = Literal["gguf", "merged", "lora", "gguf-adapter", "ollama-adapter", "mlx"]
ViaChoice: TypeAlias = Literal["auto", "native", "llama.cpp"]
"""What writes a GGUF: this package; llama.cpp's own converter; or that only for classes without a native layout."""
Progress: TypeAlias = Callable[[int, int], None]
"""Called with bytes done and bytes in all."""

_TRIAL_SHAPE = (32, 2048)
_PATHS = ("adapter", "output", "base", "importance")


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
    """How the GGUF compares with the model in llama.cpp; None if that was not requested or can't be tested here."""
    kernels: str | None = None
    """What quantized the GGUF (`describe_kernels`); None for the other formats."""
    notes: tuple[str, ...] = ()
    """What the user has to know of the file: a context that was capped, tensors that were left out."""
    mmproj: Path | None = None
    """The vision tower's file next to a GGUF; None without one."""
    via: str | None = None
    """Who laid a GGUF out: ``native``, or ``llama.cpp b11434`` for its own converter; None for the other formats."""


@dataclass(frozen=True, slots=True)
class PlannedTensor:
    """One tensor of an export."""

    name: str
    source: str | None
    """In the checkpoint; None for one that is computed."""
    type: str
    """ggml's name (``Q4_K``), or the dtype in safetensors (``BF16``)."""
    shape: tuple[int, ...]
    bytes: int
    is_changed: bool
    """Whether the adapter changes it."""


@dataclass(frozen=True, slots=True)
class ExportPlan:
    """What an export would write."""

    path: Path
    tensors: tuple[PlannedTensor, ...]
    bytes: int
    """Of all tensors."""
    free_bytes: int
    """On the disk of ``path``."""
    seconds: float
    """How long the weights would take on this machine's cores, from a trial of each type."""
    notes: tuple[str, ...] = ()
    """As `ExportOutcome.notes`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportRequest(ABC):
    """What to export and where to; each format is a class that adds what it takes. Paths may be strings."""

    format: ClassVar[Format]

    adapter: Path
    """A PEFT adapter folder, or a Hugging Face model folder (config.json and safetensors)."""
    output: Path | None = None
    """The file or folder to write; by default next to ``adapter``."""
    name: str | None = None
    """A part of the default output, and the GGUF's ``general.name``; by default ``<base>-tuned`` for an adapter, and
    the folder's name for a model."""
    force: bool = False
    """Whether an earlier export may be replaced."""

    def __post_init__(self) -> None:
        known = {field.name for field in fields(self)}
        for key in (key for key in _PATHS if key in known and getattr(self, key) is not None):
            object.__setattr__(self, key, Path(getattr(self, key)))

    @abstractmethod
    def plan(self) -> ExportPlan:
        """What `write` would write; nothing is written.

        Raises:
            CodedError: As `write`, but for those of the disk.
        """

    @abstractmethod
    def write(self, progress: Progress | None = None) -> ExportOutcome:
        """Write it. Nothing half-written is left, nor after Ctrl-C.

        Args:
            progress: Called with bytes done and bytes in all.

        Raises:
            CodedError: Anything in `bp_export.errors` and `bp_merge.errors`, AdapterInvalidError, DiskFullError,
                OutputNotWritableError. Only after ParityFailedError, and where llama.cpp fails (ChatFailedError), the
                whole GGUF is there.
        """


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelRequest(ExportRequest):
    """A request that reads the base's weights too."""

    base: Path | None = None
    """The base's folder, instead of the one that the adapter names."""
    dequantize: bool = False
    """Whether the base is taken as 4 bits leave it: unpacked, if bitsandbytes packed it; else packed and unpacked, as
    QLoRA training saw it."""

    text_only: bool = False
    """Whether what the adapter changes outside of the language model, such as in a vision tower, may be left out."""

    def read_source(self) -> Source:
        """The base and the adapter."""
        return read_source(self.adapter, self.base, self.name, dequantize=self.dequantize)


def summarize_plan(
    path: Path, tensors: tuple[PlannedTensor, ...], *, threads: int | None = None, notes: tuple[str, ...] = ()
) -> ExportPlan:
    """Sum a plan up; tries each type on some 65,000 weights."""
    speeds: Mapping[str, float] = {kind: _measure_speed(kind) for kind in {tensor.type for tensor in tensors}}
    work = sum(int(np.prod(tensor.shape)) / speeds[tensor.type] for tensor in tensors)
    existing = next(p for p in (path, *path.absolute().parents) if p.exists())
    free = shutil.disk_usage(existing).free
    return ExportPlan(path, tensors, sum(t.bytes for t in tensors), free, work / count_threads(threads), notes)


def _measure_speed(kind: str) -> float:
    """Weights per second on one core; for what is no type of ggml's as for 32 bits."""
    rows = np.random.default_rng(0).standard_normal(_TRIAL_SHAPE, np.float32)
    kinds = {member.name: member for member in GGMLQuantizationType}
    begun = time.perf_counter()
    quantize_rows(rows, kinds.get(kind, GGMLQuantizationType.F32))
    return rows.size / max(time.perf_counter() - begun, 1e-9)
