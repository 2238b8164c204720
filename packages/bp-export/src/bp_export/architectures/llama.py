"""Arch ``llama``: Llama 2 and 3.x, SmolLM2, Mistral."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
from gguf import MODEL_ARCH, GGUFWriter, LlamaFileType

from bp_export.architectures.change import KEEP, Change, interleave_halves
from bp_export.architectures.decoder import Architecture
from bp_export.errors import ModelInvalidError
from bp_merge import Floats

_ADDS_NO_BOS = 49152
_FREQUENCIES = "rope_freqs.weight"


class LlamaArchitecture(Architecture):
    """Rows of q and k are re-ordered, since llama.cpp rotates neighboring pairs and transformers halves of a head."""

    gguf_arch = MODEL_ARCH.LLAMA
    ropes: ClassVar[tuple[str, ...]] = ("default", "linear", "yarn", "llama3")
    tells_head_width = True
    tells_space_prefix = True

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__(config)
        # transformers' LlamaForCausalLM knows no window, whatever its config.json says.
        self.has_windows = "LlamaForCausalLM" in (config.get("architectures") or ())  # type: ignore[misc]
        for key in ("attention_bias", "mlp_bias"):
            if config.get(key):
                raise self._refuse(key)

    def plan_change(self, name: str, shape: tuple[int, ...]) -> Change:
        """Rows of q and k change places within each head."""
        heads = {"q_proj.weight": self.heads, "k_proj.weight": self.key_heads}.get(name.rpartition("self_attn.")[2])
        if heads is None:
            return KEEP
        if shape[0] % (2 * heads):
            raise ModelInvalidError(f"{name} has {shape[0]} rows, which {heads} heads cannot share")
        return interleave_halves(heads, shape[0])

    def add_settings(self, writer: GGUFWriter, file_type: LlamaFileType) -> None:
        """The common settings, vocabulary size and rotated dimensions."""
        super().add_settings(writer, file_type)
        writer.add_vocab_size(self.vocab_size)
        writer.add_rope_dimension_count(self.head_width)

    def add_after_vocabulary(self, writer: GGUFWriter) -> None:
        """SmolLM's and Granite's vocabulary, known by its size, starts no text with BOS."""
        if self.vocab_size == _ADDS_NO_BOS:
            writer.add_add_bos_token(False)

    def build_extra_tensors(self) -> dict[str, Floats]:
        """Llama 3's factors on the rotary wavelengths, where config.json scales them."""
        return {_FREQUENCIES: self._build_frequencies()} if self.rope.get("rope_type") == "llama3" else {}

    def _build_frequencies(self) -> Floats:
        """Factors on the wavelengths, (head / 2,): Llama 3.1's scaling (``_compute_llama3_parameters``, transformers).

        Short waves stay, long ones are stretched by ``factor``, those between are blended. Bit for bit the converter's,
        which computes in torch's float32: there a number over a tensor is the tensor's reciprocal times the number, and
        a power agrees with float64's, rounded.
        """
        factor = self._read_rope_number("factor")
        low, high = self._read_rope_number("low_freq_factor"), self._read_rope_number("high_freq_factor")
        context = self._read_rope_number("original_max_position_embeddings")
        one = np.float32(1)
        exponents = np.arange(0, self.head_width, 2, dtype=np.float32) / np.float32(self.head_width)
        powers = np.float64(self._read_rope_number("rope_theta")) ** exponents.astype(np.float64)
        frequencies = one / powers.astype(np.float32)
        waves = one / frequencies * np.float32(2 * math.pi)
        smooth = (one / waves * np.float32(context) - np.float32(low)) / np.float32(high - low)
        blended = one / ((one - smooth) / np.float32(factor) + smooth)
        stretched = np.where(waves > context / low, np.float32(factor), blended)
        return np.where(waves < context / high, one, stretched).astype(np.float32)
