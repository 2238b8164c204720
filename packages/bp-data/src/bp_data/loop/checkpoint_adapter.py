"""A checkpoint as an adapter folder: every checkpoint of a LoRA run can be exported, evaluated and trained on from.

No framework is imported: the weights are copied byte for byte under the names that PEFT reads.

    checkpoint  base_model.model.model.layers.0.self_attn.q_proj.lora_A.default.weight
    adapter     base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import orjson

from bp_data.templates.engine import ChatTemplate
from bp_data.templates.render_hashes import ConversationHashes, read_template_record
from bp_runs.adapter import (
    CONFIG_FILE,
    TEMPLATE_FILE,
    WEIGHTS_FILE,
    copy_tokenizer_files,
    find_tokenizer_files,
    write_manifest,
)
from bp_runs.checkpoint_store import Checkpoint
from bp_runs.errors import CheckpointInvalidError
from bp_runs.files import coded_disk_errors, publish_folder
from bp_runs.paths import ADAPTER_NAME
from bp_runs.record import RunRecord

_GENERATION_FILE = "generation_config.json"
_WEIGHTS, _BEST = "weights.safetensors", "best.safetensors"
_ADAPTER = ".default"
"""PEFT's name of the adapter inside parameter names; files leave it out."""
_MAGNITUDE = ".lora_magnitude_vector.weight"


def write_adapter(checkpoint: Checkpoint, record: RunRecord, folder: Path, *, best: bool = False) -> None:
    """Publish the adapter folder of a checkpoint.

    Args:
        checkpoint: A whole one, of a run that trains an adapter.
        record: Its run's.
        folder: Where the adapter goes; replaced if it exists.
        best: The weights with the lowest validation loss up to the checkpoint, instead of those after its step.

    Raises:
        CheckpointInvalidError: It holds no adapter (full fine-tuning), only a part of one (sharded weights), no best
            weights, or one whose start has to be subtracted (pissa, loftq).
        DiskFullError, OutputNotWritableError: Nothing is left of the attempt.
    """
    source = checkpoint.path / (_BEST if best else _WEIGHTS)
    _require_adapter(checkpoint, record, source)
    with publish_folder(folder) as partial:
        with coded_disk_errors(partial):
            _copy_weights(source, partial / WEIGHTS_FILE)
            config = _read_config(checkpoint, record)
            (partial / CONFIG_FILE).write_bytes(orjson.dumps(config, option=orjson.OPT_INDENT_2))
            hashes = _copy_tokenizer(checkpoint.path.parents[1], record, partial)
        base = record.base.get("folder")
        write_manifest(
            partial,
            run_id=record.run_id,
            base=str(record.setting("model.name")),
            base_folder=Path(base) if base and Path(base).is_dir() else None,
            origin={"checkpoint": checkpoint.path.name, "step": checkpoint.step, "best": best},
            template=None if hashes is None else hashes.to_dict(),
        )


def _require_adapter(checkpoint: Checkpoint, record: RunRecord, source: Path) -> None:
    where = f"the checkpoint of step {checkpoint.step} of run {record.run_id}"
    if record.setting("training.mode") == "full":
        raise CheckpointInvalidError(f"{where} holds a whole model, not an adapter")
    if record.setting("lora.init_lora_weights") not in (None, "default"):
        way = record.setting("lora.init_lora_weights")
        raise CheckpointInvalidError(f"{where} starts from {way}, and only the finished adapter fits the base")
    if (checkpoint.path / "rank-1" / _WEIGHTS).exists():
        raise CheckpointInvalidError(f"{where} holds sharded weights; only the finished adapter is whole")
    if not source.is_file():
        raise CheckpointInvalidError(f"{where} has no {source.name}")


def _copy_weights(source: Path, target: Path) -> None:
    """Copy a safetensors file under PEFT's names: u64 length of the header, JSON header, data."""
    with source.open("rb") as file, target.open("wb") as out:
        length = int.from_bytes(file.read(8), "little")
        header = {_rename(name): entry for name, entry in orjson.loads(file.read(length)).items()}
        text = orjson.dumps(header)
        text += b" " * (-len(text) % 8)  # the data is aligned to eight bytes
        out.write(len(text).to_bytes(8, "little") + text)
        shutil.copyfileobj(file, out)


def _rename(name: str) -> str:
    name = name.replace(_ADAPTER, "", 1)
    return name.removesuffix(".weight") if name.endswith(_MAGNITUDE) else name


def _read_config(checkpoint: Checkpoint, record: RunRecord) -> dict[str, Any]:
    """PEFT's settings: the checkpoint's own copy, else the finished adapter's; the base as the user named it."""
    places = (checkpoint.path, checkpoint.path.parents[1] / ADAPTER_NAME)
    file = next((place / CONFIG_FILE for place in places if (place / CONFIG_FILE).is_file()), None)
    if file is None:
        raise CheckpointInvalidError(f"{checkpoint.path} and the run's folder have no {CONFIG_FILE}")
    config: dict[str, Any] = orjson.loads(file.read_bytes())
    if isinstance(config.get("target_modules"), list):
        config["target_modules"].sort()
    commit, base = _commit(record.model), record.base.get("folder")
    name = record.setting("model.name")
    config["base_model_name_or_path"] = name if commit or not base else base
    config["revision"] = commit
    config["inference_mode"] = True
    return config


def _commit(model: Mapping[str, Any]) -> str | None:
    found = model.get("revision")
    return found if isinstance(found, str) else None


def _copy_tokenizer(run: Path, record: RunRecord, folder: Path) -> ConversationHashes | None:
    """As the finished adapter has it, else as the base does; returns how training rendered chats, if that is known."""
    finished, base = run / ADAPTER_NAME, record.base.get("folder")
    place = finished if finished.is_dir() else Path(base) if base else finished
    copy_tokenizer_files(place, folder)
    if (place / _GENERATION_FILE).is_file():
        shutil.copyfile(place / _GENERATION_FILE, folder / _GENERATION_FILE)
    default, hashes = read_template_record(run)
    if default is not None:
        (folder / TEMPLATE_FILE).write_text(default, encoding="utf-8")
    return hashes


def copy_tokenizer(base: Path, folder: Path, template: ChatTemplate) -> None:
    """Put the base's tokenizer and generation settings next to trained weights, and ``template`` if it has none."""
    copy_tokenizer_files(base, folder)
    if (base / _GENERATION_FILE).is_file():
        shutil.copyfile(base / _GENERATION_FILE, folder / _GENERATION_FILE)
    if template.source == "default":
        (folder / TEMPLATE_FILE).write_text(template.text, encoding="utf-8")


def copied_bytes(base: Path) -> int:
    """Size of what `copy_tokenizer` copies."""
    files = [base / name for name in (*find_tokenizer_files(base), _GENERATION_FILE)]
    return sum(file.stat().st_size for file in files if file.is_file())
