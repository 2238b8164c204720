"""LoRA on a loaded model, and the adapter folder that comes out of it."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any, Literal

import orjson
from peft import LoraConfig, get_peft_model

from bp_runs.adapter import CONFIG_FILE, TOKENIZER_FILES, WEIGHTS_FILE, write_manifest
from bp_runs.files import publish_folder
from bp_runs.spec import LoraSpec, TrainSpec
from bp_train_cuda.errors import TargetModulesError

ALL_LINEAR: Literal["all-linear"] = "all-linear"

_COPIED_FILES = (*TOKENIZER_FILES, "generation_config.json")


def add_lora(model: Any, spec: LoraSpec) -> Any:
    """Freeze ``model`` and put adapters on its linear layers: A (r, d_in) random, B (d_out, r) zero.

    The adapters are float32 whatever the base's dtype. The seed must be set before.

    Raises:
        TargetModulesError: No layer has any of the names.
    """
    targets = [name.strip() for name in spec.target_modules.split(",") if name.strip()]
    config = LoraConfig(
        r=spec.r,
        lora_alpha=spec.resolved_alpha,
        lora_dropout=spec.dropout,
        use_rslora=spec.use_rslora,
        use_dora=spec.use_dora,
        target_modules=ALL_LINEAR if targets == [ALL_LINEAR] else targets,
        task_type="CAUSAL_LM",
    )
    try:
        return get_peft_model(model, config)
    except ValueError as error:
        known = sorted({name.rsplit(".", 1)[-1] for name, m in model.named_modules() if type(m).__name__ == "Linear"})
        raise TargetModulesError(
            f"no layer is named {spec.target_modules!r}", cause=f"its linear layers: {', '.join(known)}"
        ) from error


def trainable_weights(model: Any) -> dict[str, Any]:
    """The parameters that training changes, by name; of a PEFT model: the adapter's."""
    return {name: weight for name, weight in model.named_parameters() if weight.requires_grad}


def save_adapter(model: Any, spec: TrainSpec, template: str | None) -> int:
    """Publish the adapter folder of the contract; returns the weights' size in bytes.

    Args:
        model: The trained PEFT model.
        spec: Names the base and the folder.
        template: Jinja source to save where the base brings no chat template; None: the base has its own.
    """
    folder = spec.folders.adapter
    with publish_folder(folder) as partial:
        model.save_pretrained(partial, save_embedding_layers=False)
        (partial / "README.md").unlink(missing_ok=True)  # PEFT's empty model card
        _name_base(partial / CONFIG_FILE, spec)
        for name in _COPIED_FILES:
            if (spec.base / name).is_file():
                shutil.copyfile(spec.base / name, partial / name)
        if template is not None:
            (partial / "chat_template.jinja").write_text(template, encoding="utf-8")
        write_manifest(partial, run_id=spec.folders.run_id, base=spec.model.name)
    return (folder / WEIGHTS_FILE).stat().st_size


def _name_base(file: Path, spec: TrainSpec) -> None:
    """Name the base as the user did (a folder: absolute), not by where a cache keeps it; same run, same bytes."""
    config = orjson.loads(file.read_bytes())
    if isinstance(config["target_modules"], list):
        config["target_modules"].sort()
    config["base_model_name_or_path"] = spec.model.name if spec.base_commit else str(spec.base.resolve())
    config["revision"] = spec.base_commit
    file.write_bytes(orjson.dumps(config, option=orjson.OPT_INDENT_2))
