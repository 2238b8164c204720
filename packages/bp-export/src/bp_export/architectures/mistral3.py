"""Arch ``mistral3``: Mistral Small 3 and Ministral 3, also out of a checkpoint with its vision tower, left out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gguf import MODEL_ARCH, GGUFWriter, LlamaFileType

from bp_export.architectures.decoder import compute_yarn_scale
from bp_export.architectures.llama import LlamaArchitecture


class Mistral3Architecture(LlamaArchitecture):
    """A llama with a head width of its own.

    Ministral 3 also scales queries by their position past the original context, as Llama 4 does.
    """

    gguf_arch = MODEL_ARCH.MISTRAL3
    towers = ("vision_tower.", "multi_modal_projector.")

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__(config)
        self._is_ministral = config.get("model_type") == "ministral3"
        if self._is_ministral and self.rope.get("rope_type") != "yarn":
            raise self._refuse(f"a rotary embedding of type {self.rope.get('rope_type')!r}")

    def compute_own_yarn_scale(self, factor: float) -> float:
        """Divided by that of ``mscale_all_dim`` where the file holds it, as Ministral's does."""
        own = super().compute_own_yarn_scale(factor)
        return own / compute_yarn_scale(factor, self._all_dimensions) if self._is_ministral else own

    def require_usual_ramp(self) -> None:
        """llama.cpp reads the ramp's bounds here."""

    def add_settings(self, writer: GGUFWriter, file_type: LlamaFileType) -> None:
        """The llama's, then what Ministral 3 adds."""
        super().add_settings(writer, file_type)
        if self._is_ministral:
            writer.add_rope_scaling_yarn_log_mul(self._all_dimensions)
            writer.add_attn_temperature_scale(self._read_rope_number("llama_4_scaling_beta"))

    @property
    def _all_dimensions(self) -> float:
        return self._read_rope_number("mscale_all_dim")
