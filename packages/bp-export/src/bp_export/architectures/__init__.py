"""One GGUF layout a file, and the table that finds it by the name in ``config.json``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal, TypeAlias

from bp_export.architectures.cohere import Cohere2Architecture, CohereArchitecture
from bp_export.architectures.decoder import Architecture
from bp_export.architectures.exaone4 import Exaone4Architecture
from bp_export.architectures.gemma2 import Gemma2Architecture
from bp_export.architectures.gemma3 import Gemma3Architecture
from bp_export.architectures.glm4 import Glm4Architecture
from bp_export.architectures.gpt_oss import GptOssArchitecture
from bp_export.architectures.granite import GraniteArchitecture
from bp_export.architectures.hunyuan import HunyuanArchitecture
from bp_export.architectures.lfm2 import Lfm2Architecture
from bp_export.architectures.llama import LlamaArchitecture
from bp_export.architectures.mistral3 import Mistral3Architecture
from bp_export.architectures.mixtral import MixtralArchitecture
from bp_export.architectures.olmo2 import Olmo2Architecture, Olmo3Architecture
from bp_export.architectures.olmoe import OlmoeArchitecture
from bp_export.architectures.phi3 import Phi3Architecture
from bp_export.architectures.qwen2 import Qwen2Architecture
from bp_export.architectures.qwen2moe import Qwen2MoeArchitecture, Qwen3MoeArchitecture
from bp_export.architectures.qwen3 import Qwen3Architecture
from bp_export.architectures.qwen35 import Qwen35Architecture
from bp_export.architectures.smollm3 import SmolLm3Architecture
from bp_export.errors import ArchitectureUnsupportedError, ModelInvalidError
from bp_export.llama_cpp.classes import VIA, converts, name_class
from bp_export.model_config import complete_config

ARCHITECTURES: Mapping[str, type[Architecture]] = MappingProxyType(
    {
        "LlamaForCausalLM": LlamaArchitecture,
        "MistralForCausalLM": LlamaArchitecture,
        "Ministral3ForCausalLM": Mistral3Architecture,
        "Mistral3ForConditionalGeneration": Mistral3Architecture,
        "SmolLM3ForCausalLM": SmolLm3Architecture,
        "Qwen2ForCausalLM": Qwen2Architecture,
        "Qwen3ForCausalLM": Qwen3Architecture,
        "Qwen3MoeForCausalLM": Qwen3MoeArchitecture,
        "Qwen2MoeForCausalLM": Qwen2MoeArchitecture,
        "MixtralForCausalLM": MixtralArchitecture,
        "OlmoeForCausalLM": OlmoeArchitecture,
        "GptOssForCausalLM": GptOssArchitecture,
        "Qwen3_5ForCausalLM": Qwen35Architecture,
        "Qwen3_5ForConditionalGeneration": Qwen35Architecture,
        "GraniteForCausalLM": GraniteArchitecture,
        "Olmo2ForCausalLM": Olmo2Architecture,
        "Olmo3ForCausalLM": Olmo3Architecture,
        "Glm4ForCausalLM": Glm4Architecture,
        "Lfm2ForCausalLM": Lfm2Architecture,
        "Exaone4ForCausalLM": Exaone4Architecture,
        "CohereForCausalLM": CohereArchitecture,
        "Cohere2ForCausalLM": Cohere2Architecture,
        "HunYuanDenseV1ForCausalLM": HunyuanArchitecture,
        "Phi3ForCausalLM": Phi3Architecture,
        "Gemma2ForCausalLM": Gemma2Architecture,
        "Gemma3ForCausalLM": Gemma3Architecture,
        "Gemma3ForConditionalGeneration": Gemma3Architecture,
    }
)

__all__ = [
    "ARCHITECTURES",
    "Architecture",
    "Support",
    "Via",
    "choose_via",
    "find_architecture",
    "supports",
]


Via: TypeAlias = Literal["native", "llama.cpp"]
"""Who lays a GGUF out: this package, or llama.cpp's own converter."""


@dataclass(frozen=True, slots=True)
class Support:
    """Whether and how a model becomes a GGUF; true if it does."""

    architecture: str
    """transformers' name of the class, as ``config.json`` has it."""
    via: Via | None
    """None if neither can."""
    reason: str = ""
    """Why there is no native layout for it; empty if there is."""

    def __bool__(self) -> bool:
        return self.via is not None

    @property
    def words(self) -> str:
        """For people: ``native``, ``via llama.cpp b11434`` or ``no``."""
        return {"native": "native", "llama.cpp": f"via {VIA}", None: "no"}[self.via]


def supports(config: Mapping[str, Any]) -> Support:
    """Whether and how a model of this ``config.json`` can be written as GGUF, without its weights.

    A class with a native layout whose options that cannot hold is not handed to llama.cpp's converter by itself: that
    may drop the option without a word.
    """
    name = name_class(config)
    try:
        find_architecture(config)
    except (ArchitectureUnsupportedError, ModelInvalidError) as error:
        return Support(name, choose_via(config), error.message)
    return Support(name, "native")


def choose_via(config: Mapping[str, Any]) -> Via | None:
    """Who lays out a model of this class by default; None if neither knows it, or the native layout rejects it."""
    if name_class(config) in ARCHITECTURES:
        try:
            find_architecture(config)
        except (ArchitectureUnsupportedError, ModelInvalidError):
            return None
        return "native"
    return "llama.cpp" if converts(config) else None


def find_architecture(config: Mapping[str, Any]) -> Architecture:
    """The layout for a model's ``config.json``.

    Raises:
        ArchitectureUnsupportedError: There is none for it, or it has an option that the layout cannot say.
        ModelInvalidError: A setting that the layout needs is missing.
    """
    config = complete_config(config)
    name = name_class(config)
    found = ARCHITECTURES.get(name)
    if found is None:
        known = f"llama.cpp's own converter ({VIA}) can write it"
        raise ArchitectureUnsupportedError(
            f"{name} has no native GGUF layout"
            + (f"; {known}" if converts(config) else f", and {VIA} has none either"),
            fix=(
                "Write a GGUF by llama.cpp's converter: {set:format=gguf} {set:via=llama.cpp}"
                if converts(config)
                else None
            ),
            details={"architecture": name, "known": list(ARCHITECTURES)},
        )
    return found({**config, **(config.get("text_config") or {})})
