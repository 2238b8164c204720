"""Quantizations: the table of types, the kernels that write them, and importance matrices."""

from typing import TYPE_CHECKING

from bp_export._lazy import load_lazily

if TYPE_CHECKING:
    from bp_export.quant.kernels import describe_kernels
    from bp_export.quant.measure import Measured, measure_importance
    from bp_export.quant.types import QUANTIZATIONS, USUAL_QUANTIZATION, Bound, Quantization, read_quantization

__all__ = [
    "QUANTIZATIONS",
    "USUAL_QUANTIZATION",
    "Bound",
    "Measured",
    "Quantization",
    "describe_kernels",
    "measure_importance",
    "read_quantization",
]

_MODULES = {
    "describe_kernels": "kernels",
    "Measured": "measure",
    "measure_importance": "measure",
    "Bound": "types",
    "QUANTIZATIONS": "types",
    "Quantization": "types",
    "USUAL_QUANTIZATION": "types",
    "read_quantization": "types",
}
__getattr__ = load_lazily(__name__, _MODULES)
