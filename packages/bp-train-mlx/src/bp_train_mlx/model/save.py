"""What comes out of training: PEFT's adapter folder, or a Hugging Face model folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx
import orjson

from bp_data.loop.checkpoint_adapter import copy_tokenizer
from bp_data.templates.engine import ChatTemplate
from bp_data.templates.render_hashes import hash_conversations
from bp_runs.adapter import CONFIG_FILE, MODEL_SCHEMA, WEIGHTS_FILE, write_manifest
from bp_runs.files import publish_folder
from bp_runs.spec import TrainSpec
from bp_runs.witness import Witness, write_witness
from bp_train_mlx.model.lora import Adapter, file_name

_PEFT = {"format": "pt"}
"""What safetensors files say of themselves for transformers and PEFT."""


def peft_config(spec: TrainSpec, adapter: Adapter) -> dict[str, Any]:
    """``adapter_config.json`` as PEFT writes it for the same adapter."""
    lora = spec.lora
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": spec.model.name if spec.base_commit else str(spec.base.resolve()),
        "revision": spec.base_commit,
        "r": lora.r,
        "lora_alpha": lora.resolved_alpha,
        "lora_dropout": lora.dropout,
        "use_rslora": lora.use_rslora,
        "use_dora": lora.use_dora,
        "target_modules": list(adapter.targets.leaves),
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "modules_to_save": None,
        "rank_pattern": {},
        "alpha_pattern": {},
    }


def save_adapter(adapter: Adapter, spec: TrainSpec, template: ChatTemplate, *, witness: Witness | None = None) -> int:
    """Publish the adapter folder of the contract; returns the weights' size in bytes.

    Args:
        adapter: The trained one.
        spec: Names the base and the folder.
        template: The chat template that training used; the folder gets its text if the base has none.
        witness: What the model said in memory; stored next to the weights.
    """
    folder = spec.folders.adapter
    with publish_folder(folder) as partial:
        weights = {file_name(name): weight for name, weight in adapter.weights().items()}
        mx.save_safetensors(str(partial / WEIGHTS_FILE), weights, _PEFT)
        config = peft_config(spec, adapter)
        (partial / CONFIG_FILE).write_bytes(orjson.dumps(config, option=orjson.OPT_INDENT_2))
        copy_tokenizer(spec.base, partial, template)
        if witness is not None:
            write_witness(partial, witness, weights=partial / WEIGHTS_FILE)
        hashes = hash_conversations(template).to_dict()
        write_manifest(
            partial, run_id=spec.folders.run_id, base=spec.model.name, base_folder=spec.base, template=hashes
        )
    return (folder / WEIGHTS_FILE).stat().st_size


def save_model(
    weights: dict[str, Any], spec: TrainSpec, template: ChatTemplate, *, witness: Witness | None = None
) -> int:
    """Publish a model folder in Hugging Face's layout; returns the weights' size in bytes.

    Args:
        weights: All of them, by Hugging Face's names.
        spec: As for `save_adapter`.
        template: As for `save_adapter`.
        witness: As for `save_adapter`.
    """
    folder = spec.folders.model
    with publish_folder(folder) as partial:
        mx.save_safetensors(str(partial / "model.safetensors"), weights, _PEFT)
        dtype = str(next(iter(weights.values())).dtype).removeprefix("mlx.core.")
        _write_config(spec.base, partial, dtype)
        copy_tokenizer(spec.base, partial, template)
        if witness is not None:
            write_witness(partial, witness)
        write_manifest(
            partial,
            run_id=spec.folders.run_id,
            base=spec.model.name,
            base_folder=spec.base,
            schema=MODEL_SCHEMA,
            template=hash_conversations(template).to_dict(),
        )
    return (folder / "model.safetensors").stat().st_size


def _write_config(base: Path, folder: Path, dtype: str) -> None:
    config = orjson.loads((base / "config.json").read_bytes())
    config.pop("torch_dtype", None)  # the older name
    config["dtype"] = dtype
    (folder / "config.json").write_bytes(orjson.dumps(config, option=orjson.OPT_INDENT_2))
