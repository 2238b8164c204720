"""Arch ``exaone4``: EXAONE 4. Norms stand behind attention and feed-forward, and on each head's q and k."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gguf import MODEL_ARCH, GGUFWriter, LlamaFileType

from bp_export.architectures.change import KEEP, Change
from bp_export.architectures.llama import LlamaArchitecture

_WITH_WINDOWS = 64


class Exaone4Architecture(LlamaArchitecture):
    """llama.cpp has windows, and no positions in the layers without, for the model of 64 layers alone."""

    gguf_arch = MODEL_ARCH.EXAONE4
    tells_head_width = False
    tells_space_prefix = False

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__(config)
        self.has_windows = True  # type: ignore[misc]
        self._window = config.get("sliding_window")
        if bool(self._window) != (self.layers == _WITH_WINDOWS):
            raise self._refuse(f"sliding_window={self._window} in {self.layers} layers")
        if self.head_width != self.width // self.heads:
            raise self._refuse(f"head_dim={self.head_width}")
        every = config.get("sliding_window_pattern", 4)
        pattern = every if isinstance(every, str) else "L" * (int(every) - 1) + "G" if every else "G"
        usual = ["sliding_attention" if pattern[i % len(pattern)] == "L" else "full" for i in range(self.layers)]
        self._kinds = list(config.get("layer_types") or usual)

    def plan_change(self, name: str, shape: tuple[int, ...]) -> Change:
        """As the checkpoint has it."""
        del name, shape
        return KEEP

    def add_settings(self, writer: GGUFWriter, file_type: LlamaFileType) -> None:
        """The common ones, then the windows."""
        super(LlamaArchitecture, self).add_settings(writer, file_type)
        writer.add_vocab_size(self.vocab_size)
        if self._window:
            writer.add_sliding_window(int(self._window))
            writer.add_sliding_window_pattern([kind == "sliding_attention" for kind in self._kinds])
