"""LoRA on a loaded model, and the adapter folder that comes out of it."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import orjson
import torch
from peft import LoraConfig, PeftModel, get_peft_model, replace_lora_weights_loftq, set_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from bp_data.loop.checkpoint_adapter import copy_tokenizer
from bp_data.templates.engine import ChatTemplate
from bp_data.templates.render_hashes import hash_conversations
from bp_runs.adapter import (
    CONFIG_FILE,
    WEIGHTS_FILE,
    read_adapter_folder,
    write_manifest,
)
from bp_runs.errors import AdapterInvalidError, TargetModulesError, first_line
from bp_runs.files import publish_folder
from bp_runs.spec import LoraSpec, TrainSpec
from bp_runs.witness import Witness, write_witness
from bp_train_cuda.model.experts import ALL_LINEAR, choose_targets

_PISSA = "pissa_niter_16"  # the paper's fast decomposition, near the exact one
_START = "start"
"""Folder of the run for the adapter as it started, where it is taken off the result at the end."""


def add_lora(model: Any, spec: LoraSpec, base: Path | None = None) -> Any:
    """Freeze ``model`` and put adapters on its linear layers: A (r, d_in) random, B (d_out, r) zero.

    Experts and routers of a mixture of experts get one if they are named (`model.experts`).

    The adapters are float32 whatever the base's dtype. The seed must be set before. With ``pissa`` B A is made of the
    base's main directions, which are taken off the base in memory; with ``loftq`` of what its 4 bits have lost.

    Args:
        base: The folder that ``model`` was loaded from; for loftq, which reads the 16-bit weights.

    Raises:
        TargetModulesError: No layer has any of the names, or one of them means fused experts.
    """
    chosen = choose_targets(model, spec.target_modules)
    targets = chosen.modules
    config = LoraConfig(
        r=spec.r,
        lora_alpha=spec.resolved_alpha,
        lora_dropout=spec.dropout,
        use_rslora=spec.use_rslora,
        use_dora=spec.use_dora,
        init_lora_weights=_PISSA if spec.init_lora_weights == "pissa" else True,
        target_modules=targets if targets == ALL_LINEAR else list(targets),
        target_parameters=list(chosen.parameters) or None,
        exclude_modules=match_other_towers(model),
        task_type="CAUSAL_LM",
    )
    try:
        adapted = get_peft_model(model, config)
        if spec.init_lora_weights == "loftq":
            replace_lora_weights_loftq(adapted, model_path=str(base))
        return adapted
    except ValueError as error:
        known = sorted({name.rsplit(".", 1)[-1] for name, m in model.named_modules() if type(m).__name__ == "Linear"})
        raise TargetModulesError(
            f"no layer is named {spec.target_modules!r}", cause=f"its linear layers: {', '.join(known)}"
        ) from error


def match_other_towers(model: Any) -> str | None:
    """What matches the modules outside a language model, such as a vision tower; None for a language model alone.

    Text never reaches them, so an adapter there would learn nothing, and its file would not fit a model of text.
    """
    if model.config.get_text_config(decoder=True) is model.config:
        return None
    decoder = model.get_decoder()
    inside = next((name for name, module in model.named_modules() if module is decoder), "")
    return rf"(?!{re.escape(inside)}\.|lm_head$).*" if inside else None


def load_lora(model: Any, adapter: Path) -> Any:
    """Freeze ``model`` and put a saved adapter on it.

    Raises:
        AdapterInvalidError: The folder is no adapter, or not one for this base.
    """
    read_adapter_folder(adapter)
    try:
        return PeftModel.from_pretrained(model, adapter, is_trainable=True)
    except (ValueError, RuntimeError, KeyError, TypeError) as error:
        raise AdapterInvalidError(f"{adapter} does not fit the base model", cause=first_line(error)) from error


def set_weights(model: Any, adapter: Path, spec: LoraSpec) -> None:
    """Let a model's new adapter begin with the weights of a saved one of the same rank, scale and layers.

    Raises:
        AdapterInvalidError: It has other ones, both sides' values named.
    """
    folder = read_adapter_folder(adapter)
    mine = (spec.r, spec.resolved_alpha, spec.use_rslora, spec.use_dora)
    is_rs, is_dora = (bool(folder.config.get(name)) for name in ("use_rslora", "use_dora"))
    theirs = (folder.r, folder.alpha, is_rs, is_dora)
    if mine != theirs:
        words = "(r, alpha, use_rslora, use_dora)"
        raise AdapterInvalidError(f"the run trains an adapter of {mine} and {adapter} is one of {theirs}, as {words}")
    try:
        weights = load_file(folder.weights)
        found = set_peft_model_state_dict(model, weights)
    except (RuntimeError, KeyError, SafetensorError) as error:
        raise AdapterInvalidError(f"{adapter} does not fit the base model", cause=first_line(error)) from error
    missing = [key for key in found.missing_keys if ".lora_" in key]
    if missing or found.unexpected_keys:
        other = (missing or found.unexpected_keys)[0]
        lacking = adapter if missing else "the run's adapter"
        raise AdapterInvalidError(f"{adapter} and the run adapt other layers: {lacking} lacks {other}")


def remove_adapter(model: Any) -> None:
    """Give a PEFT model's base its own layers back, in place; the model is of no use afterwards."""
    base = model.unload()
    # PEFT removes it itself since 0.20; else it takes the next adapter for a second one.
    if "peft_config" in vars(base):
        del base.peft_config


