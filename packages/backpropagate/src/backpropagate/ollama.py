"""`register_with_ollama`, the Python mirror of `backprop ollama register`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from bp_export.ollama import OllamaModel


def register_with_ollama(
    path: str | Path, name: str, *, system: str | None = None, context: int | None = None, force: bool = False
) -> OllamaModel:
    """Register a GGUF, or a folder of the format ollama-adapter, with the Ollama that runs here (OLLAMA_HOST).

    Args:
        path: The GGUF or the folder.
        name: Its name in Ollama.
        system: A system message that the model gets by default.
        context: Tokens of context; default: chosen by Ollama.
        force: Whether a model of that name may be replaced.

    Raises:
        CodedError: As `bp_export.ollama.register_gguf` and `register_adapter`.
    """
    from backpropagate.exporting import read_ollama_host
    from bp_export import ollama

    register = ollama.register_adapter if Path(path).is_dir() else ollama.register_gguf
    return register(Path(path), name, host=read_ollama_host(os.environ), system=system, context=context, force=force)
