"""Certify transformers' decoder classes, and store what came of them: `just certify`, or some: `just certify llama opt`.

Writes `backpropagate/certificates.json` after each class. Each class is built of its config's defaults, small, with a
tokenizer of a few hundred tokens; nothing is downloaded but llama.cpp's converter, once.
"""

import json
import sys
import tempfile
import time
from importlib.resources import files
from pathlib import Path

from decoder_classes import EVERY, OVERRIDES
from huggingface_hub.errors import StrictDataclassError
from pico import write_pico_tokenizer
from transformers import AutoConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from backpropagate.certificate import STAGES, Certificate
from backpropagate.certify import certify

REAL = {
    **OVERRIDES,
    "qwen3_moe": {"norm_topk_prob": True},
    "mistral": {},
    "qwen2": {},
    "cohere2": {"rotary_pct": 1.0},
    "gpt_neox": {"rotary_pct": 0.25},
    "gpt2": {"n_ctx": 1024},
}
"""Values as the published models have them, where the class's defaults differ."""
FIRST = (
    "llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "phi3", "smollm3", "granite", "olmo2", "qwen3_moe",
    "gpt_oss", "olmo3", "cohere", "cohere2", "starcoder2", "stablelm", "arcee", "ernie4_5", "seed_oss", "exaone4",
    "glm4", "glm", "lfm2", "nemotron", "hunyuan_v1_dense", "falcon_h1", "granitemoe", "deepseek_v2", "deepseek_v3",
    "ministral", "qwen3_5_text", "qwen3_next", "apertus", "phi", "gpt2", "gpt_neox", "bloom", "mpt", "opt", "falcon",
    "olmo", "olmoe", "mixtral", "qwen2_moe", "internlm3", "helium", "gptj", "codegen", "xglm", "mamba", "mamba2",
    "gemma", "gemma3n_text", "gemma4_text", "llama4_text", "granitemoehybrid", "bamba", "jamba", "phimoe", "dots1",
    "ernie4_5_moe", "glm4_moe", "hunyuan_v1_moe", "minimax", "biogpt", "bitnet", "diffllama", "jetmoe", "persimmon",
)  # fmt: skip
"""In the order in which people use them; the others follow."""


def try_class(name: str) -> Certificate | None:
    """None for a class whose default config can't be made."""
    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder)
        size = write_pico_tokenizer(base)
        try:
            config = AutoConfig.for_model(name, **REAL.get(name, {}))
        except (ValueError, TypeError, StrictDataclassError):
            return None
        stored = config.to_dict()
        stored |= {"architectures": [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[name]], "vocab_size": size}
        stored |= {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}
        (base / "config.json").write_text(json.dumps(stored, default=str))
        return certify(base)


def main() -> None:
    path = files("backpropagate").joinpath("certificates.json")
    rows = {row["architecture"]: row for row in json.loads(path.read_text(encoding="utf-8"))}
    known = [name for name in FIRST if name in EVERY]
    for name in sys.argv[1:] or [*known, *(name for name in EVERY if name not in known)]:
        begun = time.monotonic()
        found = try_class(name)
        if found is None:
            print(name, "has no default config", flush=True)
            continue
        rows[found.architecture] = found.to_dict()
        lines = [json.dumps(rows[key]) for key in sorted(rows)]
        path.write_text("[\n" + ",\n".join(lines) + "\n]\n", encoding="utf-8")
        states = [f"{stage} {found.find(stage).state} {found.find(stage).note}"[:90] for stage in STAGES]
        print(f"{name} ({time.monotonic() - begun:.0f} s): {'; '.join(states)}", flush=True)


if __name__ == "__main__":
    main()
