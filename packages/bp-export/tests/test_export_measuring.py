"""Importance matrices that are measured: sums of squares that NumPy computes too, and what a quantizer makes of them."""

import json
import subprocess
import sys

import gguf
import numpy as np
import pytest
from export_pico import export_adapter, skip_without_llama_cpp, write_base, write_lora

from bp_export.cli.app import main
from bp_export.errors import ImportanceInvalidError, MeasureFailedError, OutputTakenError
from bp_export.quant.imatrix import read_importance
from bp_export.quant.measure import measure_importance

skip_without_llama_cpp()

TEXT = "the cat sat on the mat and the dog ran; numbers 12 345 and words, words! " * 20


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("measured")
    base = write_base(folder / "base", hidden=256, inner=512)
    (folder / "text.txt").write_text(TEXT)
    model = export_adapter(base, quantization="f32").path
    measured = measure_importance(model, folder / "text.txt", folder / "matrix.gguf", chunk_tokens=64, chunks=3)
    return {"folder": folder, "base": base, "model": model, "measured": measured}


def test_the_first_layers_sums_are_those_of_the_normed_embeddings(made):
    from tokenizers import Tokenizer

    tensors = {t.name: np.array(t.data) for t in gguf.GGUFReader(made["model"]).tensors}
    ids = Tokenizer.from_file(str(made["base"] / "tokenizer.json")).encode(TEXT).ids[: 3 * 64]
    rows = tensors["token_embd.weight"][ids].astype(np.float64)
    normed = rows / np.sqrt((rows**2).mean(axis=1, keepdims=True) + 1e-5) * tensors["blk.0.attn_norm.weight"]
    expected = (normed**2).mean(axis=0)
    for name in ("q", "k", "v"):
        found = read_importance(made["measured"].path)[f"blk.0.attn_{name}.weight"]
        assert np.allclose(found, expected, rtol=1e-4), name


def test_every_weight_of_the_layers_is_measured_on_every_token(made):
    found = {t.name: t.data for t in gguf.GGUFReader(made["measured"].path).tensors}
    weights = [t for t in gguf.GGUFReader(made["model"]).tensors if t.name.startswith("blk.") and len(t.shape) == 2]
    assert len(found) == 2 * len(weights) == 2 * made["measured"].tensors
    for tensor in weights:
        assert found[f"{tensor.name}.in_sum2"].shape == (1, tensor.shape[0])
        assert float(found[f"{tensor.name}.counts"].reshape(-1)[0]) == made["measured"].tokens == 3 * 64


def test_it_changes_what_is_quantized_and_its_weighted_error_falls(made):
    matrix = read_importance(made["measured"].path)
    errors = []
    for importance in (None, made["measured"].path):
        out = made["folder"] / f"{importance is None}.gguf"
        export_adapter(made["base"], quantization="q4_k_s", importance=importance, output=out)
        truth = {t.name: np.array(t.data) for t in gguf.GGUFReader(made["model"]).tensors}
        rough = {t.name: gguf.dequantize(t.data, t.tensor_type) for t in gguf.GGUFReader(out).tensors}
        errors.append(sum(float((np.square(rough[n] - truth[n]) * w).sum()) for n, w in matrix.items()))
    assert errors[1] < errors[0]


