"""A GGUF of whatever was made, for llama.cpp to run: a GGUF as it stands, a folder as a file that goes again."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

from bp_export.chat.server import require_installed
from bp_export.errors import ChatTargetError
from bp_export.formats.gguf import GgufExport, find_own_type
from bp_export.formats.output import read_format
from bp_export.gguf.file import read_settings
from bp_export.local_paths import StrPath

_WHOLE = "Name the adapter's own folder, such as ./output/lora; base and adapter are put together for that."


@contextlib.contextmanager
def open_gguf(
    target: StrPath,
    *,
    base: StrPath | None = None,
    quantization: str | None = None,
    dequantize: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Iterator[Path]:
    """The path of a GGUF.

    Args:
        target: A GGUF, an adapter folder or a model folder.
        base: The base's folder, where it is not the one that the adapter names.
        quantization: What a folder becomes; by default the type of its base's weights.
        dequantize: As `bp_export.export_adapter`.
        progress: Called with bytes done and bytes in all while a folder becomes a file.

    Raises:
        LlamaCppMissingError: llama.cpp is not installed, so that nothing could run it.
        ChatTargetError: There is nothing of that name, or an adapter in a form for others.
        ChatFailedError: It is a file, and no GGUF.
        CodedError: As `bp_export.export_adapter`.
    """
    require_installed()
    target = Path(target)
    if target.is_file():
        if read_settings(target).get("general.type") == "adapter":
            raise ChatTargetError(f"{target} is an adapter and not a model", fix=_WHOLE)
        yield target
        return
    if (format := read_format(target)) in ("mlx", "ollama-adapter"):
        raise ChatTargetError(f"{target} is an adapter in the form of {format}", fix=_WHOLE)
    if not target.is_dir():
        raise ChatTargetError(f"there is no file or folder {target}")
    with tempfile.TemporaryDirectory(prefix="bp-export-") as scratch:
        asked = GgufExport(
            adapter=target,
            output=Path(scratch) / "model.gguf",
            quantization=quantization,
            base=None if base is None else Path(base),
            dequantize=dequantize,
            verify=False,
        )
        if quantization is None:
            asked = replace(asked, quantization=find_own_type(asked.read_source()))
        yield asked.write(progress).path
