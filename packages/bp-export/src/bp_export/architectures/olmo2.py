"""Arch ``olmo2``: OLMo 2. Norms stand behind attention and feed-forward, and over all of q and k at once."""

from __future__ import annotations

from gguf import MODEL_ARCH

from bp_export.architectures.decoder import Architecture


class Olmo2Architecture(Architecture):
    """As the checkpoint has it."""

    gguf_arch = MODEL_ARCH.OLMO2
