"""Base models that train well on one GPU, under short names: license, sizes and a word on each.

Sizes are those of the model's own config.json, so that memory is known without a download.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from backpropagate.system import path_exists
from bp_runs.events import Notice


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelPreset:
    """One base model."""

    name: str
    """The word after ``--model``."""
    model: str
    """Hub id."""
    licence: str
    restriction: str = ""
    """What the license forbids that a user might not expect; empty: nothing."""
    note: str
    config: Mapping[str, Any]
    """What memory depends on, as in config.json."""


def _sizes(kind: str, vocabulary: int, hidden: int, inner: int, layers: int, heads: int, keys: int, **more: Any) -> Any:  # noqa: PLR0917
    return MappingProxyType(
        {
            "model_type": kind,
            "vocab_size": vocabulary,
            "hidden_size": hidden,
            "intermediate_size": inner,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "num_key_value_heads": keys,
            **more,
        }
    )


_LLAMA = "Llama 3.2 Community"
_ALL = (
    ModelPreset(
        name="qwen2.5-7b",
        model="Qwen/Qwen2.5-7B-Instruct",
        licence="Apache-2.0",
        note="the default: strong and well supported",
        config=_sizes("qwen2", 152064, 3584, 18944, 28, 28, 4, tie_word_embeddings=False),
    ),
    ModelPreset(
        name="qwen3.5-4b",
        model="Qwen/Qwen3.5-4B",
        licence="Apache-2.0",
        note="the recommended small one; linear attention in three of four layers",
        config=_sizes("qwen3_5_text", 248320, 2560, 9216, 32, 16, 4, head_dim=256, tie_word_embeddings=True),
    ),
    ModelPreset(
        name="phi-4-mini-3.8b",
        model="microsoft/Phi-4-mini-instruct",
        licence="MIT",
        note="good at reasoning and mathematics for its size",
        config=_sizes("phi3", 200064, 3072, 8192, 32, 24, 8, tie_word_embeddings=True),
    ),
    ModelPreset(
        name="smollm3-3b",
        model="HuggingFaceTB/SmolLM3-3B",
        licence="Apache-2.0",
        note="fully open, data included; can be fine-tuned in full on 16 GB",
        config=_sizes("smollm3", 128256, 2048, 11008, 36, 16, 4, tie_word_embeddings=True),
    ),
    ModelPreset(
        name="qwen2.5-3b",
        model="Qwen/Qwen2.5-3B-Instruct",
        licence="Qwen Research",
        restriction="research only: no commercial use",
        note="for experiments",
        config=_sizes("qwen2", 151936, 2048, 11008, 36, 16, 2, tie_word_embeddings=True),
    ),
    ModelPreset(
        name="llama-3.2-3b",
        model="meta-llama/Llama-3.2-3B-Instruct",
        licence=_LLAMA,
        note="gated: accept the licence on its Hub page first",
        config=_sizes("llama", 128256, 3072, 8192, 28, 24, 8, head_dim=128, tie_word_embeddings=True),
    ),
    ModelPreset(
        name="llama-3.2-1b",
        model="meta-llama/Llama-3.2-1B-Instruct",
        licence=_LLAMA,
        note="the smallest; gated: accept the licence on its Hub page first",
        config=_sizes("llama", 128256, 2048, 8192, 16, 32, 8, head_dim=64, tie_word_embeddings=True),
    ),
    ModelPreset(
        name="mistral-7b",
        model="mistralai/Mistral-7B-Instruct-v0.3",
        licence="Apache-2.0",
        note="small vocabulary, so light for its size",
        config=_sizes("mistral", 32768, 4096, 14336, 32, 32, 8, head_dim=128, tie_word_embeddings=False),
    ),
)
MODEL_PRESETS: Mapping[str, ModelPreset] = MappingProxyType({preset.name: preset for preset in _ALL})


def find_preset(name: str) -> ModelPreset | None:
    """The preset of that name or Hub id; a folder of the same name goes first."""
    if path_exists(name):
        return None
    by_id = {preset.model.lower(): preset for preset in _ALL}
    return MODEL_PRESETS.get(name.lower()) or by_id.get(name.lower())


def remarks(model: str, chosen: str) -> list[Notice]:
    """What the user should know of the model's license and of the LoRA preset that was chosen.

    Args:
        chosen: As `backpropagate.memory_estimate.settle_lora` says.
    """
    found = [Notice(message=chosen)] if chosen else []
    preset = find_preset(model)
    if preset is not None and preset.restriction:
        warning = f"{preset.model} is under the licence {preset.licence}: {preset.restriction}"
        found.append(Notice(message=warning, level="warning", details={"licence": preset.licence}))
    return found
