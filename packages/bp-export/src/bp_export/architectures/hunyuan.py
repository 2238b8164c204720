"""Arch ``hunyuan-dense``: Hunyuan 0.5B to 7B. Norms on q and k stand behind the rotary embedding."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gguf import MODEL_ARCH, GGUFWriter, LlamaFileType, RopeScalingType

from bp_export.architectures.decoder import Architecture

_CONTEXT = 262_144


class HunyuanArchitecture(Architecture):
    """What the checkpoints call a dynamic rotary embedding has one base, stretched by a fixed ``alpha``."""

    gguf_arch = MODEL_ARCH.HUNYUAN_DENSE
    ropes = ("default", "linear", "yarn", "dynamic")

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__(config)
        self._is_stretched = self.rope.get("rope_type") == "dynamic"
        if self._is_stretched and not self.rope.get("alpha"):
            raise self._refuse("a dynamic rotary embedding without alpha")

    @property
    def theta(self) -> float:
        """Times alpha ^ (head / (head - 2)), as in "NTK-aware" scaling."""
        if not self._is_stretched:
            return super().theta
        head = self.head_width
        return float(super().theta * self._read_rope_number("alpha") ** (head / (head - 2)))

    @property
    def context_length(self) -> int | None:
        """Of the stretched embedding 256k, whatever config.json says."""
        return _CONTEXT if self._is_stretched else super().context_length

    def add_settings(self, writer: GGUFWriter, file_type: LlamaFileType) -> None:
        """The common ones; nothing else is scaled."""
        super().add_settings(writer, file_type)
        if self._is_stretched:
            writer.add_rope_scaling_type(RopeScalingType.NONE)
            writer.add_rope_scaling_factor(1)
            writer.add_rope_scaling_orig_ctx_len(_CONTEXT)
