"""Estimates against peaks that were measured on an H100 capped to 16 GB; no GPU is needed to compare them.

The numbers are those of docs/log/2026-11-24-gpu.md: GiB that torch had allocated at most, and reserved at most. The
context of CUDA, outside torch's count, took 0.60 to 0.75 GiB there.
"""

import pytest

from bp_data.loop.shapes import read_shapes
from bp_train_cuda.memory import estimate as memory_estimate
from bp_train_cuda.memory.estimate import Load, estimate
from bp_train_cuda.model import log_probs

GIB = 2**30
CONTEXT = (0.60, 0.75)
_NAMES = (
    "model_type", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "tie_word_embeddings",
)  # fmt: skip
SHAPES = {
    name: dict(zip(_NAMES, values, strict=True)) | {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    for name, values in {
        "Qwen2.5-7B": ("qwen2", 152064, 3584, 18944, 28, 28, 4, False),
        "Qwen2.5-1.5B": ("qwen2", 151936, 1536, 8960, 28, 12, 2, True),
        "Llama-3.2-3B": ("llama", 128256, 3072, 8192, 28, 24, 8, True),
        "SmolLM3-3B": ("smollm3", 128256, 2048, 11008, 36, 16, 4, True),
    }.items()
}
MEASURED = [  # model, what was trained, GiB allocated, GiB reserved
    ("Qwen2.5-7B", {}, 7.196, 7.588),
    ("Qwen2.5-7B", {"r": 256, "batch_size": 1}, 11.790, 12.426),
    ("Llama-3.2-3B", {"mode": "full", "batch_size": 1}, 12.864, 13.629),
    ("SmolLM3-3B", {"mode": "full", "batch_size": 1}, 12.189, 12.936),
    ("Qwen2.5-7B", {"batch_size": 1, "seq_length": 8192}, 8.796, 9.297),
    ("Qwen2.5-7B", {"r": 64, "accumulates": True}, 8.495, 9.078),
    ("Llama-3.2-3B", {"mode": "lora"}, 7.725, 8.191),
    ("SmolLM3-3B", {"batch_size": 4, "targets": "q_proj,v_proj"}, 4.019, 4.361),
    ("Qwen2.5-7B", {"batch_size": 8, "fused": False}, 13.258, 14.500),
    ("Qwen2.5-7B", {"batch_size": 8}, 12.081, 12.783),  # on an H200 with our own loop: docs/log/2026-11-30-loop-gpu.md
]


@pytest.mark.parametrize(("model", "load", "allocated", "reserved"), MEASURED)
def test_an_estimate_is_near_what_was_measured(model, load, allocated, reserved):
    found = estimate(read_shapes(SHAPES[model]), Load(**{"accumulates": False, "fused": True, **load}))
    assert found.in_use / GIB == pytest.approx(allocated, rel=0.031)
    needed = (found.in_use + found.beside) / GIB
    assert 0.93 * (reserved + CONTEXT[0]) < needed < 1.05 * (reserved + CONTEXT[1])


def test_the_estimate_knows_the_loss_heads_tiles():
    assert memory_estimate._TILE == log_probs.TILE  # not imported there, since it would take torch
