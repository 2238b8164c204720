"""One run of llama.cpp's converter in its own environment."""

from __future__ import annotations

import re
from pathlib import Path

from bp_export.errors import ConversionFailedError
from bp_export.llama_cpp.classes import VIA
from bp_export.llama_cpp.environment import Converter

_LAST_WORDS = 600
_REASON = re.compile(r"^(?:\w+\.)*\w*(?:Error|Exception|Exit|Interrupt)\b.*", re.MULTILINE)


def convert_folder(
    converter: Converter, model: Path, output: Path, *, type: str, without_vocabulary: bool, vision: bool = False
) -> Path:
    """Convert a Hugging Face folder to a GGUF.

    Args:
        converter: The environment.
        model: The folder.
        output: The file to write.
        type: ``f32``, ``f16`` or ``bf16``, for the matrices.
        without_vocabulary: Whether the tokenizer is left out.
        vision: Write the vision or audio tower instead of the language model, as an ``mmproj`` file.

    Returns:
        The file: the converter puts ``mmproj-`` before the name of a tower's.

    Raises:
        ConversionFailedError: It fails, or writes nothing; the cause is its own last words.
    """
    request = {
        "task": "convert",
        "model": str(model),
        "output": str(output),
        "type": type,
        "without_vocabulary": without_vocabulary,
        "vision": vision,
    }
    status, _, words = converter.run("driver", request)
    written = next((path for path in _name_outputs(output, vision=vision) if path.is_file()), None)
    if status or written is None:
        raise ConversionFailedError(
            f"{VIA} cannot convert {model.name}", cause=_find_reason(words), details={"output": words[-4000:]}
        )
    return written


def _name_outputs(output: Path, *, vision: bool) -> list[Path]:
    return [output.with_name(f"mmproj-{output.name}"), output] if vision else [output]


def _find_reason(words: str) -> str:
    """The last line that names an exception, else the last words."""
    lines = _REASON.findall(words)
    return str(lines[-1]) if lines else words[-_LAST_WORDS:]
