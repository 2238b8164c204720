"""Arch ``qwen2``: Qwen2 and Qwen2.5. No re-ordering; q, k and v have biases; the vocabulary is padded to the rows."""

from __future__ import annotations

from gguf import MODEL_ARCH

from bp_export.architectures.decoder import Architecture


class Qwen2Architecture(Architecture):
    """As the checkpoint has it."""

    gguf_arch = MODEL_ARCH.QWEN2
    biases = frozenset({"self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"})
    windows_need_switch = True
