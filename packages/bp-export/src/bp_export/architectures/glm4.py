"""Arch ``glm4``: GLM-4-0414. Half of each head is rotated, by neighboring pairs; gate and up are one matrix."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gguf import MODEL_ARCH, GGUFWriter, LlamaFileType

from bp_export.architectures.decoder import Architecture


class Glm4Architecture(Architecture):
    """As the checkpoint has it: transformers rotates here as llama.cpp does."""

    gguf_arch = MODEL_ARCH.GLM4
    biases = frozenset({"self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"})
    tells_head_width = True
    default_head_width = 128

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__(config)
        self.rope.setdefault("partial_rotary_factor", 0.5)

    def add_settings(self, writer: GGUFWriter, file_type: LlamaFileType) -> None:
        """The common ones, then how much of a head is rotated."""
        super().add_settings(writer, file_type)
        writer.add_rope_dimension_count(int(self.head_width * float(self.rope["partial_rotary_factor"])))
