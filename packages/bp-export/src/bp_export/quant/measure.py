"""Measure an importance matrix: how large the inputs of each weight's columns are while llama.cpp reads a text.

What ``llama-imatrix`` does (tools/imatrix in llama.cpp): the text is cut into chunks, each is evaluated, and for every
product of a weight with at least 16 vectors the squares of those are summed by column. llama.cpp comes from the package
xllamacpp (the extra ``verify``), whose library exports the C functions on Linux; they are called through ctypes, in a
process of its own: `python -m bp_export.quant.measure` reads one JSON object from standard input.

Two structures are reached by their place in memory: the callback in ``llama_context_params``, which is looked for, and
the fields of ``ggml_tensor``, which are compared with what the library's own functions say; where either does not
hold, nothing is measured.
"""

from __future__ import annotations

import ctypes
import importlib
import json
import struct
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
from gguf import GGUFWriter

from bp_export.chat.server import require_installed
from bp_export.errors import ImportanceInvalidError, LlamaCppMissingError, MeasureFailedError
from bp_export.formats.output import require_free_file
from bp_export.gguf.file import read_settings
from bp_export.local_paths import StrPath
from bp_export.quant.imatrix import COUNTS, SUMS
from bp_merge import Floats
from bp_runs.files import publish_bytes, require_folder
from bp_runs.wording import setting_ref

if TYPE_CHECKING:
    from sys import UnraisableHookArgs

CHUNK_TOKENS = 512
_LEAST_VECTORS = 16
_F32 = 0  # GGML_TYPE_F32
_PARAMS_BYTES = 1024  # more than either structure has; what is passed by value is only read as far as it goes
_NAME_AT, _SOURCES_AT, _NE_AT = 256, 152, 16

Sums: TypeAlias = dict[str, tuple[Floats, int]]
"""By tensor: sums of squares by column, and of how many vectors."""


@dataclass(frozen=True, slots=True)
class Measured:
    """An importance matrix that was measured."""

    path: Path
    tensors: int
    chunks: int
    tokens: int


def measure_importance(
    model: StrPath,
    text: StrPath,
    output: StrPath,
    *,
    chunk_tokens: int = CHUNK_TOKENS,
    chunks: int | None = None,
    force: bool = False,
) -> Measured:
    """Measure on a text and write the matrix as a GGUF that `read_importance` and llama-quantize read.

    Args:
        model: A GGUF, best in 16 or 32 bits.
        text: UTF-8 text like what the model is going to be used on.
        output: The file.
        chunk_tokens: Tokens of one chunk.
        chunks: At most so many; None for the whole text.
        force: Whether an earlier matrix may be replaced.

    Raises:
        OutputTakenError: Something stands at the output, or it is the model itself.
        ImportanceInvalidError: The text cannot be read, or is shorter than a chunk; or chunks are too short or too few.
        ChatFailedError: The model is no GGUF.
        LlamaCppMissingError: xllamacpp is not installed, or exports no C functions on this platform.
        MeasureFailedError: llama.cpp cannot load or run the model, or is built in a way that is not known.
    """
    require_installed()
    model, text, output = Path(model), Path(text), Path(output)
    if chunk_tokens < _LEAST_VECTORS or (chunks is not None and chunks < 1):
        raise ImportanceInvalidError(
            f"a matrix is measured on one chunk or more, each of {_LEAST_VECTORS} tokens or more",
            fix=f"Measure on all chunks, each of the usual size: {setting_ref('chunk_tokens', CHUNK_TOKENS)}",
        )
    read_settings(model)
    try:
        text.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ImportanceInvalidError(f"{text} cannot be read as text", cause=str(error)) from error
    require_free_file(output, force=force, sources=[model])
    require_folder(output.parent)
    asked = {"model": str(model), "text": str(text), "chunk_tokens": chunk_tokens, "chunks": chunks}
    with tempfile.TemporaryDirectory(prefix="bp-export-") as scratch:
        matrix = Path(scratch) / "matrix.gguf"
        told = _run({**asked, "output": str(matrix)})
        publish_bytes(output, matrix.read_bytes())
    return Measured(output, told["tensors"], told["chunks"], told["tokens"])


