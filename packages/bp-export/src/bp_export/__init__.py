"""From a LoRA adapter and its base to one GGUF, or a merged folder, in one streaming pass without torch.

Importing this package imports nothing else; its names load their modules when they are first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bp_export.chat.llama import LlamaChat
    from bp_export.chat.session import Manner, OllamaTalk, Talk, ask_once, converse, open_talk
    from bp_export.export import ExportOutcome, Format, export_adapter, name_gguf, plan_export
    from bp_export.formats.temporary import open_gguf
    from bp_export.gguf.dry_run import ExportPlan
    from bp_export.gguf.file import read_settings, read_stop_strings
    from bp_export.hub.push import Prepared, PushOutcome, prepare_push, push, read_token
    from bp_export.ollama.register import (
        OllamaModel,
        ask_model,
        read_license,
        register_adapter,
        register_gguf,
        stream_answer,
    )
    from bp_export.ollama.server import ListedModel, list_models, remove_model, require_ollama, takes_adapters
    from bp_export.quant.kernels import describe_kernels
    from bp_export.quant.measure import Measured, measure_importance
    from bp_export.quant.types import QUANTIZATIONS, USUAL_QUANTIZATION
    from bp_export.verify.parity import is_verifiable
    from bp_export.verify.report import BOUNDS, Bound, ParityCheck, ParityReport

__all__ = [
    "BOUNDS",
    "QUANTIZATIONS",
    "USUAL_QUANTIZATION",
    "Bound",
    "ExportOutcome",
    "ExportPlan",
    "Format",
    "ListedModel",
    "LlamaChat",
    "Manner",
    "Measured",
    "OllamaModel",
    "OllamaTalk",
    "ParityCheck",
    "ParityReport",
    "Prepared",
    "PushOutcome",
    "Talk",
    "ask_model",
    "ask_once",
    "converse",
    "describe_kernels",
    "export_adapter",
    "is_verifiable",
    "list_models",
    "measure_importance",
    "name_gguf",
    "open_gguf",
    "open_talk",
    "plan_export",
    "prepare_push",
    "push",
    "read_license",
    "read_settings",
    "read_stop_strings",
    "read_token",
    "register_adapter",
    "register_gguf",
    "remove_model",
    "require_ollama",
    "stream_answer",
    "takes_adapters",
]

_MODULES = {
    "Measured": "quant.measure",
    "measure_importance": "quant.measure",
    "open_gguf": "formats.temporary",
    "Prepared": "hub.push",
    "PushOutcome": "hub.push",
    "prepare_push": "hub.push",
    "push": "hub.push",
    "read_token": "hub.push",
    "Manner": "chat.session",
    "OllamaTalk": "chat.session",
    "Talk": "chat.session",
    "ask_once": "chat.session",
    "converse": "chat.session",
    "open_talk": "chat.session",
    "ListedModel": "ollama.server",
    "ask_model": "ollama.register",
    "list_models": "ollama.server",
    "read_license": "ollama.register",
    "register_adapter": "ollama.register",
    "remove_model": "ollama.server",
    "require_ollama": "ollama.server",
    "stream_answer": "ollama.register",
    "takes_adapters": "ollama.server",
    "ExportPlan": "gguf.dry_run",
    "name_gguf": "export",
    "plan_export": "export",
    "BOUNDS": "verify.report",
    "Bound": "verify.report",
    "ParityCheck": "verify.report",
    "ParityReport": "verify.report",
    "is_verifiable": "verify.parity",
    "QUANTIZATIONS": "quant.types",
    "USUAL_QUANTIZATION": "quant.types",
    "describe_kernels": "quant.kernels",
    "ExportOutcome": "export",
    "Format": "export",
    "LlamaChat": "chat.llama",
    "OllamaModel": "ollama.register",
    "export_adapter": "export",
    "read_settings": "gguf.file",
    "read_stop_strings": "gguf.file",
    "register_gguf": "ollama.register",
}


def __getattr__(name: str) -> Any:
    module = _MODULES.get(name)
    if module is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{module}"), name)
