"""Arch ``llama`` with experts: Mixtral."""

from __future__ import annotations

import re

from bp_export.architectures.llama import LlamaArchitecture


class MixtralArchitecture(LlamaArchitecture):
    """A llama whose feed-forward layers are mixtures; llama.cpp scales the weights of the chosen to a sum of 1."""

    has_experts = True
    tells_head_width = False

    def clean_name(self, name: str) -> str:
        """gguf-py knows Mixtral's experts by their place in Mistral's own files."""
        return re.sub(r"^model\.(layers\.\d+)\.block_sparse_moe\.experts\.", r"\1.feed_forward.experts.", name)
