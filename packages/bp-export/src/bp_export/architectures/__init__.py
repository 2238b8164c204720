"""One GGUF layout a file, and the table that finds it by the name in ``config.json``."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from bp_export.architectures.decoder import Architecture
from bp_export.architectures.llama import LlamaArchitecture
from bp_export.architectures.qwen2 import Qwen2Architecture
from bp_export.errors import ArchitectureUnsupportedError

ARCHITECTURES: Mapping[str, type[Architecture]] = MappingProxyType(
    {
        "LlamaForCausalLM": LlamaArchitecture,
        "MistralForCausalLM": LlamaArchitecture,
        "Qwen2ForCausalLM": Qwen2Architecture,
    }
)

__all__ = ["ARCHITECTURES", "Architecture", "find_architecture"]


def find_architecture(config: Mapping[str, Any]) -> Architecture:
    """The layout for a model's ``config.json``.

    Raises:
        ArchitectureUnsupportedError: There is none for it, or it has an option that the layout cannot say.
        ModelInvalidError: A setting that the layout needs is missing.
    """
    names = config.get("architectures") or ["(none named)"]
    found = ARCHITECTURES.get(str(names[0]))
    if found is None:
        raise ArchitectureUnsupportedError(
            f"{names[0]} cannot be written as GGUF yet; {', '.join(ARCHITECTURES)} can",
            details={"architecture": str(names[0]), "known": list(ARCHITECTURES)},
        )
    return found(config)
