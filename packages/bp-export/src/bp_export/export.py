"""Export by format: builds the format's request from keywords, and rejects those that the format does not take."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from types import MappingProxyType
from typing import Any

from bp_export.errors import QuantizationUnknownError
from bp_export.formats.gguf import GgufExport
from bp_export.formats.gguf_adapter import GgufAdapterExport
from bp_export.formats.lora import LoraExport
from bp_export.formats.merged import MergedExport
from bp_export.formats.mlx import MlxExport
from bp_export.formats.ollama_adapter import OllamaAdapterExport
from bp_export.formats.request import ExportOutcome, ExportPlan, ExportRequest, Format, Progress
from bp_runs.errors import InvalidSettingError

FORMATS: Mapping[str, type[ExportRequest]] = MappingProxyType(
    {
        row.format: row
        for row in (GgufExport, MergedExport, LoraExport, GgufAdapterExport, OllamaAdapterExport, MlxExport)
    }
)
"""The request of each format."""
# Where the base is, how fast to work and how to check: without effect on the formats that don't read that.
_HARMLESS = frozenset({"base", "dequantize", "threads", "verify", "prompts", "text_only"})


def build_request(adapter: str | os.PathLike[str], format: str = "gguf", **options: Any) -> ExportRequest:
    """The request for a format.

    Args:
        adapter: An adapter or model folder.
        format: One of `FORMATS`.
        **options: The fields of the format's request; None for one that is not given.

    Raises:
        QuantizationUnknownError: There is no such format.
        InvalidSettingError: An option is for another format.
    """
    kind = FORMATS.get(format)
    if kind is None:
        raise QuantizationUnknownError(f"there is no format {format!r}; there are {', '.join(FORMATS)}")
    own = {field.name for field in fields(kind)}
    given = {name: value for name, value in options.items() if value is not None}
    known = {field.name for row in FORMATS.values() for field in fields(row)}
    if unknown := sorted(set(given) - known):
        raise TypeError(f"an export takes no {unknown[0]!r}")
    wrong = [name for name, value in given.items() if name not in {*own, *_HARMLESS} and value is not False]
    if wrong:
        _refuse(wrong[0], format)
    return kind(adapter=Path(adapter), **{name: value for name, value in given.items() if name in own})


def _refuse(name: str, format: str) -> None:
    takes = [row for row, kind in FORMATS.items() if name in {field.name for field in fields(kind)}]
    raise InvalidSettingError(
        f"{{set:{name}}} is for the format {' or '.join(takes)}, and this is {format}",
        fix=f"Leave it out: {{set:{name}}}",
        setting=name,
    )


def export_adapter(
    adapter: str | os.PathLike[str], *, format: Format = "gguf", progress: Progress | None = None, **options: Any
) -> ExportOutcome:
    """Export an adapter folder, or a model folder that has no adapter: `build_request`, then `ExportRequest.write`.

    Raises:
        CodedError: As those.
    """
    return build_request(adapter, format, **options).write(progress)


def plan_export(adapter: str | os.PathLike[str], *, format: Format = "gguf", **options: Any) -> ExportPlan:
    """What `export_adapter` with the same arguments would write; nothing is written.

    Raises:
        CodedError: As `export_adapter`, but for those of the disk.
    """
    return build_request(adapter, format, **options).plan()
