"""One GGUF layout a file, and the table that finds it by the name in ``config.json``."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from bp_export.architectures.decoder import Architecture
from bp_export.architectures.gemma2 import Gemma2Architecture
from bp_export.architectures.gemma3 import Gemma3Architecture
from bp_export.architectures.granite import GraniteArchitecture
from bp_export.architectures.llama import LlamaArchitecture
from bp_export.architectures.olmo2 import Olmo2Architecture
from bp_export.architectures.phi3 import Phi3Architecture
from bp_export.architectures.qwen2 import Qwen2Architecture
from bp_export.architectures.qwen3 import Qwen3Architecture
from bp_export.architectures.qwen3moe import Qwen3MoeArchitecture
from bp_export.architectures.qwen35 import Qwen35Architecture
from bp_export.architectures.smollm3 import SmolLm3Architecture
from bp_export.errors import ArchitectureUnsupportedError, ModelInvalidError
from bp_export.model_config import complete_config

ARCHITECTURES: Mapping[str, type[Architecture]] = MappingProxyType(
    {
        "LlamaForCausalLM": LlamaArchitecture,
        "MistralForCausalLM": LlamaArchitecture,
        "SmolLM3ForCausalLM": SmolLm3Architecture,
        "Qwen2ForCausalLM": Qwen2Architecture,
        "Qwen3ForCausalLM": Qwen3Architecture,
        "Qwen3MoeForCausalLM": Qwen3MoeArchitecture,
        "Qwen3_5ForCausalLM": Qwen35Architecture,
        "Qwen3_5ForConditionalGeneration": Qwen35Architecture,
        "GraniteForCausalLM": GraniteArchitecture,
        "Olmo2ForCausalLM": Olmo2Architecture,
        "Phi3ForCausalLM": Phi3Architecture,
        "Gemma2ForCausalLM": Gemma2Architecture,
        "Gemma3ForCausalLM": Gemma3Architecture,
        "Gemma3ForConditionalGeneration": Gemma3Architecture,
    }
)

__all__ = ["ARCHITECTURES", "Architecture", "find_architecture", "supports"]


def find_architecture(config: Mapping[str, Any]) -> Architecture:
    """The layout for a model's ``config.json``.

    Raises:
        ArchitectureUnsupportedError: There is none for it, or it has an option that the layout cannot say.
        ModelInvalidError: A setting that the layout needs is missing.
    """
    config = complete_config(config)
    names = config.get("architectures") or ["(none named)"]
    found = ARCHITECTURES.get(str(names[0]))
    if found is None:
        raise ArchitectureUnsupportedError(
            f"{names[0]} cannot be written as GGUF yet; {', '.join(ARCHITECTURES)} can",
            details={"architecture": str(names[0]), "known": list(ARCHITECTURES)},
        )
    return found({**config, **(config.get("text_config") or {})})


def supports(config: Mapping[str, Any]) -> bool:
    """Whether a model of this ``config.json`` can be written as GGUF; `find_architecture` says why not."""
    try:
        find_architecture(config)
    except (ArchitectureUnsupportedError, ModelInvalidError):
        return False
    return True
