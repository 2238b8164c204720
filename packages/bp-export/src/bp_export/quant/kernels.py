"""Rows of float32 in, the bytes of a GGUF tensor out, by the fastest of three engines that all give the same bytes.

``compiled``: our own kernels (``native/``), where a compiler was at hand when the package was built. ``ggml``: its own
quantizer (``ggml_quantize_chunk`` in ggml.c, MIT license) by way of ctypes, from the package libggml-python: the source
that llama-quantize uses, built for x86-64 without fused multiply-adds, so that the bytes are the same on every x86-64.
``numpy``: works everywhere, with gguf-py for Q4_0, Q4_1, Q5_0, Q5_1 and MXFP4. Rows are independent: no cut into chunks
changes a byte. Only IQ4_XS, IQ4_NL, Q3_K and Q2_K, and importance matrices, need ggml's library.

Weights are finite: the export rejects others. Infinities come out as ggml's do; NaNs may not.
"""

from __future__ import annotations

import ctypes
import importlib.util
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import Literal, TypeAlias

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, quants

from bp_export.errors import GgmlMissingError
from bp_export.quant.numpy_kernels import Bytes, quantize_blocks
from bp_merge import Floats, encode

try:
    from bp_export import _kernels
except ImportError:  # no compiler when the package was installed
    _kernels = None  # type: ignore[assignment]

TARGETS: tuple[str, ...] = _kernels.TARGETS if _kernels is not None else ()
"""What the compiled kernels can run on here, the fastest last; empty without them."""

TensorType: TypeAlias = GGMLQuantizationType
Engine: TypeAlias = Literal["compiled", "ggml", "numpy"]

# The types that are ours, with the bits that the kernels know them by.
_BITS: Mapping[TensorType, int] = MappingProxyType(
    {TensorType.Q4_K: 4, TensorType.Q5_K: 5, TensorType.Q6_K: 6, TensorType.Q8_0: 8}
)
_COMPILED = (TensorType.Q4_K, TensorType.Q5_K, TensorType.Q6_K, TensorType.Q8_0, TensorType.BF16)
# gguf-py's own, which give ggml's bytes: what the 4 to 6 bits fall back to where a row is no multiple of 256, and
# gpt-oss's experts.
_GGUF_PY = (TensorType.Q4_0, TensorType.Q4_1, TensorType.Q5_0, TensorType.Q5_1, TensorType.MXFP4)
_PLAIN: Mapping[TensorType, Literal["BF16", "F16"]] = MappingProxyType({TensorType.BF16: "BF16", TensorType.F16: "F16"})


def compute_row_bytes(kind: TensorType, columns: int) -> int:
    """Bytes of one row of ``columns`` weights; ``columns`` must be a multiple of the type's block."""
    block, block_bytes = GGML_QUANT_SIZES[kind]
    return int(columns // block * block_bytes)


def read_block(kind: TensorType) -> int:
    """Weights in one block of a type: 1, 32 or 256."""
    return int(GGML_QUANT_SIZES[kind][0])


def quantize_rows(
    rows: Floats, kind: TensorType, weights: Floats | None = None, *, engine: Engine | None = None
) -> Bytes:
    """Rows (n, columns) of float32 as the bytes of ``kind``; other threads run meanwhile.

    Args:
        rows: The weights.
        kind: The type.
        weights: How much each column matters, (columns,) float32; None for all alike.
        engine: What computes; None for `choose_engine`'s choice.

    Raises:
        GgmlMissingError: Only ggml can do it, and its library cannot be loaded.
    """
    rows = np.ascontiguousarray(rows, dtype="<f4")
    if kind == TensorType.F32:
        return rows.reshape(-1).view(np.uint8)
    engine = engine or choose_engine(kind, is_weighted=weights is not None)
    if engine == "compiled":
        return quantize_compiled(rows, kind, len(TARGETS) - 1)
    return _quantize_with_ggml(rows, kind, weights) if engine == "ggml" else _quantize_in_numpy(rows, kind)


def quantize_compiled(rows: Floats, kind: TensorType, target: int) -> Bytes:
    """`quantize_rows` by the compiled kernels for the target `TARGETS[target]`, of the types that they have."""
    if kind == TensorType.BF16:
        return np.frombuffer(encode(rows, "BF16"), np.uint8)
    out = np.empty(rows.shape[0] * compute_row_bytes(kind, rows.shape[1]), np.uint8)
    _kernels.quantize(_BITS[kind], rows, out, target)
    return out


def is_finite(rows: Floats) -> bool:
    """Whether no weight is an infinity or a NaN."""
    if TARGETS:
        return _kernels.is_finite(np.ascontiguousarray(rows))
    return bool(np.isfinite(rows.max()) and np.isfinite(rows.min()))


def choose_engine(kind: TensorType, *, is_weighted: bool = False) -> Engine:
    """The fastest engine that can do a type here; with an importance matrix (``is_weighted``) only ggml can.

    Raises:
        GgmlMissingError: Only ggml can do it, and its library cannot be loaded.
    """
    if kind == TensorType.F32:  # copied as it is, by whichever
        return "numpy"
    is_ours = (kind in _BITS or kind in _PLAIN or kind in _GGUF_PY) and not is_weighted
    if is_ours and TARGETS and kind in _COMPILED:
        return "compiled"
    if is_ours and not _has_ggml():
        return "numpy"
    load_ggml()
    return "ggml"


def describe_kernels() -> str:
    """What quantizes to 4, 5 and 6 bits here, in words: ``compiled (avx512)``, ``ggml`` or ``numpy``."""
    engine = choose_engine(TensorType.Q4_K)
    return f"compiled ({TARGETS[-1]})" if engine == "compiled" else engine


def _quantize_in_numpy(rows: Floats, kind: TensorType) -> Bytes:
    if kind in _PLAIN:
        return np.frombuffer(encode(rows, _PLAIN[kind]), np.uint8)
    if kind in _GGUF_PY:
        with np.errstate(all="ignore"):
            found: Bytes = quants.quantize(_align_zeros(rows, kind), kind).reshape(-1)
            return found
    return quantize_blocks(rows.reshape(-1), _BITS[kind])


def _align_zeros(rows: Floats, kind: TensorType) -> Floats:
    """Zeros with the sign that ggml's loop ends with, which decides the sign of a scale or minimum of zero.

    Its largest weight begins as +0, and only a larger one takes the place. Its minimum is the first zero of a block.
    """
    if kind in (TensorType.Q4_0, TensorType.Q5_0):
        return rows + np.float32(0)  # -0 + 0 is +0
    blocks = rows.reshape(-1, read_block(kind))
    zero = blocks == 0
    first = np.take_along_axis(blocks, zero.argmax(axis=1)[:, None], axis=1)
    return np.where(zero, first, blocks).reshape(rows.shape)


def _quantize_with_ggml(rows: Floats, kind: TensorType, weights: Floats | None) -> Bytes:
    count, columns = rows.shape
    out = np.empty(count * compute_row_bytes(kind, columns), np.uint8)
    matrix = None if weights is None else np.ascontiguousarray(weights, dtype="<f4").ctypes.data_as(ctypes.c_void_p)
    written = load_ggml().ggml_quantize_chunk(
        int(kind), rows.ctypes.data_as(ctypes.c_void_p), out.ctypes.data_as(ctypes.c_void_p), 0, count, columns, matrix
    )
    if written != out.size:
        raise GgmlMissingError(f"ggml wrote {written} bytes of {kind.name} where {out.size} were due")
    return out


def _has_ggml() -> bool:
    try:
        load_ggml()
    except GgmlMissingError:
        return False
    return True


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
