"""Models of published shapes with random weights, and chats of a given length: nothing is downloaded."""

from __future__ import annotations

import gc
import json
import random
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

WORDS = "river stone lamp harbour bread window cloud paper ladder garden winter copper"
_ENDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}


def _shape(
    kind: str, vocabulary: int, hidden: int, inner: int, layers: int, heads: int, keys: int, *, tied: bool, **more: Any
) -> dict[str, Any]:
    return {
        "model_type": kind, "vocab_size": vocabulary, "hidden_size": hidden, "intermediate_size": inner,
        "num_hidden_layers": layers, "num_attention_heads": heads, "num_key_value_heads": keys,
        "tie_word_embeddings": tied, "max_position_embeddings": 131072, **_ENDS, **more,
    }  # fmt: skip


# From the models' own config.json.
SHAPES: dict[str, dict[str, Any]] = {
    "pico": _shape("qwen2", 512, 64, 128, 2, 4, 2, tied=True),
    "smollm2-135m": _shape("llama", 49152, 576, 1536, 30, 9, 3, tied=True),
    "qwen2.5-0.5b": _shape("qwen2", 151936, 896, 4864, 24, 14, 2, tied=True),
    "llama-3.2-1b": _shape("llama", 128256, 2048, 8192, 16, 32, 8, tied=True, head_dim=64),
    "qwen2.5-1.5b": _shape("qwen2", 151936, 1536, 8960, 28, 12, 2, tied=True),
    "qwen2.5-3b": _shape("qwen2", 151936, 2048, 11008, 36, 16, 2, tied=True),
    "smollm3-3b": _shape("smollm3", 128256, 2048, 11008, 36, 16, 4, tied=True),
    "llama-3.2-3b": _shape("llama", 128256, 3072, 8192, 28, 24, 8, tied=True, head_dim=128),
    "phi-4-mini": _shape("phi3", 200064, 3072, 8192, 32, 24, 8, tied=True),
    "mistral-7b": _shape("mistral", 32768, 4096, 14336, 32, 32, 8, tied=False, head_dim=128, sliding_window=None),
    "pico-moe": _shape(
        "qwen3_moe", 512, 64, 128, 2, 4, 2, tied=False, head_dim=16, num_experts=4, num_experts_per_tok=2,
        moe_intermediate_size=32, norm_topk_prob=True,
    ),
    "pico-gpt-oss": _shape(
        "gpt_oss", 512, 64, 64, 2, 4, 2, tied=False, head_dim=16, num_local_experts=4, num_experts_per_tok=2,
        sliding_window=32,
    ),
    "qwen3-30b-a3b": _shape(
        "qwen3_moe", 151936, 2048, 6144, 48, 32, 4, tied=False, head_dim=128, num_experts=128, num_experts_per_tok=8,
        moe_intermediate_size=768, norm_topk_prob=True,
    ),
    "gpt-oss-20b": _shape(
        "gpt_oss", 201088, 2880, 2880, 24, 64, 8, tied=False, head_dim=64, num_local_experts=32, num_experts_per_tok=4,
        sliding_window=128,
    ),
    "qwen2.5-7b": _shape("qwen2", 152064, 3584, 18944, 28, 28, 4, tied=False),
}  # fmt: skip


def write_model(folder: Path, shape: str, **changes: Any) -> Path:
    """A model of the given shape: random bfloat16 weights, a small byte-level tokenizer with ChatML's special tokens.

    Args:
        folder: Where it goes.
        shape: A name of `SHAPES`.
        changes: Sizes that differ from the shape's, such as ``num_hidden_layers``.
    """
    folder.mkdir(parents=True, exist_ok=True)
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator([WORDS] * 4, trainer)
    core.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}))
    torch.manual_seed(0)
    kind, sizes = (
        SHAPES[shape]["model_type"],
        {k: v for k, v in {**SHAPES[shape], **changes}.items() if k != "model_type"},
    )
    config = transformers.AutoConfig.for_model(kind, **sizes)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder)
    del model
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return folder


def write_rows(file: Path, base: Path, rows: int, tokens: int) -> Path:
    """Chats of just under ``tokens`` tokens each; nearly all of them are the assistant's."""
    chance = random.Random(0)
    core = Tokenizer.from_file(str(base / "tokenizer.json"))
    cost = {word: len(core.encode(" " + word).ids) for word in WORDS.split()}
    with file.open("w") as out:
        for _ in range(rows):
            answer, left = [], tokens - 40
            while left > max(cost.values()):
                answer.append(chance.choice(list(cost)))
                left -= cost[answer[-1]]
            turns = [{"role": "user", "content": "Go on."}, {"role": "assistant", "content": " ".join(answer)}]
            out.write(json.dumps({"messages": turns}) + "\n")
    return file
