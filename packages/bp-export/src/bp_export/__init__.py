"""From a LoRA adapter and its base to one GGUF, or a merged folder, in one streaming pass without torch.

Importing this package imports nothing else; its names load their modules when they are first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bp_export.chat import LlamaChat
    from bp_export.dryrun import ExportPlan
    from bp_export.export import ExportOutcome, Format, export_adapter, name_gguf, plan_export
    from bp_export.gguf import read_settings, read_stop_strings
    from bp_export.hub import Prepared, PushOutcome, prepare_push, push, read_token
    from bp_export.measuring import Measured, measure_importance
    from bp_export.mixture import QUANTIZATIONS, USUAL_QUANTIZATION
    from bp_export.ollama import OllamaModel, ask_model, read_license, register_adapter, register_gguf, stream_answer
    from bp_export.ollamaserver import ListedModel, list_models, remove_model, require_ollama, takes_adapters
    from bp_export.onloan import open_gguf
    from bp_export.parity import is_verifiable
    from bp_export.quantize import describe_kernels
    from bp_export.report import BOUNDS, Bound, ParityCheck, ParityReport
    from bp_export.talk import Manner, OllamaTalk, Talk, ask_once, converse, open_talk

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
    "Measured": "measuring",
    "measure_importance": "measuring",
    "open_gguf": "onloan",
    "Prepared": "hub",
    "PushOutcome": "hub",
    "prepare_push": "hub",
    "push": "hub",
    "read_token": "hub",
    "Manner": "talk",
    "OllamaTalk": "talk",
    "Talk": "talk",
    "ask_once": "talk",
    "converse": "talk",
    "open_talk": "talk",
    "ListedModel": "ollamaserver",
    "ask_model": "ollama",
    "list_models": "ollamaserver",
    "read_license": "ollama",
    "register_adapter": "ollama",
    "remove_model": "ollamaserver",
    "require_ollama": "ollamaserver",
    "stream_answer": "ollama",
    "takes_adapters": "ollamaserver",
    "ExportPlan": "dryrun",
    "name_gguf": "export",
    "plan_export": "export",
    "BOUNDS": "report",
    "Bound": "report",
    "ParityCheck": "report",
    "ParityReport": "report",
    "is_verifiable": "parity",
    "QUANTIZATIONS": "mixture",
    "USUAL_QUANTIZATION": "mixture",
    "describe_kernels": "quantize",
    "ExportOutcome": "export",
    "Format": "export",
    "LlamaChat": "chat",
    "OllamaModel": "ollama",
    "export_adapter": "export",
    "read_settings": "gguf",
    "read_stop_strings": "gguf",
    "register_gguf": "ollama",
}


def __getattr__(name: str) -> Any:
    module = _MODULES.get(name)
    if module is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{module}"), name)
