"""Archs ``command-r`` and ``cohere2``: Command R and R7B, Aya. Attention and feed-forward read the same norm."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gguf import MODEL_ARCH, GGUFWriter, LlamaFileType, RopeScalingType

from bp_export.architectures.decoder import Architecture

_THETA = {"cohere": 500_000.0}
_INTERVAL = 4


class CohereArchitecture(Architecture):
    """llama.cpp takes the embedding for the output, always; a head that differs from it is rejected."""

    gguf_arch = MODEL_ARCH.COMMAND_R
    ropes = ("default",)

    def __init__(self, config: Mapping[str, Any]) -> None:
        context = config.get("model_max_length") or config.get("max_position_embeddings")
        super().__init__({**config, "max_position_embeddings": context})
        if (theta := _THETA.get(str(config.get("model_type")))) is not None:
            self.rope.setdefault("rope_theta", theta)
        for key in ("attention_bias", "use_qk_norm"):
            if config.get(key):
                raise self._refuse(key)
        if not config.get("tie_word_embeddings"):
            raise self._refuse("a head that is not its embedding")

    def add_epsilon(self, writer: GGUFWriter) -> None:
        """Of a norm that takes the mean off."""
        writer.add_layer_norm_eps(float(self.config["layer_norm_eps"]))

    def add_settings(self, writer: GGUFWriter, file_type: LlamaFileType) -> None:
        """The common ones, then the factor on the logits."""
        super().add_settings(writer, file_type)
        writer.add_logit_scale(float(self.config["logit_scale"]))
        self.add_windows(writer)
        writer.add_rope_scaling_type(RopeScalingType.NONE)

    def add_windows(self, writer: GGUFWriter) -> None:
        """There are none."""


class Cohere2Architecture(CohereArchitecture):
    """With a sliding window in three layers of four; the others have no positions."""

    gguf_arch = MODEL_ARCH.COHERE2
    has_windows = True

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__(config)
        usual = ["sliding_attention" if (i + 1) % _INTERVAL else "full_attention" for i in range(self.layers)]
        if (kinds := config.get("layer_types")) and list(kinds) != usual:
            raise self._refuse("these layer_types")
        if config.get("sliding_window_pattern", _INTERVAL) != _INTERVAL:
            raise self._refuse(f"sliding_window_pattern={config['sliding_window_pattern']}")

    def add_windows(self, writer: GGUFWriter) -> None:
        """The window, and how much of a head is rotated."""
        writer.add_sliding_window(self._read_count("sliding_window"))
        writer.add_vocab_size(self.vocab_size)
        writer.add_rope_dimension_count(int(float(self.config.get("rotary_pct", 1.0)) * (self.width // self.heads)))
