"""Arch ``gemma3``: Gemma 3's language model, also out of a checkpoint with its vision tower, which is left out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gguf import MODEL_ARCH, GGUFWriter, LlamaFileType

from bp_export.architectures.decoder import Architecture
from bp_export.architectures.gemma2 import Gemma2Architecture


class Gemma3Architecture(Gemma2Architecture):
    """As Gemma 2, with norms on q and k, five windows to one full layer, and no cap on the attention."""

    gguf_arch = MODEL_ARCH.GEMMA3
    ropes = ("default", "linear")
    towers = ("vision_tower.", "multi_modal_projector.")
    has_head = True
    window_every = 6
    _caps_always = False
    scaled_by_width = 62

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__(config)
        if config.get("attn_logit_softcapping"):
            raise self._refuse("attn_logit_softcapping")
        if config.get("use_bidirectional_attention"):
            raise self._refuse("use_bidirectional_attention")
        self.rope.setdefault("rope_theta", 1_000_000.0)
        self.local_rope = {"rope_theta": 10_000.0, **self.local_rope}

    def is_left_out(self, name: str) -> bool:
        """As elsewhere: Gemma 3 has a head."""
        return Architecture.is_left_out(self, name)

    def add_settings(self, writer: GGUFWriter, file_type: LlamaFileType) -> None:
        """The common ones, then caps and window."""
        Architecture.add_settings(self, writer, file_type)
        cap = self.config.get("final_logit_softcapping")
        # transformers' model with a vision tower does not cap, whatever its config.json says.
        if cap and "Gemma3ForConditionalGeneration" not in (self.config.get("architectures") or ()):
            writer.add_final_logit_softcapping(float(cap))
        writer.add_sliding_window(int(self.config.get("sliding_window", 4096)))