def note_start(model: Any, spec: TrainSpec) -> None:
    """Keep the adapter as it starts in the run's folder, where it does not start as no change."""
    if spec.lora.init_lora_weights != "default":
        model.peft_config["default"].init_lora_weights = True  # as the finished adapter is to be read
        model.save_pretrained(spec.folders.run / _START, save_embedding_layers=False)


def trainable_weights(model: Any) -> dict[str, Any]:
    """The parameters that training changes, by name; of a PEFT model: the adapter's."""
    return {name: weight for name, weight in model.named_parameters() if weight.requires_grad}


def save_adapter(model: Any, spec: TrainSpec, template: ChatTemplate, *, witness: Witness | None = None) -> int:
    """Publish the adapter folder of the contract; returns the weights' size in bytes.

    Args:
        model: The trained PEFT model.
        spec: Names the base and the folder.
        template: The chat template that training used. The folder gets hashes of ten conversations that it rendered,
            and its text if the base has none.
        witness: What the model said in memory; stored next to the weights.
    """
    folder, start = spec.folders.adapter, spec.folders.run / _START
    with publish_folder(folder) as partial:
        model.save_pretrained(partial, save_embedding_layers=False)
        if start.is_dir():
            _take_off_start(partial, start)
        (partial / "README.md").unlink(missing_ok=True)  # PEFT's empty model card
        _name_base(partial / CONFIG_FILE, spec)
        copy_tokenizer(spec.base, partial, template)
        if witness is not None:
            write_witness(partial, witness, weights=partial / WEIGHTS_FILE)
        hashes = hash_conversations(template).to_dict()
        write_manifest(
            partial, run_id=spec.folders.run_id, base=spec.model.name, base_folder=spec.base, template=hashes
        )
    shutil.rmtree(start, ignore_errors=True)  # only now: a save that ran out of memory is tried again
    return (folder / WEIGHTS_FILE).stat().st_size


def _take_off_start(adapter: Path, start: Path) -> None:
    """Make an adapter for the base as it was: s (B A - B0 A0) = s [B, -B0] [A; A0], of twice the rank.

    Args:
        adapter: The finished adapter's folder; its files are replaced.
        start: The folder of the adapter as it started, B0 A0.
    """
    save_file(_join_start(adapter / WEIGHTS_FILE, start / WEIGHTS_FILE), adapter / WEIGHTS_FILE)
    config = orjson.loads((adapter / CONFIG_FILE).read_bytes())
    config["r"] *= 2
    config["lora_alpha"] *= 2**0.5 if config["use_rslora"] else 2  # keeps alpha / r, or alpha / sqrt(r)
    config["init_lora_weights"] = True
    (adapter / CONFIG_FILE).write_bytes(orjson.dumps(config, option=orjson.OPT_INDENT_2))


def _join_start(weights_file: Path, start_file: Path) -> dict[str, torch.Tensor]:
    """A and B joined with the start's. Nothing of the files stays mapped: Windows would not let them be replaced."""
    weights, first = load_file(weights_file), load_file(start_file)
    return {
        name: torch.cat([weight, first[name]]) if "lora_A" in name else torch.cat([weight, -first[name]], dim=1)
        for name, weight in weights.items()
    }


def _name_base(file: Path, spec: TrainSpec) -> None:
    """Name the base as the user did (a folder: absolute), not by where a cache keeps it; same run, same bytes."""
    config = orjson.loads(file.read_bytes())
    if isinstance(config["target_modules"], list):
        config["target_modules"].sort()
    config["base_model_name_or_path"] = spec.model.name if spec.base_commit else str(spec.base.resolve())
    config["revision"] = spec.base_commit
    file.write_bytes(orjson.dumps(config, option=orjson.OPT_INDENT_2))
