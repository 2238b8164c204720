"""Stored hashes of exported tensors, so that platforms without the reference quantizer can compare as well.

    python packages/bp-export/tests/make_golden.py

writes `golden.json` after each file has been found equal to `llama_model_quantize`'s (Linux on x86-64 only). The weights
come from a bit generator's raw stream, which NumPy promises to keep; tokens do not matter, since only tensors are hashed.
"""

import hashlib
import json
import sys
import tempfile
from pathlib import Path

import gguf
import numpy as np

sys.path.insert(0, str(Path(__file__).parent))

from export_pico import export_adapter, write_base, write_json

from bp_export import QUANTIZATIONS
from bp_merge import TensorReader, read_model_index, write_tensors

GOLDEN = Path(__file__).with_name("golden.json")
CASES = {
    "llama": {"hidden": 256, "inner": 256, "layers": 4},
    "qwen2": {"kind": "qwen2", "hidden": 256, "inner": 256, "layers": 2},
    "mistral": {"kind": "mistral", "hidden": 64, "inner": 96, "tied": False},
}
ROWS = 320  # of the embedding


def write_stable_base(folder: Path, name: str) -> Path:
    """A base whose weights are the same with every NumPy and every tokenizers package."""
    base = write_base(folder / name, **CASES[name])
    with TensorReader(read_model_index(base)) as reader:
        shapes = {n: i.shape for n, i in reader.tensors.items()}
    raw = np.random.PCG64(7)
    tensors = {}
    for key, found in sorted(shapes.items()):
        shape = (ROWS, *found[1:]) if key in ("model.embed_tokens.weight", "lm_head.weight") else found
        bits = raw.random_raw(int(np.prod(shape))) >> np.uint64(40)
        tensors[key] = ((bits.astype(np.float32) / np.float32(2**24) - np.float32(0.5)) / 8).reshape(shape)
    write_tensors(base / "model.safetensors", tensors, dtype="BF16")
    write_json(base / "config.json", {**json.loads((base / "config.json").read_text()), "vocab_size": ROWS})
    return base


def hash_tensors(path: Path) -> str:
    """Over names, types and bytes, in the file's order."""
    digest = hashlib.sha256()
    for tensor in gguf.GGUFReader(path).tensors:
        digest.update(f"{tensor.name} {tensor.tensor_type.name}\n".encode())
        digest.update(tensor.data.tobytes())
    return digest.hexdigest()


def main() -> None:
    import conftest

    quantize = conftest.llama_quantize.__wrapped__()
    table = {}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        for name in CASES:
            base = write_stable_base(folder, name)
            plain = export_adapter(base, quantization="bf16", output=folder / "plain.gguf").path
            table[name] = {"bf16": hash_tensors(plain)}
            for asked in QUANTIZATIONS.values():
                if asked.is_float:
                    continue
                ours = export_adapter(base, quantization=asked.name, output=folder / "ours.gguf").path
                quantize(plain, folder / "theirs.gguf", asked.name)
                assert ours.read_bytes() == (folder / "theirs.gguf").read_bytes(), (name, asked.name)
                table[name][asked.name] = hash_tensors(ours)
    GOLDEN.write_text(json.dumps(table, indent=1) + "\n")


if __name__ == "__main__":
    main()
