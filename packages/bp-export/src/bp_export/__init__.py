"""From a LoRA adapter and its base to one GGUF, a merged folder or another form, without torch.

    bp_export.export_adapter("./output/lora", quantization="q4_k_m")    one call
    bp_export.GgufExport(adapter="./output/lora").plan()                a request: look first, then `write`

Reading starts at `bp_export.formats`, a module per format. `bp_export.gguf.plan` decides a GGUF, and
`bp_export.gguf.writer` writes it. Around them:

    architectures   the GGUF layout of each kind of model       quant    quantizations, kernels, importance matrices
    llama_cpp       llama.cpp's converter, for all other kinds
    tokenizer       vocabulary and splitting rules              verify   the file against the model that was trained
    ollama          register with Ollama                        hub      upload with a model card
    chat            talk to what was made                       cli      the command ``bp-export``

Importing this package imports nothing else; its names load their modules when they are first used.
"""

from typing import TYPE_CHECKING

from bp_export._lazy import load_lazily

if TYPE_CHECKING:
    from bp_export import chat, gguf, hub, ollama, quant, verify
    from bp_export.architectures import ARCHITECTURES, Support, supports
    from bp_export.export import FORMATS, build_request, export_adapter, plan_export
    from bp_export.formats.gguf import GgufExport, name_gguf
    from bp_export.formats.gguf_adapter import GgufAdapterExport
    from bp_export.formats.lora import LoraExport
    from bp_export.formats.merged import MergedExport
    from bp_export.formats.mlx import MlxExport
    from bp_export.formats.ollama_adapter import OllamaAdapterExport
    from bp_export.formats.request import ExportOutcome, ExportPlan, ExportRequest, Format, ViaChoice
    from bp_export.quant.types import QUANTIZATIONS

__all__ = [
    "ARCHITECTURES",
    "FORMATS",
    "QUANTIZATIONS",
    "ExportOutcome",
    "ExportPlan",
    "ExportRequest",
    "Format",
    "GgufAdapterExport",
    "GgufExport",
    "LoraExport",
    "MergedExport",
    "MlxExport",
    "OllamaAdapterExport",
    "Support",
    "ViaChoice",
    "build_request",
    "chat",
    "export_adapter",
    "gguf",
    "hub",
    "name_gguf",
    "ollama",
    "plan_export",
    "quant",
    "supports",
    "verify",
]

_MODULES = {
    "chat": "",
    "gguf": "",
    "hub": "",
    "ollama": "",
    "quant": "",
    "verify": "",
    "ARCHITECTURES": "architectures",
    "Support": "architectures",
    "supports": "architectures",
    "FORMATS": "export",
    "build_request": "export",
    "export_adapter": "export",
    "plan_export": "export",
    "GgufExport": "formats.gguf",
    "name_gguf": "formats.gguf",
    "GgufAdapterExport": "formats.gguf_adapter",
    "LoraExport": "formats.lora",
    "MergedExport": "formats.merged",
    "MlxExport": "formats.mlx",
    "OllamaAdapterExport": "formats.ollama_adapter",
    "ExportOutcome": "formats.request",
    "ExportPlan": "formats.request",
    "ExportRequest": "formats.request",
    "Format": "formats.request",
    "ViaChoice": "formats.request",
    "QUANTIZATIONS": "quant.types",
}
__getattr__ = load_lazily(__name__, _MODULES)
