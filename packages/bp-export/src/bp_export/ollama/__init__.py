"""Ollama over its HTTP API: register a GGUF or an adapter, list and remove models."""

from typing import TYPE_CHECKING

from bp_export._lazy import load_lazily

if TYPE_CHECKING:
    from bp_export.ollama.register import (
        OllamaModel,
        ask_model,
        read_license,
        register_adapter,
        register_gguf,
        register_model,
        stream_answer,
    )
    from bp_export.ollama.server import (
        ListedModel,
        find_server,
        list_models,
        remove_model,
        require_ollama,
        takes_adapters,
    )

__all__ = [
    "ListedModel",
    "OllamaModel",
    "ask_model",
    "find_server",
    "list_models",
    "read_license",
    "register_adapter",
    "register_gguf",
    "register_model",
    "remove_model",
    "require_ollama",
    "stream_answer",
    "takes_adapters",
]

_MODULES = {
    "OllamaModel": "register",
    "ask_model": "register",
    "read_license": "register",
    "register_adapter": "register",
    "register_gguf": "register",
    "register_model": "register",
    "stream_answer": "register",
    "ListedModel": "server",
    "find_server": "server",
    "list_models": "server",
    "remove_model": "server",
    "require_ollama": "server",
    "takes_adapters": "server",
}
__getattr__ = load_lazily(__name__, _MODULES)
