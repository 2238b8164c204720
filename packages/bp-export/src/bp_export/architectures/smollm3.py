"""Arch ``smollm3``: a llama whose every fourth layer has no rotary embedding."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gguf import MODEL_ARCH

from bp_export.architectures.llama import LlamaArchitecture

_INTERVAL = 4


class SmolLm3Architecture(LlamaArchitecture):
    """Which layers have no rotary embedding is fixed in llama.cpp, so other choices are rejected."""

    gguf_arch = MODEL_ARCH.SMOLLM3
    windows_need_switch = True
    ropes = ("default", "linear", "yarn")
    """llama.cpp's graph of this arch has no place for Llama 3's factors and rejects a file that holds them."""
    tells_head_width = False

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__(config)
        chosen = config.get("no_rope_layers")
        usual = [int((i + 1) % _INTERVAL != 0) for i in range(self.layers)]
        if (chosen and list(chosen) != usual) or config.get("no_rope_layer_interval", _INTERVAL) != _INTERVAL:
            raise self._refuse("these no_rope_layers")
