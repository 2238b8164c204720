"""Adapters as arithmetic on arrays: read safetensors, load a LoRA adapter, fold it into a base.

NumPy only; torch is never imported.
"""

from bp_merge.adapter import LoraAdapter, LoraPair, compute_scale, load_adapter, read_refusals
from bp_merge.errors import AdapterMismatchError, AdapterUnfoldableError, TensorsInvalidError
from bp_merge.fold import FoldedModel, fold_rows
from bp_merge.tensors import (
    Dtype,
    Floats,
    TensorInfo,
    TensorReader,
    build_header,
    decode,
    encode,
    read_index,
    read_model_index,
    round_to,
    write_tensors,
)

__all__ = [
    "AdapterMismatchError",
    "AdapterUnfoldableError",
    "Dtype",
    "Floats",
    "FoldedModel",
    "LoraAdapter",
    "LoraPair",
    "TensorInfo",
    "TensorReader",
    "TensorsInvalidError",
    "build_header",
    "compute_scale",
    "decode",
    "encode",
    "fold_rows",
    "load_adapter",
    "read_index",
    "read_model_index",
    "read_refusals",
    "round_to",
    "write_tensors",
]