def _run(asked: dict[str, Any]) -> dict[str, Any]:
    done = subprocess.run(  # our own module in our own interpreter
        [sys.executable, "-m", "bp_export.quant.measure"],
        input=json.dumps(asked).encode(),
        capture_output=True,
        check=False,
    )
    told: dict[str, Any] = json.loads(done.stdout) if done.stdout.startswith(b"{") else {}
    words = done.stderr.decode(errors="replace").strip()[-500:]
    match told.get("problem", "" if told else "died"):
        case "":
            return told
        case "short":
            raise ImportanceInvalidError(f"{asked['text']} is shorter than {asked['chunk_tokens']} tokens")
        case "missing":
            raise LlamaCppMissingError("xllamacpp's library exports no C functions here", cause=told["words"])
        case _:
            raise MeasureFailedError("llama.cpp could not be measured", cause=told.get("words") or words)


class _Unknown(Exception):  # noqa: N818  # inside this process only
    """The library is not built as this module expects."""


@dataclass(slots=True)
class _Collector:
    """Told of every node of the graph; sums up the inputs of the products that count."""

    library: ctypes.CDLL
    sums: Sums = field(default_factory=dict)
    failure: BaseException | None = None

    def __call__(self, tensor: int, is_asked: bool, _: Any) -> bool:
        if self.failure is not None:
            return False
        weight, values = self._find_product(tensor)
        if not weight:
            return not is_asked
        if not is_asked:
            self._add(weight, values)
        return True

    def note(self, what: UnraisableHookArgs) -> None:
        """Keep what a call raised, for C cannot pass it on; the next call then stops the evaluation."""
        self.failure = self.failure or what.exc_value

    def _find_product(self, tensor: int) -> tuple[str, int]:
        """The weight's name and the address of its input; an empty name for what does not count."""
        if self.library.ggml_op_desc(tensor) != b"MUL_MAT":
            return "", 0
        weight, values = struct.unpack("<QQ", ctypes.string_at(tensor + _SOURCES_AT, 16))
        name = self.library.ggml_get_name(weight)
        if not name or name != ctypes.string_at(weight + _NAME_AT, len(name)):
            raise _Unknown("a tensor's name is not where it was in ggml_tensor")
        is_counted = name.startswith(b"blk.") and name.endswith(b".weight")
        _, vectors, kind = self._read_shape(values)
        return (name.decode(), values) if is_counted and vectors >= _LEAST_VECTORS and kind == _F32 else ("", 0)

    def _read_shape(self, tensor: int) -> tuple[int, int, int]:
        ne = struct.unpack("<4q", ctypes.string_at(tensor + _NE_AT, 32))
        if ne[0] * ne[1] * ne[2] * ne[3] != self.library.ggml_nelements(tensor):
            raise _Unknown("a tensor's shape is not where it was in ggml_tensor")
        return ne[0], ne[1] * ne[2] * ne[3], int.from_bytes(ctypes.string_at(tensor, 4), "little")

    def _add(self, weight: str, tensor: int) -> None:
        columns, vectors, _ = self._read_shape(tensor)
        values = np.empty((vectors, columns), np.float32)
        if not self.library.ggml_is_contiguous(tensor) or self.library.ggml_nbytes(tensor) != values.nbytes:
            raise _Unknown(f"the input of {weight} does not lie in one piece")
        self.library.ggml_backend_tensor_get(tensor, values.ctypes.data, 0, values.nbytes)
        sums, count = self.sums.get(weight, (np.zeros(columns, np.float32), 0))
        self.sums[weight] = sums + np.square(values, dtype=np.float32).sum(axis=0, dtype=np.float32), count + vectors


