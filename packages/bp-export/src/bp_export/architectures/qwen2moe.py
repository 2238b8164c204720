"""Archs ``qwen2moe`` and ``qwen3moe``: as their families, with a mixture of experts in every layer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from gguf import MODEL_ARCH, GGUFWriter, LlamaFileType

from bp_export.architectures.decoder import Architecture


class Qwen3MoeArchitecture(Architecture):
    """llama.cpp has experts in all layers and scales their weights to a sum of 1; so other choices are rejected."""

    gguf_arch = MODEL_ARCH.QWEN3MOE
    windows_need_switch = True
    windows_start_late = False
    has_experts = True
    scales_to_one: ClassVar[bool] = True
    """Whether llama.cpp scales the weights of the chosen experts to a sum of 1."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__(config)
        if bool(config.get("norm_topk_prob")) != self.scales_to_one:
            raise self._refuse(f"norm_topk_prob={str(not self.scales_to_one).lower()}")
        if config.get("mlp_only_layers") or config.get("decoder_sparse_step", 1) != 1:
            raise self._refuse("layers without experts")

    def add_settings(self, writer: GGUFWriter, file_type: LlamaFileType) -> None:
        """The common ones, and an expert's width."""
        super().add_settings(writer, file_type)
        writer.add_expert_feed_forward_length(self._read_count("moe_intermediate_size"))


class Qwen2MoeArchitecture(Qwen3MoeArchitecture):
    """Next to the experts that are chosen, each layer has one that reads every token, with a gate of its own."""

    gguf_arch = MODEL_ARCH.QWEN2MOE
    biases = frozenset({"self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"})
    windows_start_late = True
    scales_to_one = False
    needs_head = True

    def add_settings(self, writer: GGUFWriter, file_type: LlamaFileType) -> None:
        """Also the width of the expert that reads every token."""
        super().add_settings(writer, file_type)
        writer.add_expert_shared_feed_forward_length(self._read_count("shared_expert_intermediate_size"))