def test_from_an_adapter_by_the_command(made, tmp_path, capsys):
    lora = write_lora(tmp_path / "lora", made["base"])
    argv = ["imatrix", str(lora), "--text", str(made["folder"] / "text.txt"), "--chunk-tokens", "64", "--chunks", "1"]
    assert main([*argv, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["path"], told["chunks"], told["tokens"]) == (str(tmp_path / "lora-imatrix.gguf"), 1, 64)
    assert main([str(lora), "--quantization", "q4_k_m", "--imatrix", told["path"], "--no-verify"]) == 0
    assert main(argv) == 1
    assert "[INPUT_EXPORT_OUTPUT_TAKEN]" in capsys.readouterr().err
    assert main([*argv, "--force"]) == 0


# In a process of its own: a second ggml beside the reference quantizer's would abort this one.
TENSORS = """
import ctypes
import sys
import bp_export.quant.measure as measuring

library = measuring._load_library()
pointer, number = ctypes.c_void_p, ctypes.c_int64
class Params(ctypes.Structure):
    _fields_ = [("bytes", ctypes.c_size_t), ("place", pointer), ("no_alloc", ctypes.c_bool)]
for name, arguments in (
    ("ggml_init", [Params]),
    ("ggml_new_tensor_2d", [pointer, ctypes.c_int, number, number]),
    ("ggml_transpose", [pointer, pointer]),
    ("ggml_mul_mat", [pointer, pointer, pointer]),
    ("ggml_set_name", [pointer, ctypes.c_char_p]),
    ("ggml_backend_cpu_init", []),
    ("ggml_backend_alloc_ctx_tensors", [pointer, pointer]),
):
    getattr(library, name).restype, getattr(library, name).argtypes = pointer, arguments
context = library.ggml_init(Params(2**20, None, True))
weight, values, wide = (library.ggml_new_tensor_2d(context, 0, *s) for s in ((32, 4), (32, 16), (16, 32)))
turned = library.ggml_transpose(context, wide)
product = library.ggml_mul_mat(context, weight, values)
library.ggml_backend_alloc_ctx_tensors(context, library.ggml_backend_cpu_init())
collector = measuring._Collector(library)
collector._add("blk.0.attn_q.weight", values)
print(list(collector.sums))
try:
    collector._add("blk.0.attn_k.weight", turned)
except measuring._Unknown as error:
    print(error)

sys.unraisablehook = collector.note
call = measuring._CALLBACK(collector)
library.ggml_set_name(weight, b"blk.0.attn_q.weight")
print(call(product, True, None), collector.failure)
library.ggml_set_name(weight, b"blk.0.\\xff.weight")
call(product, True, None)  # answers nothing that is defined
print(call(product, True, None), type(collector.failure).__name__)
"""


def test_a_turned_input_is_not_taken_for_rows_and_no_error_of_a_callback_is_lost():
    done = subprocess.run([sys.executable, "-c", TENSORS], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.splitlines() == [
        "['blk.0.attn_q.weight']",
        "the input of blk.0.attn_k.weight does not lie in one piece",
        "True None",
        "False UnicodeDecodeError",
    ]


def test_what_cannot_be_measured(made, tmp_path):
    (tmp_path / "short.txt").write_text("the cat")
    (tmp_path / "bytes.txt").write_bytes(b"\xff\xfe\xff")
    for text, word in (("short.txt", "shorter than"), ("bytes.txt", "cannot be read"), ("none.txt", "cannot be read")):
        with pytest.raises(ImportanceInvalidError, match=word):
            measure_importance(made["model"], tmp_path / text, tmp_path / "out.gguf")
    whole = made["model"].read_bytes()
    (tmp_path / "torn.gguf").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(MeasureFailedError):
        measure_importance(tmp_path / "torn.gguf", made["folder"] / "text.txt", tmp_path / "out.gguf")
    with pytest.raises(OutputTakenError):
        measure_importance(made["model"], made["folder"] / "text.txt", made["measured"].path)
    with pytest.raises(OutputTakenError, match="read for it"):
        measure_importance(made["model"], made["folder"] / "text.txt", made["model"], force=True)
    assert made["model"].read_bytes() == whole
    for asked in ({"chunk_tokens": 15}, {"chunk_tokens": 0}, {"chunks": 0}):
        with pytest.raises(ImportanceInvalidError, match="one chunk or more"):
            measure_importance(made["model"], made["folder"] / "text.txt", tmp_path / "out.gguf", **asked)
    assert not (tmp_path / "out.gguf").exists()
