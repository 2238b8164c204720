"""ggml's own row quantizer, through ctypes: float32 rows in, the bytes of a GGUF tensor out.

The kernels are ggml's (``ggml_quantize_chunk`` in ggml.c, MIT licence), from the package libggml-python: the same
source that llama-quantize uses, so the bytes are the same on the same kind of CPU. On x86-64 the library is built
without FMA, which makes them the same on every x86-64. Rows are independent: no cut into chunks changes a byte.
"""

from __future__ import annotations

import ctypes
import importlib.util
from functools import cache
from pathlib import Path
from typing import TypeAlias

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

from bp_export.errors import GgmlMissingError
from bp_merge import Floats

TensorType: TypeAlias = GGMLQuantizationType


def compute_row_bytes(kind: TensorType, columns: int) -> int:
    """Bytes of one row of ``columns`` weights; ``columns`` must be a multiple of the type's block."""
    block, block_bytes = GGML_QUANT_SIZES[kind]
    return int(columns // block * block_bytes)


def read_block(kind: TensorType) -> int:
    """Weights in one block of a type: 1, 32 or 256."""
    return int(GGML_QUANT_SIZES[kind][0])


def quantize_rows(rows: Floats, kind: TensorType, weights: Floats | None = None) -> bytes:
    """Rows (n, columns) of float32 as the bytes of ``kind``; ctypes lets other threads run meanwhile.

    Args:
        rows: The weights.
        kind: The type.
        weights: How much each column matters, (columns,) float32; None for all alike.

    Raises:
        GgmlMissingError: ggml's library cannot be loaded.
    """
    rows = np.ascontiguousarray(rows, dtype="<f4")
    if kind == TensorType.F32:
        return rows.tobytes()
    count, columns = rows.shape
    size = count * compute_row_bytes(kind, columns)
    out = ctypes.create_string_buffer(size)
    source = rows.ctypes.data_as(ctypes.c_void_p)
    matrix = None if weights is None else np.ascontiguousarray(weights, dtype="<f4").ctypes.data_as(ctypes.c_void_p)
    written = load_ggml().ggml_quantize_chunk(int(kind), source, out, 0, count, columns, matrix)
    if written != size:
        raise GgmlMissingError(f"ggml wrote {written} bytes of {kind.name} where {size} were due")
    return out.raw


@cache
def load_ggml() -> ctypes.CDLL:
    """Ggml's base library with the signature of ``ggml_quantize_chunk`` declared.

    Raises:
        GgmlMissingError: It is not installed, or does not load.
    """
    try:
        library = ctypes.CDLL(str(_find_library()))
        chunk = library.ggml_quantize_chunk
    except (OSError, AttributeError) as error:
        raise GgmlMissingError("ggml's library does not load", cause=str(error)) from error
    whole = ctypes.c_int64
    chunk.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, whole, whole, whole, ctypes.c_void_p]
    chunk.restype = ctypes.c_size_t
    return library


def _find_library() -> Path:
    """The library's file; its name and folder differ from platform to platform."""
    spec = importlib.util.find_spec("libggml")
    for folder in spec.submodule_search_locations or [] if spec else []:
        for pattern in ("*ggml-base.so", "*ggml-base.dylib", "*ggml-base.dll", "*ggml-base.so.*"):
            if found := sorted(Path(folder).rglob(pattern)):
                return found[0]
    raise GgmlMissingError("libggml-python is not installed, or holds no library for this platform")
