"""An adapter as llama.cpp loads it next to a base: a GGUF with ``lora_a`` and ``lora_b`` for each tensor.

llama.cpp knows one factor for all modules where PEFT may have several, so what differs is multiplied into B. Only
adapters that are nothing but ``scale * B @ A`` on linear weights have such a form.
"""

from __future__ import annotations

import time
from abc import abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
from gguf import GGUFType, GGUFWriter, Keys

from bp_export.architectures import Architecture, find_architecture
from bp_export.errors import AdapterFormatError
from bp_export.formats.left_out import check_left_out
from bp_export.formats.output import require_free_file
from bp_export.formats.request import (
    ExportOutcome,
    ExportPlan,
    Format,
    ModelRequest,
    PlannedTensor,
    Progress,
    summarize_plan,
)
from bp_export.gguf.file import GgufStream, add_tensor
from bp_export.gguf.plan import list_left_out
from bp_export.model_config import fit_config
from bp_export.quant.kernels import TensorType
from bp_export.source import Source, read_config
from bp_merge import Floats, FoldedModel, LoraAdapter, list_joined_modules, parse_expert, strip_wrappers
from bp_runs.files import require_folder


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterRequest(ModelRequest):
    """A request that writes the adapter alone in GGUF's names, for which the base has to be known."""

    ending: ClassVar[str]
    """Of the default output."""

    def plan(self) -> ExportPlan:
        """The adapter's tensors."""
        source, adapter = self._read()
        with source.open() as model:
            architecture = find_architecture(fit_config(read_config(source.base), model))
            notes = self._check(model, architecture)
            values = build_adapter_tensors(model, adapter, architecture)
        planned = tuple(PlannedTensor(n, None, "F32", v.shape, v.nbytes, is_changed=True) for n, v in values.items())
        return summarize_plan(self.find_target(source), planned, notes=notes)

    def write(self, progress: Progress | None = None) -> ExportOutcome:
        """Write the file or folder."""
        del progress  # adapters are small
        begun = time.monotonic()
        source, adapter = self._read()
        rendering = source.check_rendering()
        target = self.find_target(source)
        with source.open() as model:
            architecture = find_architecture(fit_config(read_config(source.base), model))
            notes = self._check(model, architecture)
            tensors, size, sha256 = self.write_adapter(source, model, adapter, architecture, target)
        seconds = time.monotonic() - begun
        return ExportOutcome(target, self.format, None, size, tensors, seconds, sha256, rendering, notes=notes)

    def find_target(self, source: Source) -> Path:
        """Where it is written."""
        return self.output or self.adapter.parent / f"{source.name}{self.ending}"

    @abstractmethod
    def write_adapter(
        self, source: Source, model: FoldedModel, adapter: LoraAdapter, architecture: Architecture, target: Path
    ) -> tuple[int, int, str]:
        """Write it; returns tensors, bytes of all files, and the SHA-256 of the GGUF."""

    def _read(self) -> tuple[Source, LoraAdapter]:
        source = self.read_source()
        if source.adapter is None:
            raise AdapterFormatError(f"{source.base} is a model and not an adapter")
        require_plain(source.adapter, self.format)
        return source, source.adapter

    def _check(self, model: FoldedModel, architecture: Architecture) -> tuple[str, ...]:
        """Notes for the user."""
        if any(strip_wrappers(name) == "lm_head.weight" for name in model.tensors.keys() - model.base_tensors.keys()):
            raise AdapterFormatError("the adapter changes the head of a tied model, and llama.cpp has no head there")
        return (*architecture.notes, *check_left_out(model, architecture, text_only=self.text_only))


@dataclass(frozen=True, slots=True, kw_only=True)
class GgufAdapterExport(AdapterRequest):
    """The format ``gguf-adapter``."""

    format: ClassVar[Format] = "gguf-adapter"
    ending: ClassVar[str] = "-lora.gguf"

    def write_adapter(
        self, source: Source, model: FoldedModel, adapter: LoraAdapter, architecture: Architecture, target: Path
    ) -> tuple[int, int, str]:
        """Write the file."""
        require_free_file(target, force=self.force)
        require_folder(target.parent)
        return write_gguf_adapter(model, adapter, architecture, target, name=source.name)


def require_plain(adapter: LoraAdapter, format: str) -> None:
    """Reject what the format cannot say.

    Raises:
        AdapterFormatError: The adapter is more than pairs on linear weights.
    """
    if not adapter.is_plain:
        raise AdapterFormatError(
            f"{adapter.folder.path} holds more than LoRA on linear weights, which {format} cannot say"
        )
    experts = [module for module in adapter.modules if parse_expert(f"{module}.weight")]
    if experts := experts or list(list_joined_modules(adapter)):
        raise AdapterFormatError(f"the adapter changes single experts, such as {experts[0]}, which {format} cannot say")


def write_gguf_adapter(
    model: FoldedModel, adapter: LoraAdapter, architecture: Architecture, path: Path, *, name: str
) -> tuple[int, int, str]:
    """Write ``<tensor>.lora_a`` (r, d_in) and ``.lora_b`` (d_out, r) in float32, as llama.cpp reads an adapter.

    Args:
        model: The base with the adapter, which knows which tensor each module is.
        adapter: The adapter; `require_plain` comes first.
        architecture: The base's layout.
        path: The file.
        name: Becomes ``general.name``.

    Returns:
        Tensors, bytes and hex SHA-256.
    """
    tensors = build_adapter_tensors(model, adapter, architecture)
    writer = GGUFWriter(path=None, arch=architecture.name)
    writer.add_type(GGUFType.ADAPTER)
    writer.add_string(Keys.Adapter.TYPE, "lora")
    writer.add_float32(Keys.Adapter.LORA_ALPHA, adapter.folder.alpha)
    writer.add_name(name)
    for key, values in tensors.items():
        add_tensor(writer, key, values.shape, TensorType.F32, values.nbytes)
    with GgufStream(path, writer) as stream:
        for values in tensors.values():
            stream.write_tensor([np.ascontiguousarray(values, "<f4").tobytes()])
        size, sha256 = stream.publish()
    return len(tensors), size, sha256


def build_adapter_tensors(model: FoldedModel, adapter: LoraAdapter, architecture: Architecture) -> dict[str, Floats]:
    """``<tensor>.lora_a`` (r, d_in) and ``.lora_b`` (d_out, r) of each pair, by GGUF name."""
    tensors: dict[str, Floats] = {}
    left_out = {*list_left_out(model, architecture)}
    for source, pair in model.pairs.items():
        if source in left_out:
            continue
        clean = architecture.clean_name(source)
        change = architecture.plan_change(clean, model.tensors[source].shape)
        target = architecture.map_name(source)
        # llama.cpp multiplies by alpha / r, with one alpha for all.
        factor = np.float32(pair.scale * pair.a.shape[0] / adapter.folder.alpha)
        tensors[f"{target}.lora_a"] = pair.a if change.columns is None else pair.a[:, change.columns]
        tensors[f"{target}.lora_b"] = (pair.b if change.rows is None else pair.b[change.rows]) * factor
    return tensors
