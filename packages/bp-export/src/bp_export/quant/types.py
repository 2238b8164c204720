"""The table of quantizations: one row each, read by the exporter, the gate, both command lines and the pages.

This module imports no NumPy, so that a command's help can list the names at once. The rules that choose a type for each
tensor are in `bp_export.quant.mixture`.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING

from bp_export.errors import QuantizationUnknownError
from bp_runs.wording import setting_ref

if TYPE_CHECKING:
    from gguf import GGMLQuantizationType, LlamaFileType


@dataclass(frozen=True, slots=True)
class Bound:
    """What a quantization may cost before verification fails."""

    divergence: float
    """Mean Kullback-Leibler divergence from the reference, nats; more fails."""
    agreement: float
    """Share of clear places with the reference's next token; less fails."""


@dataclass(frozen=True, slots=True)
class Quantization:
    """A row of the table."""

    name: str
    type: str
    """ggml's name of the type of most matrices."""
    bits: float
    """Bits per weight of a 7B model's file, about."""
    bound: Bound
    """From runs on SmolLM2-135M, which suffers more than larger models do, with room (docs/log has the figures)."""
    help: str

    @property
    def is_float(self) -> bool:
        """Whether it is a plain float format, which llama.cpp's converter writes without llama-quantize."""
        return self.type in ("F32", "BF16", "F16")

    @property
    def default(self) -> GGMLQuantizationType:
        """The type of most matrices, as gguf-py has it."""
        from gguf import GGMLQuantizationType

        return GGMLQuantizationType[self.type]

    @property
    def file_type(self) -> LlamaFileType:
        """What ``general.file_type`` says."""
        from gguf import LlamaFileType

        names = {"f32": "ALL_F32", "mxfp4": "MOSTLY_MXFP4_MOE"}
        return LlamaFileType[names.get(self.name, f"MOSTLY_{self.name.upper()}")]


_TABLE = (
    Quantization("f32", "F32", 32.0, Bound(0.001, 1.0), "float32"),
    Quantization("bf16", "BF16", 16.0, Bound(0.005, 0.99), "bfloat16"),
    Quantization("f16", "F16", 16.0, Bound(0.002, 0.99), "float16"),
    Quantization("q8_0", "Q8_0", 8.5, Bound(0.03, 0.98), "8 bits"),
    Quantization("q6_k", "Q6_K", 6.6, Bound(0.06, 0.97), "6 bits"),
    Quantization("q5_k_m", "Q5_K", 5.7, Bound(0.2, 0.9), "5 bits, 6 for some tensors"),
    Quantization("q5_k_s", "Q5_K", 5.5, Bound(0.2, 0.9), "5 bits"),
    Quantization("q5_0", "Q5_0", 5.5, Bound(0.3, 0.9), "5 bits, older format"),
    Quantization("q4_k_m", "Q4_K", 4.8, Bound(0.3, 0.9), "4 bits, 6 for some tensors; the default"),
    Quantization("q4_k_s", "Q4_K", 4.6, Bound(0.4, 0.9), "4 bits"),
    Quantization("q4_0", "Q4_0", 4.5, Bound(0.6, 0.8), "4 bits, older format"),
    Quantization("iq4_xs", "IQ4_XS", 4.3, Bound(0.4, 0.9), "4 bits, smaller"),
    Quantization("mxfp4", "MXFP4", 4.3, Bound(0.4, 0.9), "experts in 4 bits as gpt-oss has them, 8 bits for the rest"),
    Quantization("q3_k_m", "Q3_K", 3.9, Bound(0.8, 0.7), "3 bits, 4 and 5 for some tensors"),
    Quantization("q2_k", "Q2_K", 3.2, Bound(1.5, 0.5), "2 bits, 3 and 4 for some tensors"),
)
USUAL_QUANTIZATION = "q4_k_m"
"""What a GGUF gets if no quantization is named."""
QUANTIZATIONS: Mapping[str, Quantization] = MappingProxyType({q.name: q for q in _TABLE})

# What the same types are called elsewhere.
_ALIASES: Mapping[str, str] = MappingProxyType(
    {
        "fp32": "f32",
        "float32": "f32",
        "fp16": "f16",
        "float16": "f16",
        "half": "f16",
        "bfloat16": "bf16",
        "q8": "q8_0",
        "int8": "q8_0",
        "q6": "q6_k",
        "q5": "q5_k_m",
        "q5_k": "q5_k_m",
        "q4": "q4_k_m",
        "q4_k": "q4_k_m",
        "int4": "q4_k_m",
        "q3": "q3_k_m",
        "q3_k": "q3_k_m",
        "q2": "q2_k",
    }
)


def read_quantization(name: str | None) -> Quantization:
    """The quantization of a name, in any case; of None `USUAL_QUANTIZATION`.

    Raises:
        QuantizationUnknownError: There is none; the hint names the nearest.
    """
    asked = (name or USUAL_QUANTIZATION).lower().replace("-", "_")
    if (found := QUANTIZATIONS.get(asked)) is not None:
        return found
    near = [_ALIASES[asked]] if asked in _ALIASES else difflib.get_close_matches(asked, QUANTIZATIONS, 1)
    hint = f"; did you mean {near[0]}?" if near else ""
    raise QuantizationUnknownError(
        f"there is no quantization {name!r}{hint}",
        fix=f"Choose one of {', '.join(QUANTIZATIONS)}: {setting_ref('quantization', near[0] if near else 'q4_k_m')}",
        details={"known": list(QUANTIZATIONS)},
    )
