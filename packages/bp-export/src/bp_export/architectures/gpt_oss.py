"""Arch ``gpt-oss``: attention with sinks and biases, every other layer within a window, experts with clamped SwiGLU."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gguf import MODEL_ARCH, GGUFWriter, LlamaFileType

from bp_export.architectures.decoder import Architecture

_MODULES = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.router")
_EXPERTS = ("mlp.experts.gate_proj", "mlp.experts.up_proj", "mlp.experts.down_proj")
_SWIGLU = {"swiglu_alpha": 1.702, "swiglu_limit": 7.0}


class GptOssArchitecture(Architecture):
    """Which layers have a window, and the numbers of SwiGLU, are fixed in llama.cpp; so other choices are rejected."""

    gguf_arch = MODEL_ARCH.GPT_OSS
    biases = frozenset({*_MODULES, *_EXPERTS})
    has_windows = True
    tells_head_width = True
    default_head_width = 64
    has_experts = True
    needs_head = True

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__(config)
        usual = ["full_attention" if i % 2 else "sliding_attention" for i in range(self.layers)]
        if list(config.get("layer_types") or usual) != usual:
            raise self._refuse("these layer_types")
        if not config.get("sliding_window"):
            raise self._refuse("no sliding_window")
        if not config.get("attention_bias", True):
            raise self._refuse("attention_bias=false")
        for key, value in _SWIGLU.items():
            if config.get(key, value) != value:
                raise self._refuse(f"{key}={config[key]}")

    @property
    def notes(self) -> tuple[str, ...]:
        """Also that llama.cpp rounds the bounds between which YaRN blends wavelengths."""
        if self.rope.get("rope_type") != "yarn" or self.rope.get("truncate", True):
            return super().notes
        words = "llama.cpp rounds the bounds of YaRN's ramp to whole pairs, where the model has truncate=false"
        return (*super().notes, f"{words}; answers differ slightly")

    def clean_name(self, name: str) -> str:
        """The sinks have no ending in the checkpoint."""
        return f"{name}.weight" if name.endswith(".sinks") else name

    def require_rounded_ramp(self) -> None:
        """Taken as it is, and noted: no gpt-oss could be exported otherwise."""

    def add_settings(self, writer: GGUFWriter, file_type: LlamaFileType) -> None:
        """The common ones, then those of ``GptOssModel`` of llama.cpp's converter."""
        super().add_settings(writer, file_type)
        writer.add_sliding_window(self._read_count("sliding_window"))
        writer.add_expert_feed_forward_length(self._read_count("intermediate_size"))
