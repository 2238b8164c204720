"""Arch ``lfm2``: LFM2. Most layers are short convolutions with two gates, the others attention."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gguf import MODEL_ARCH, GGUFWriter, LlamaFileType

from bp_export.architectures.change import KEEP, Change
from bp_export.architectures.decoder import Architecture
from bp_export.errors import ModelInvalidError

_THETA = 1_000_000.0


class Lfm2Architecture(Architecture):
    """A layer without heads of keys is a convolution."""

    gguf_arch = MODEL_ARCH.LFM2
    has_windows = True  # it has none

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__({**config, "tie_word_embeddings": config.get("tie_embedding", config["tie_word_embeddings"])})
        self.rope.setdefault("rope_theta", _THETA)
        attending = config.get("full_attn_idxs")
        attending = range(self.layers) if attending is None else attending
        usual = ["full_attention" if i in attending else "conv" for i in range(self.layers)]
        self._kinds = list(config.get("layer_types") or usual)
        if len(self._kinds) != self.layers:
            raise ModelInvalidError(f"config.json says {self.layers} layers, and {len(self._kinds)} layer_types")

    @property
    def epsilon(self) -> float:
        """Under its own name here."""
        return float(self.config["norm_eps"])

    @property
    def feed_forward(self) -> int:
        """Two thirds of what config.json says, rounded up to a multiple, unless it says otherwise."""
        width = int(self.config.get("block_ff_dim") or self._read_count("intermediate_size"))
        if not self.config["block_auto_adjust_ff_dim"]:
            return width
        width = int(2 * width / 3)
        if (factor := self.config.get("block_ffn_dim_multiplier")) is None:
            return width
        multiple = self._read_count("block_multiple_of")
        return multiple * -(-int(factor * width) // multiple)

    def list_key_heads(self) -> list[int]:
        """None in a convolution."""
        return [0 if kind == "conv" else self.key_heads for kind in self._kinds]

    def plan_change(self, name: str, shape: tuple[int, ...]) -> Change:
        """The convolution loses its axis of one channel."""
        return Change(shape=(shape[0], shape[-1])) if name.endswith("conv.conv.weight") else KEEP

    def add_settings(self, writer: GGUFWriter, file_type: LlamaFileType) -> None:
        """The common ones, then the convolution's length."""
        super().add_settings(writer, file_type)
        writer.add_vocab_size(self.vocab_size)
        writer.add_shortconv_l_cache(self._read_count("conv_L_cache"))
