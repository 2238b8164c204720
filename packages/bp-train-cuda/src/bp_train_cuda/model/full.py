"""Training all weights of a model, and the model folder that comes out of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import orjson
import torch

from bp_data.loop.checkpoint_adapter import copy_tokenizer
from bp_data.templates.engine import ChatTemplate
from bp_data.templates.render_hashes import hash_conversations
from bp_runs.adapter import MODEL_SCHEMA, write_manifest
from bp_runs.files import publish_folder
from bp_runs.spec import TrainSpec
from bp_runs.witness import Witness, write_witness

CONFIG_FILE = "config.json"


def open_weights(model: Any) -> Any:
    """Let training change every weight; tied ones stay one weight."""
    model.requires_grad_(requires_grad=True)
    return model


def save_model(
    model: Any,
    spec: TrainSpec,
    template: ChatTemplate,
    weights: dict[str, torch.Tensor] | None = None,
    *,
    witness: Witness | None = None,
) -> int:
    """Publish the model's folder: Hugging Face's layout, and ``run.json``; returns the weights' size in bytes.

    The config is the base's own but for the weights' type, since training sets fields of its copy.

    Args:
        model: The trained model.
        spec: Names the base and the folder.
        template: As for `bp_train_cuda.model.lora.save_adapter`.
        weights: The weights to save, by name, where the model holds only a share of them; None: the model's.
        witness: As for `bp_train_cuda.model.lora.save_adapter`.
    """
    dtype = model.dtype if weights is None else next(iter(weights.values())).dtype
    with publish_folder(spec.folders.model) as partial:
        model.save_pretrained(partial, state_dict=weights)
        _write_config(spec.base, partial, str(dtype).removeprefix("torch."))
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
    return sum(file.stat().st_size for file in spec.folders.model.glob("*.safetensors"))


def _write_config(base: Path, folder: Path, dtype: str) -> None:
    config = orjson.loads((base / CONFIG_FILE).read_bytes())
    config.pop("torch_dtype", None)  # the older name
    config["dtype"] = dtype
    (folder / CONFIG_FILE).write_bytes(orjson.dumps(config, option=orjson.OPT_INDENT_2))
