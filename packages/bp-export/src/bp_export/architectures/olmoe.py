"""Arch ``olmoe``: OLMoE, with norms over all heads of q and k and a mixture of experts in every layer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gguf import MODEL_ARCH

from bp_export.architectures.decoder import Architecture


class OlmoeArchitecture(Architecture):
    """llama.cpp neither clips q, k and v nor scales the experts' weights, and wants as many keys as queries."""

    gguf_arch = MODEL_ARCH.OLMOE
    has_experts = True
    needs_head = True

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__(config)
        if self.key_heads != self.heads:  # its norm of k is as wide as the model
            raise self._refuse(f"num_key_value_heads={self.key_heads}")
        if config.get("norm_topk_prob"):
            raise self._refuse("norm_topk_prob=true")
        if config.get("clip_qkv") is not None:
            raise self._refuse(f"clip_qkv={config['clip_qkv']}")
