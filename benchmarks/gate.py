"""What the gate costs against the export, at the shape of a 7B model with fewer layers: seconds and CPU seconds.

    python benchmarks/gate.py FOLDER --layers 3

Llama 2's shape (width 4096, 14336 units, 32 heads of 8 groups), random bf16 weights, a LoRA of rank 16, q4_k_m. The
gate reads as many tokens as it would of 7.2 billion weights, and without a witness, so its share is that of the whole
model; what it does once (it starts llama.cpp) counts for more here.
"""

from __future__ import annotations

import argparse
import resource
import sys
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1] / "packages/bp-export/tests"))

from export_pico import write_json, write_lora, write_tokenizer

import bp_export
from bp_export.verify import evidence
from bp_merge import read_model_index, write_tensors

VOCAB, WIDTH, UNITS, KEYS = 32_000, 4096, 14_336, 1024
TOKENS = 64  # of 7.2 billion weights; half of that without a witness


def write_model(folder: Path, layers: int) -> Path:
    base, draw = folder / "base", np.random.default_rng(0)
    write_tokenizer(base)
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": WIDTH, "vocab_size": VOCAB}
    config |= {
        "intermediate_size": UNITS,
        "num_hidden_layers": layers,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
    }
    config |= {"max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "rope_theta": 1e4, "tie_word_embeddings": False}
    write_json(base / "config.json", {**config, "hidden_act": "silu", "bos_token_id": 1, "eos_token_id": 2})
    shapes = {"model.embed_tokens": (VOCAB, WIDTH), "lm_head": (VOCAB, WIDTH), "model.norm": (WIDTH,)}
    for i in range(layers):
        stem = f"model.layers.{i}"
        shapes |= {
            f"{stem}.self_attn.{n}_proj": (rows, WIDTH)
            for n, rows in zip("qkvo", (WIDTH, KEYS, KEYS, WIDTH), strict=True)
        }
        shapes |= {f"{stem}.mlp.{n}_proj": (UNITS, WIDTH) for n in ("gate", "up")}
        shapes |= {f"{stem}.mlp.down_proj": (WIDTH, UNITS)}
        shapes |= {f"{stem}.{n}_layernorm": (WIDTH,) for n in ("input", "post_attention")}
    tensors = {
        f"{n}.weight": draw.standard_normal(s, np.float32) * np.float32(0.02) if len(s) > 1 else np.ones(s, np.float32)
        for n, s in shapes.items()
    }
    write_tensors(base / "model.safetensors", tensors, dtype="BF16")
    return write_lora(folder / "lora", base, r=16)


def measure_cpu() -> float:
    """CPU seconds of this process and those that it has waited for."""
    both = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(one.ru_utime + one.ru_stime for one in both)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--layers", type=int, default=3)
    options = parser.parse_args()
    lora = options.folder / "lora"
    if not lora.exists():
        write_model(options.folder, options.layers)
    weights = sum(info.rows * info.columns for info in read_model_index(options.folder / "base").values())
    evidence.WORK, evidence.LARGE = TOKENS * weights, weights - 1
    found = {}
    for verify in (False, True):
        begun, cpu = time.monotonic(), measure_cpu()
        done = bp_export.export_adapter(
            lora, quantization="q4_k_m", output=options.folder / "x.gguf", verify=verify, force=True
        )
        found[verify] = (time.monotonic() - begun, measure_cpu() - cpu)
    export, gate = found[False], tuple(b - a for a, b in zip(*(found[v] for v in (False, True)), strict=True))
    print(
        f"{weights / 1e9:.2f} billion weights: export {export[0]:.1f} s ({export[1]:.1f} CPU s), gate {gate[0]:.1f} s ({gate[1]:.1f} CPU s)"
    )
    print(f"share of the export: {gate[0] / export[0]:.0%} of the time, {gate[1] / export[1]:.0%} of CPU time")
    print(done.parity.summary if done.parity else "")


if __name__ == "__main__":
    main()
