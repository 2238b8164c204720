"""Adapters as arithmetic on arrays: read safetensors, load a LoRA adapter, fold it into a base, merge adapters.

NumPy only; torch is never imported.
"""

from bp_merge.adapter import LoraAdapter, LoraPair, compute_scale, load_adapter, read_refusals
from bp_merge.errors import (
    AdapterMismatchError,
    AdaptersDifferError,
    AdapterUnfoldableError,
    AdapterUnmergeableError,
    MergeOptionError,
    SlaoStateError,
    SlaoStreamError,
    TensorsInvalidError,
)
from bp_merge.expert_pairs import list_joined_modules
from bp_merge.experts import parse_expert, split_experts
from bp_merge.fold import FoldedModel, fold_rows
from bp_merge.gpt_oss import join_expert
from bp_merge.lowrank import Product, Term, cut_matrix, cut_product, cut_sum
from bp_merge.merge import MergeOutcome, merge_adapters, write_adapter_like
from bp_merge.methods.options import MergeOptions, ModulePlan
from bp_merge.methods.slao import SlaoState, blend, factor_rows, orthonormal_rows, read_state, start_stream, write_state
from bp_merge.methods.table import METHODS, Method, find_method
from bp_merge.nf4 import Nf4Reader
from bp_merge.packed import PackedReader, open_model
from bp_merge.source import AdapterSource, require_alike
from bp_merge.tensors import (
    Dtype,
    Floats,
    StoredTensor,
    TensorInfo,
    TensorReader,
    TensorStreamWriter,
    build_header,
    decode,
    encode,
    read_index,
    read_metadata,
    read_model_index,
    round_to,
    strip_wrappers,
    write_tensors,
)

__all__ = [
    "METHODS",
    "AdapterMismatchError",
    "AdapterSource",
    "AdapterUnfoldableError",
    "AdapterUnmergeableError",
    "AdaptersDifferError",
    "Dtype",
    "Floats",
    "FoldedModel",
    "LoraAdapter",
    "LoraPair",
    "MergeOptionError",
    "MergeOptions",
    "MergeOutcome",
    "Method",
    "ModulePlan",
    "Nf4Reader",
    "PackedReader",
    "Product",
    "SlaoState",
    "SlaoStateError",
    "SlaoStreamError",
    "StoredTensor",
    "TensorInfo",
    "TensorReader",
    "TensorStreamWriter",
    "TensorsInvalidError",
    "Term",
    "blend",
    "build_header",
    "compute_scale",
    "cut_matrix",
    "cut_product",
    "cut_sum",
    "decode",
    "encode",
    "factor_rows",
    "find_method",
    "fold_rows",
    "join_expert",
    "list_joined_modules",
    "load_adapter",
    "merge_adapters",
    "open_model",
    "orthonormal_rows",
    "parse_expert",
    "read_index",
    "read_metadata",
    "read_model_index",
    "read_refusals",
    "read_state",
    "require_alike",
    "round_to",
    "split_experts",
    "start_stream",
    "strip_wrappers",
    "write_adapter_like",
    "write_state",
    "write_tensors",
]
