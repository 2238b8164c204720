"""Arch ``granite``: Granite 3. A llama with four factors, on embeddings, attention, residuals and logits."""

from __future__ import annotations

from gguf import MODEL_ARCH, GGUFWriter, LlamaFileType

from bp_export.architectures.llama import LlamaArchitecture


class GraniteArchitecture(LlamaArchitecture):
    """llama.cpp knows no head of a width of its own here, and the converter ignores one; so it is rejected."""

    gguf_arch = MODEL_ARCH.GRANITE
    tells_head_width = False

    def add_settings(self, writer: GGUFWriter, file_type: LlamaFileType) -> None:
        """The llama's, then the factors in the order of ``GraniteModel`` of llama.cpp's converter."""
        if self.config.get("head_dim") and self.head_width != self.width // self.heads:
            raise self._refuse(f"head_dim={self.head_width}")
        super().add_settings(writer, file_type)
        factors = (
            ("attention_multiplier", writer.add_attention_scale),
            ("embedding_multiplier", writer.add_embedding_scale),
            ("residual_multiplier", writer.add_residual_scale),
            ("logits_scaling", writer.add_logit_scale),
        )
        for key, add in factors:
            if value := self.config.get(key):
                add(float(value))
