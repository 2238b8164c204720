"""Arch ``qwen3moe``: as Qwen3 with a mixture of experts in every layer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gguf import MODEL_ARCH, GGUFWriter, LlamaFileType

from bp_export.architectures.decoder import Architecture


class Qwen3MoeArchitecture(Architecture):
    """llama.cpp has experts in all layers and scales their weights to a sum of 1; so other choices are rejected."""

    gguf_arch = MODEL_ARCH.QWEN3MOE
    windows_need_switch = True
    has_experts = True
    windows_start_late = False

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__(config)
        if not config.get("norm_topk_prob"):
            raise self._refuse("norm_topk_prob=false")
        if config.get("mlp_only_layers") or config.get("decoder_sparse_step", 1) != 1:
            raise self._refuse("layers without experts")

    def add_settings(self, writer: GGUFWriter, file_type: LlamaFileType) -> None:
        """The common ones, and an expert's width."""
        super().add_settings(writer, file_type)
        writer.add_expert_feed_forward_length(self._read_count("moe_intermediate_size"))
