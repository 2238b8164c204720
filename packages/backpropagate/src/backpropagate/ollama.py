"""`register_with_ollama`, the Python mirror of `backprop ollama register`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from bp_export.ollama import OllamaModel


def register_with_ollama(
    path: str | Path,
    name: str,
    *,
    system: str | None = None,
    context: int | None = None,
    trained: str | Path | None = None,
    force: bool = False,
) -> OllamaModel:
    """Register a GGUF, or a folder of the format ollama-adapter, with the Ollama that runs here (OLLAMA_HOST).

    Args:
        path: The GGUF or the folder.
        name: Its name in Ollama.
        system: A system message that the model gets by default.
        context: Tokens of context; default: chosen by Ollama.
        trained: The adapter's folder, whose witness of training the model in Ollama is compared with.
        force: Whether a model of that name may be replaced.

    Raises:
        CodedError: As `bp_export.ollama.register_model`.
    """
    from backpropagate.exporting import read_ollama_host
    from bp_export import ollama

    host = read_ollama_host(os.environ)
    return ollama.register_model(path, name, host=host, system=system, context=context, trained=trained, force=force)
