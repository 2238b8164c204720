"""Merging two r = 256 adapters of a 7B shape: time against that of reading and writing them, and peak memory.

    uv run python benchmarks/merge.py [--r 256] [--layers 28] [--method linear …] [--repeat 3] [--dtype F32] [--folder DIR]

The shape is Qwen2.5-7B's, all seven linear kinds. Each measurement is a process of its own. There are two floors. Both
read both adapters, decoded to float32; "read and write" writes both again, "read, write one" one adapter of their size,
as a merge does, hashed and fsynced as every adapter folder is. Ratios are taken within each round, in which all run one
after the other. CPU seconds stand next to wall seconds, since the machine may be shared.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import numpy as np

from bp_merge.tensors import TensorStreamWriter

HIDDEN, KEYS, INNER = 3584, 512, 18944
SHAPES = {
    "self_attn.q_proj": (HIDDEN, HIDDEN), "self_attn.k_proj": (KEYS, HIDDEN), "self_attn.v_proj": (KEYS, HIDDEN),
    "self_attn.o_proj": (HIDDEN, HIDDEN), "mlp.gate_proj": (INNER, HIDDEN), "mlp.up_proj": (INNER, HIDDEN),
    "mlp.down_proj": (HIDDEN, INNER),
}  # fmt: skip

READ_AND_WRITE = """
import sys
from pathlib import Path
from bp_merge import AdapterSource
from bp_merge.tensors import TensorStreamWriter, read_index
from bp_runs.adapter import write_manifest
from bp_runs.files import publish_folder
folder, dtype, copies = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
for number in range(2):
    with AdapterSource(folder / "ab"[number]) as source:
        if number >= copies:
            for module in source.modules:
                source.read(module)
            continue
        shapes = {name: (dtype, info.shape) for name, info in read_index(source.folder.weights).items()}
        with publish_folder(folder / f"copy-{number}") as partial:
            with TensorStreamWriter(partial / "adapter_model.safetensors", shapes) as writer:
                for module in source.modules:
                    pair = source.read(module)
                    writer.write(f"base_model.model.{module}.lora_A.weight", pair.a)
                    writer.write(f"base_model.model.{module}.lora_B.weight", pair.b)
            write_manifest(partial, run_id="copy", base="base", known={"adapter_model.safetensors": writer.sha256})
"""
MERGE = """
import sys
from pathlib import Path
from bp_merge import merge_adapters
folder = Path(sys.argv[1])
done = merge_adapters([folder / "a", folder / "b"], folder / "merged", run_id="merge", method=sys.argv[3])
print(done.kept)
"""


def write_random(folder: Path, seed: int, r: int, layers: int, dtype: str) -> None:
    """An adapter with random factors, as PEFT would have written it."""
    folder.mkdir()
    rng = np.random.default_rng(seed)
    names = {}
    for layer in range(layers):
        for kind, (d_out, d_in) in SHAPES.items():
            stem = f"base_model.model.model.layers.{layer}.{kind}"
            names |= {f"{stem}.lora_A.weight": (dtype, (r, d_in)), f"{stem}.lora_B.weight": (dtype, (d_out, r))}
    with TensorStreamWriter(folder / "adapter_model.safetensors", names) as writer:
        for name, (_, shape) in names.items():
            writer.write(name, rng.standard_normal(shape, np.float32) * np.float32(0.02))
    config = {"peft_type": "LORA", "base_model_name_or_path": "base", "r": r, "lora_alpha": 2 * r}
    (folder / "adapter_config.json").write_text(json.dumps(config))


def measure(script: str, *arguments: str) -> dict[str, float]:
    """Wall and CPU seconds and peak MiB of a script in a process of its own."""
    begun = time.perf_counter()
    process = subprocess.Popen([sys.executable, "-c", script, *arguments], stdout=subprocess.PIPE, text=True)
    said = process.stdout.read() if process.stdout else ""
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        sys.exit(f"failed: {process.returncode}")
    cpu = usage.ru_utime + usage.ru_stime
    return {"wall": time.perf_counter() - begun, "cpu": cpu, "mib": usage.ru_maxrss / 1024, "kept": float(said or 1)}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--r", type=int, default=256)
    parser.add_argument("--layers", type=int, default=28)
    parser.add_argument("--method", nargs="*", default=["linear"])
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--dtype", choices=("F32", "BF16"), default="F32")
    parser.add_argument("--folder", type=Path, help="where to work; default: the system's temporary folder")
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(dir=options.folder))
    try:
        for seed, name in enumerate("ab"):
            write_random(folder / name, seed, options.r, options.layers, options.dtype)
        size = (folder / "a" / "adapter_model.safetensors").stat().st_size
        print(f"two adapters of r {options.r}, {options.layers} layers, {options.dtype}: {size / 2**30:.2f} GiB each")
        both, one, found = [], [], {method: [] for method in options.method}
        for _ in range(options.repeat):
            both.append(measure(READ_AND_WRITE, str(folder), options.dtype, "2"))
            one.append(measure(READ_AND_WRITE, str(folder), options.dtype, "1"))
            for method, rounds in found.items():
                rounds.append(measure(MERGE, str(folder), options.dtype, method))
        for method, rounds in {"read and write": both, "read, write one": one, **found}.items():
            tell(method, rounds, both, one)
    finally:
        shutil.rmtree(folder)


def tell(name: str, found: list[dict[str, float]], *floors: list[dict[str, float]]) -> None:
    walls, cpus = sorted(f["wall"] for f in found), [f["cpu"] for f in found]
    line = f"{name:<15} wall {median(walls):5.1f} s ({walls[0]:.1f}-{walls[-1]:.1f})  cpu {median(cpus):5.1f} s  "
    line += f"peak {max(f['mib'] for f in found):4.0f} MiB"
    for floor in floors:
        times = sorted(one["wall"] / other["wall"] for one, other in zip(found, floor, strict=True))
        line += f"  {median(times):5.2f} x ({times[0]:.2f}-{times[-1]:.2f})"
    print(f"{line}  kept {found[0]['kept']:.3f}", flush=True)


if __name__ == "__main__":
    main()
