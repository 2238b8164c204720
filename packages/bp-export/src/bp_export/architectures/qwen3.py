"""Arch ``qwen3``: as Qwen2 without biases, with norms on each head's q and k, and heads of a width of their own."""

from __future__ import annotations

from gguf import MODEL_ARCH

from bp_export.architectures.decoder import Architecture


class Qwen3Architecture(Architecture):
    """As the checkpoint has it."""

    gguf_arch = MODEL_ARCH.QWEN3
    windows_need_switch = True
    tells_head_width = True
    default_head_width = 128
