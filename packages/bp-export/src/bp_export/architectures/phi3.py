"""Arch ``phi3``: Phi-3 and Phi-4-mini. q, k, v are one matrix, gate and up are another; LongRoPE factors as tensors."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from gguf import MODEL_ARCH, GGUFWriter, LlamaFileType

from bp_export.architectures.decoder import Architecture
from bp_export.errors import ModelInvalidError
from bp_merge import Floats

_LONG, _SHORT = "rope_factors_long.weight", "rope_factors_short.weight"


class Phi3Architecture(Architecture):
    """The fused modules stay fused, so an adapter's changes to them need no cutting."""

    gguf_arch = MODEL_ARCH.PHI3
    ropes = ("default", "su", "longrope")

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__(config)
        self._factors = {_LONG: self.rope.get("long_factor"), _SHORT: self.rope.get("short_factor")}
        if self.rope.get("rope_type", "default") != "default" and not all(
            isinstance(factors, list) and len(factors) == self._rotated // 2 for factors in self._factors.values()
        ):
            raise ModelInvalidError(f"config.json must scale {self._rotated // 2} rotary wavelengths, long and short")

    @property
    def _rotated(self) -> int:
        """Dimensions of a head that are rotated."""
        return int(float(self.rope.get("partial_rotary_factor", 1.0)) * self.width) // self.heads

    @property
    def _original_context(self) -> int:
        found = self.rope.get("original_max_position_embeddings", self.config.get("original_max_position_embeddings"))
        return int(found or self._read_count("max_position_embeddings"))

    @property
    def notes(self) -> tuple[str, ...]:
        """Also that llama.cpp chooses LongRoPE's factors by the context, and transformers by the text."""
        found, original = super().notes, self._original_context
        if not self._factors[_LONG] or (self.context_length or 0) <= original:
            return found
        words = "llama.cpp uses LongRoPE's long factors from the first token on, the model only for long texts"
        return (*found, f"with a context of more than {original} tokens {words}")

    def build_extra_tensors(self) -> dict[str, Floats]:
        """LongRoPE's factors on the wavelengths, for long and for short texts: (rotated dimensions / 2,)."""
        return {name: np.array(values, np.float32) for name, values in self._factors.items() if values}

    def add_first_settings(self, writer: GGUFWriter) -> None:
        """LongRoPE's factor on the attention (arXiv:2402.13753): sqrt(1 + ln(scale) / ln(original context))."""
        if self._factors[_LONG]:
            scale = self._read_count("max_position_embeddings") / self._original_context
            factor = math.sqrt(1 + math.log(scale) / math.log(self._original_context)) if scale > 1 else 1.0
            writer.add_rope_scaling_attn_factors(float(self.rope.get("attention_factor") or factor))

    def add_settings(self, writer: GGUFWriter, file_type: LlamaFileType) -> None:
        """In the order of ``Phi3MiniModel`` of llama.cpp's converter."""
        writer.add_context_length(self.context_length or self._read_count("max_position_embeddings"))
        writer.add_rope_scaling_orig_ctx_len(self._original_context)
        writer.add_embedding_length(self.width)
        writer.add_feed_forward_length(self._read_count("intermediate_size"))
        writer.add_block_count(self.layers)
        writer.add_head_count(self.heads)
        writer.add_head_count_kv(self.key_heads)
        writer.add_layer_norm_rms_eps(self.epsilon)
        writer.add_rope_dimension_count(self._rotated)
        writer.add_rope_freq_base(self.theta)
        writer.add_file_type(int(file_type))
        # Zero tells Phi-4 from models whose window llama.cpp would guess.
        writer.add_sliding_window(int(self.config.get("sliding_window") or 0))