class _Opaque(ctypes.Structure):
    _fields_ = [("bytes", ctypes.c_char * _PARAMS_BYTES)]


class _Batch(ctypes.Structure):
    """``llama_batch`` of llama.h."""

    _fields_ = [
        ("count", ctypes.c_int32),
        *[(name, ctypes.c_void_p) for name in ("tokens", "floats", "places", "counts", "sequences", "wanted")],
    ]


_CALLBACK = ctypes.CFUNCTYPE(ctypes.c_bool, ctypes.c_void_p, ctypes.c_bool, ctypes.c_void_p)
_LOG = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)


def _load_library() -> ctypes.CDLL:
    """The C functions with their signatures; AttributeError where one is not exported."""
    module = importlib.import_module("xllamacpp.xllamacpp")
    library = ctypes.CDLL(str(module.__file__))
    pointer, number = ctypes.c_void_p, ctypes.c_int32
    for name, result, arguments in (
        ("ggml_op_desc", ctypes.c_char_p, [pointer]),
        ("ggml_get_name", ctypes.c_char_p, [pointer]),
        ("ggml_nelements", ctypes.c_int64, [pointer]),
        ("ggml_nbytes", ctypes.c_size_t, [pointer]),
        ("ggml_is_contiguous", ctypes.c_bool, [pointer]),
        ("ggml_backend_tensor_get", None, [pointer, pointer, ctypes.c_size_t, ctypes.c_size_t]),
        ("ggml_backend_load_all", None, []),
        ("llama_log_set", None, [_LOG, pointer]),
        ("llama_backend_init", None, []),
        ("llama_model_default_params", _Opaque, []),
        ("llama_context_default_params", _Opaque, []),
        ("llama_model_load_from_file", pointer, [ctypes.c_char_p, _Opaque]),
        ("llama_init_from_model", pointer, [pointer, _Opaque]),
        ("llama_model_get_vocab", pointer, [pointer]),
        ("llama_vocab_get_add_bos", ctypes.c_bool, [pointer]),
        ("llama_vocab_bos", number, [pointer]),
        ("llama_get_memory", pointer, [pointer]),
        ("llama_memory_clear", None, [pointer, ctypes.c_bool]),
        ("llama_decode", number, [pointer, _Batch]),
        (
            "llama_tokenize",
            number,
            [pointer, ctypes.c_char_p, number, pointer, number, ctypes.c_bool, ctypes.c_bool],
        ),
    ):
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    return library


def _find_callback(params: _Opaque) -> int:
    """Where ``cb_eval`` is: two null pointers, then the cache's two types, which are f16 by default."""
    raw = bytes(memoryview(params))
    n_ctx, n_batch, n_ubatch = struct.unpack("<3I", raw[:12])
    mark = bytes(16) + struct.pack("<2i", 1, 1)
    places = [at for at in range(16, 256, 8) if raw[at : at + len(mark)] == mark]
    if (n_ctx, n_batch, n_ubatch) != (512, 2048, 512) or len(places) != 1:
        raise _Unknown("llama_context_params is not laid out as expected")
    return places[0]


def _tokenize(library: ctypes.CDLL, vocab: int, text: bytes) -> list[int]:
    room = len(text) + 16
    tokens = (ctypes.c_int32 * room)()
    count = library.llama_tokenize(vocab, text, len(text), tokens, room, True, False)
    return list(tokens[: max(count, 0)])


def _cut(tokens: list[int], size: int, chunks: int | None, bos: int | None) -> Iterator[list[int]]:
    """Whole chunks, each of which begins as a text does."""
    count = len(tokens) // size
    for i in range(count if chunks is None else min(count, chunks)):
        chunk = tokens[i * size : (i + 1) * size]
        yield chunk if bos is None else [bos, *chunk[1:]]


