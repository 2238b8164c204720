"""A model of 7 billion weights goes through in little memory: its shards are files with holes, which take no disk."""

import os
import subprocess
import sys

import gguf
import numpy as np
import pytest
from export_pico import write_json, write_tokenizer

from bp_merge import build_header, encode

# Qwen2.5-7B's shape.
WIDTH, INNER, LAYERS, HEADS, KEY_HEADS, ROWS, RANK = 3584, 18944, 28, 28, 4, 152064, 16
SHARDS = 4
LIMIT_MIB = 400
KEY = WIDTH // HEADS * KEY_HEADS
LINEARS = {
    "self_attn.q_proj": (WIDTH, WIDTH),
    "self_attn.k_proj": (KEY, WIDTH),
    "self_attn.v_proj": (KEY, WIDTH),
    "self_attn.o_proj": (WIDTH, WIDTH),
    "mlp.gate_proj": (INNER, WIDTH),
    "mlp.up_proj": (INNER, WIDTH),
    "mlp.down_proj": (WIDTH, INNER),
}
CONFIG = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "hidden_size": WIDTH,
    "intermediate_size": INNER,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KEY_HEADS,
    "vocab_size": ROWS,
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
    "tie_word_embeddings": False,
    "hidden_act": "silu",
    "bos_token_id": 1,
    "eos_token_id": 2,
}
EXPORT = """
import sys
from pathlib import Path
from bp_export import export_adapter
folder = Path(sys.argv[1])
export_adapter(folder / "lora", quantization="q4_k_m", output=folder / "x.gguf", threads=2, verify=False)
"""


def write_sparse_base(folder):
    """Every weight is zero but for the first million bytes of a shard; the files' holes read as zeros."""
    write_tokenizer(folder, family="qwen2")
    write_json(folder / "config.json", CONFIG)
    shapes = {
        "model.embed_tokens.weight": (ROWS, WIDTH),
        "lm_head.weight": (ROWS, WIDTH),
        "model.norm.weight": (WIDTH,),
    }
    for i in range(LAYERS):
        stem = f"model.layers.{i}"
        shapes |= {f"{stem}.{name}.weight": shape for name, shape in LINEARS.items()}
        shapes |= {f"{stem}.self_attn.{name}_proj.bias": (LINEARS[f"self_attn.{name}_proj"][0],) for name in "qkv"}
        shapes |= {f"{stem}.{name}.weight": (WIDTH,) for name in ("input_layernorm", "post_attention_layernorm")}
    weight_map = {}
    start = encode(np.random.default_rng(0).standard_normal(500_000, np.float32) * np.float32(0.02), "BF16")
    for number in range(SHARDS):
        file = f"model-{number + 1:05d}-of-{SHARDS:05d}.safetensors"
        mine = dict(list(shapes.items())[number::SHARDS])
        weight_map |= dict.fromkeys(mine, file)
        header = build_header({name: ("BF16", shape) for name, shape in mine.items()}, {"format": "pt"})
        with (folder / file).open("wb") as out:
            out.write(header)
            out.write(start)
            out.truncate(len(header) + 2 * sum(int(np.prod(shape)) for shape in mine.values()))
    write_json(folder / "model.safetensors.index.json", {"metadata": {}, "weight_map": weight_map})
    return sum(int(np.prod(shape)) for shape in shapes.values())


def write_real_lora(folder, base):
    folder.mkdir()
    random = np.random.default_rng(1)
    shapes = {}
    for i in range(LAYERS):
        for name, (out, into) in LINEARS.items():
            stem = f"base_model.model.model.layers.{i}.{name}"
            shapes |= {f"{stem}.lora_A.weight": (RANK, into), f"{stem}.lora_B.weight": (out, RANK)}
    with (folder / "adapter_model.safetensors").open("wb") as file:
        file.write(build_header({name: ("F32", shape) for name, shape in shapes.items()}, {"format": "pt"}))
        for shape in shapes.values():
            file.write(encode(random.standard_normal(shape, np.float32) * np.float32(0.02), "F32"))
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": RANK, "lora_alpha": 32, "bias": "none"}
    write_json(
        folder / "adapter_config.json", {**config, "base_model_name_or_path": str(base), "target_modules": "all-linear"}
    )


@pytest.mark.slow
@pytest.mark.timeout(0)
@pytest.mark.skipif(sys.platform == "win32", reason="files with holes, and the peak memory of a child")
def test_seven_billion_weights_go_through_in_400_mib(tmp_path, capsys):
    count = write_sparse_base(tmp_path / "base")
    write_real_lora(tmp_path / "lora", tmp_path / "base")
    assert count > 7.6e9
    try:
        with subprocess.Popen([sys.executable, "-c", EXPORT, str(tmp_path)]) as process:
            _, status, usage = os.wait4(process.pid, 0)
            process.returncode = os.waitstatus_to_exitcode(status)
        assert process.returncode == 0
        peak = usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 2**20
        size = (tmp_path / "x.gguf").stat().st_size
        with capsys.disabled():
            print(
                f"\n{count / 1e9:.2f} billion weights, {size / 2**20:,.0f} MiB: peak {peak:.0f} MiB, {usage.ru_utime + usage.ru_stime:.0f} CPU s"
            )
        assert peak < LIMIT_MIB
        assert 4.3e9 < size < 5e9
        written = {tensor.name: tensor for tensor in gguf.GGUFReader(tmp_path / "x.gguf").tensors}
        assert len(written) == 3 + LAYERS * 12
        assert written["blk.27.attn_q.weight"].data.any()
    finally:
        for file in (*tmp_path.glob("*.gguf"), *tmp_path.glob("*/*.safetensors")):
            file.unlink()
