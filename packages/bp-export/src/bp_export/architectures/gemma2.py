"""Arch ``gemma2``: norms are stored less one, logits are capped softly, every other layer has a sliding window."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from gguf import MODEL_ARCH, GGUFWriter, LlamaFileType

from bp_export.architectures.change import KEEP, Change
from bp_export.architectures.decoder import Architecture

_USUAL_THETA = 10_000.0
_CAPS = ("attn_logit_softcapping", "final_logit_softcapping")
_PLUS_ONE = Change(values="plus one")


class Gemma2Architecture(Architecture):
    """llama.cpp's ``gemma2`` takes the embedding for the output, always; a head that differs from it is rejected.

    Windows and the scale of the attention are fixed in llama.cpp, so other choices are rejected.
    """

    gguf_arch = MODEL_ARCH.GEMMA2
    has_windows = True
    activation = "gelu_pytorch_tanh"
    default_head_width = 256
    tells_head_width = True
    has_head: ClassVar[bool] = False
    """Whether llama.cpp reads an ``output.weight``."""
    window_every: ClassVar[int] = 2
    """One layer in so many sees the whole text."""
    _caps_always: ClassVar[bool] = True
    """Whether llama.cpp caps scores and logits whatever the file says."""
    scaled_by_width: ClassVar[int] = 46
    """Layers of the one size whose attention is scaled by width / heads."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__(config)
        usual = ["full" if (i + 1) % self.window_every == 0 else "sliding" for i in range(self.layers)]
        if (kinds := config.get("layer_types")) and list(kinds) != [f"{kind}_attention" for kind in usual]:
            raise self._refuse("these layer_types")
        scale = self.width // self.heads if self.layers == self.scaled_by_width else self.head_width
        if config.get("query_pre_attn_scalar", scale) != scale:
            raise self._refuse(f"query_pre_attn_scalar={config['query_pre_attn_scalar']}")
        if (missing := [key for key in _CAPS if key in config and not config[key]]) and self._caps_always:
            raise self._refuse(f"{missing[0]} switched off")
        if config.get("attention_bias"):
            raise self._refuse("attention_bias")
        if not self.has_head and config.get("tie_word_embeddings") is False:
            raise self._refuse("a head that is not its embedding")

    def is_left_out(self, name: str) -> bool:
        """Also lm_head."""
        return name == "lm_head.weight" or super().is_left_out(name)

    def plan_change(self, name: str, shape: tuple[int, ...]) -> Change:
        """Norms get the one that Gemma adds to them."""
        del shape
        return _PLUS_ONE if name.endswith("norm.weight") else KEEP

    def add_settings(self, writer: GGUFWriter, file_type: LlamaFileType) -> None:
        """In the order of ``Gemma2Model`` of llama.cpp's converter."""
        writer.add_context_length(self._read_count("max_position_embeddings"))
        writer.add_embedding_length(self.width)
        writer.add_block_count(self.layers)
        writer.add_feed_forward_length(self._read_count("intermediate_size"))
        writer.add_head_count(self.heads)
        writer.add_head_count_kv(self.key_heads)
        writer.add_layer_norm_rms_eps(self.epsilon)
        writer.add_key_length(self.head_width)
        writer.add_value_length(self.head_width)
        writer.add_file_type(int(file_type))
        writer.add_attn_logit_softcapping(float(self.config.get("attn_logit_softcapping", 50.0)))
        writer.add_final_logit_softcapping(float(self.config.get("final_logit_softcapping", 30.0)))
        writer.add_sliding_window(int(self.config.get("sliding_window", 4096)))
        if self.theta != _USUAL_THETA or self.rope.get("rope_type", "default") != "default":
            self._add_rope(writer)  # the converter leaves it out, and llama.cpp takes the usual one
