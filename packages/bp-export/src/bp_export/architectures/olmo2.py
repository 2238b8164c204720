"""Arch ``olmo2``: OLMo 2 and 3. Norms stand behind attention and feed-forward, and over all of q and k at once."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gguf import MODEL_ARCH, GGUFWriter, LlamaFileType

from bp_export.architectures.decoder import Architecture

_THETA = 500_000.0
_INTERVAL = 4


class Olmo2Architecture(Architecture):
    """As the checkpoint has it. llama.cpp loads no file of this arch without a head of its own."""

    gguf_arch = MODEL_ARCH.OLMO2

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__(config)
        if config.get("tie_word_embeddings"):
            raise self._refuse("tie_word_embeddings")


class Olmo3Architecture(Olmo2Architecture):
    """With sliding windows on three layers of four, where the rotary embedding is not scaled."""

    has_windows = True

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__(config)
        self.rope.setdefault("rope_theta", _THETA)
        self.local_rope = {"rope_theta": _THETA, **self.local_rope}
        usual = ["sliding_attention" if (i + 1) % _INTERVAL else "full_attention" for i in range(self.layers)]
        self._kinds = list(config.get("layer_types") or usual)
        if self.local_rope.get("rope_type", "default") != "default":
            raise self._refuse("a scaled rotary embedding in layers with a window")
        if not config.get("sliding_window"):
            raise self._refuse("no sliding_window")

    def add_settings(self, writer: GGUFWriter, file_type: LlamaFileType) -> None:
        """The common ones, then the windows."""
        super().add_settings(writer, file_type)
        writer.add_sliding_window(self._read_count("sliding_window"))
        writer.add_sliding_window_pattern([kind == "sliding_attention" for kind in self._kinds])
