"""Small PEFT adapter folders from arrays, without torch."""

import json

import numpy as np

from bp_merge import write_tensors

SHAPES = {"model.layers.0.self_attn.q_proj": (24, 16), "model.layers.0.mlp.down_proj": (16, 40)}


def draw_factors(seed, *, r=4, shapes=SHAPES):
    rng = np.random.default_rng(seed)
    return {
        module: (
            rng.standard_normal((r, d_in)).astype(np.float32),
            rng.standard_normal((d_out, r)).astype(np.float32),
        )
        for module, (d_out, d_in) in shapes.items()
    }


def write_adapter(folder, factors, *, dtype="F32", base="base", extra=None, **config):
    """An adapter folder of modules with A (r, d_in) and B (d_out, r)."""
    folder.mkdir(parents=True)
    tensors = {}
    for module, (a, b) in factors.items():
        tensors[f"base_model.model.{module}.lora_A.weight"] = a
        tensors[f"base_model.model.{module}.lora_B.weight"] = b
    write_tensors(folder / "adapter_model.safetensors", {**tensors, **(extra or {})}, dtype=dtype)
    r = next(iter(factors.values()))[0].shape[0]
    settings = {"peft_type": "LORA", "base_model_name_or_path": base, "r": r, "lora_alpha": 2 * r, **config}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    return folder


def write_drawn(folder, seed, *, r=4, shapes=SHAPES, **config):
    return write_adapter(folder, draw_factors(seed, r=r, shapes=shapes), **config)