def _decode(library: ctypes.CDLL, context: int, chunk: list[int]) -> bool:
    """Whether llama.cpp could evaluate the chunk."""
    count = len(chunk)
    tokens, places = (ctypes.c_int32 * count)(*chunk), (ctypes.c_int32 * count)(*range(count))
    zero = (ctypes.c_int32 * 1)(0)
    sequences = (ctypes.c_void_p * count)(*[ctypes.addressof(zero)] * count)
    counts = (ctypes.c_int32 * count)(*[1] * count)
    # All places are needed: llama.cpp leaves the others out of the last layer.
    wanted = (ctypes.c_int8 * count)(*[1] * count)
    parts = (ctypes.cast(part, ctypes.c_void_p) for part in (tokens, places, counts, sequences, wanted))
    first, *rest = parts
    library.llama_memory_clear(library.llama_get_memory(context), True)
    return bool(library.llama_decode(context, _Batch(count, first, None, *rest)) == 0)


def _measure(asked: dict[str, Any]) -> dict[str, Any]:
    library = _load_library()
    quiet = _LOG(lambda *_: None)
    library.llama_log_set(quiet, None)
    library.llama_backend_init()
    library.ggml_backend_load_all()
    model = library.llama_model_load_from_file(asked["model"].encode(), library.llama_model_default_params())
    if not model:
        return {"problem": "failed", "words": f"llama.cpp cannot load {asked['model']}"}
    collector, size = _Collector(library), int(asked["chunk_tokens"])
    callback, sys.unraisablehook = _CALLBACK(collector), collector.note
    params = library.llama_context_default_params()
    place = _find_callback(params)
    ctypes.memmove(ctypes.byref(params), struct.pack("<3I", size, size, size), 12)
    ctypes.memmove(ctypes.byref(params, place), bytes(ctypes.c_void_p(ctypes.cast(callback, ctypes.c_void_p).value)), 8)
    context = library.llama_init_from_model(model, params)
    if not context:
        return {"problem": "failed", "words": f"llama.cpp has no room for chunks of {size} tokens"}
    vocab = library.llama_model_get_vocab(model)
    bos = library.llama_vocab_bos(vocab) if library.llama_vocab_get_add_bos(vocab) else None
    tokens = _tokenize(library, vocab, Path(asked["text"]).read_bytes())
    done = 0
    for chunk in _cut(tokens, size, asked["chunks"], bos):
        is_done = _decode(library, context, chunk)
        if collector.failure is not None:
            raise collector.failure
        if not is_done:
            raise _Unknown("llama.cpp could not evaluate a chunk")
        done += 1
    if not done:
        return {"problem": "short"}
    write_importance(Path(asked["output"]), collector.sums, done, size, Path(asked["text"]).name)
    return {"tensors": len(collector.sums), "chunks": done, "tokens": done * size}


def write_importance(path: Path, sums: Sums, chunks: int, chunk_tokens: int, source: str) -> None:
    """A matrix as llama-imatrix writes it: ``general.type`` imatrix, and two tensors for each weight."""
    writer = GGUFWriter(path, arch="imatrix")
    writer.add_type("imatrix")
    writer.add_array("imatrix.datasets", [source])
    writer.add_uint32("imatrix.chunk_count", chunks)
    writer.add_uint32("imatrix.chunk_size", chunk_tokens)
    for name, (values, count) in sorted(sums.items()):
        writer.add_tensor(name + SUMS, values.reshape(1, -1))
        writer.add_tensor(name + COUNTS, np.full((1, 1), count, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def main() -> None:
    """One measurement: JSON in, JSON out."""
    try:
        told = _measure(json.loads(sys.stdin.buffer.read()))
    except (ImportError, AttributeError) as error:
        told = {"problem": "missing", "words": str(error)}
    except (_Unknown, OSError) as error:
        told = {"problem": "failed", "words": str(error)}
    sys.stdout.write(json.dumps(told) + "\n")


if __name__ == "__main__":
    main()
