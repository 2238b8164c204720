"""What is exported: a base model's folder, perhaps an adapter on it, and whose tokenizer goes along."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bp_data.templates.conversations import ConversationHashes
from bp_export.errors import BaseModelNotFoundError, ModelInvalidError
from bp_export.local_paths import tell_model
from bp_export.verify.template import RenderingCheck, check_folder, read_trained_hashes
from bp_merge import AdapterMismatchError, FoldedModel, LoraAdapter, load_adapter, open_model
from bp_runs.adapter import CONFIG_FILE, MANIFEST_FILE, is_other_base
from bp_runs.wording import setting_ref

TOKENIZER_FILE = "tokenizer.json"


@dataclass(frozen=True, slots=True)
class Source:
    """A model to export."""

    base: Path
    adapter: LoraAdapter | None
    tokenizer: Path
    """The folder whose tokenizer and chat template go along."""
    name: str
    hashes: ConversationHashes | None
    """How training rendered ten conversations; None for adapters and models from elsewhere."""
    dequantize: bool = False

    @property
    def folders(self) -> list[Path]:
        """What is read, and must not be replaced by what is written."""
        return [self.base, self.tokenizer, *([self.adapter.folder.path] if self.adapter else [])]

    def check_rendering(self) -> RenderingCheck:
        """Compare the template that is going to be exported with training.

        Raises:
            TemplateChangedError: A conversation renders differently.
        """
        return check_folder(self.tokenizer, self.hashes)

    def open(self) -> FoldedModel:
        """The weights with the adapter; close it.

        Raises:
            CodedError: As `bp_merge.open_model` and `bp_merge.FoldedModel`.
        """
        return FoldedModel(open_model(self.base, dequantize=self.dequantize), self.adapter)


def read_source(folder: Path, base: Path | None, name: str | None, *, dequantize: bool) -> Source:
    """Find the base of an adapter folder; a folder without an adapter is its own base.

    Raises:
        BaseModelNotFoundError: The base is not on this machine.
        ModelInvalidError: Its config.json is damaged, or its weights are packed.
        AdapterMismatchError: It is another base than the adapter was trained on.
        AdapterInvalidError, AdapterUnfoldableError: As `bp_merge.load_adapter`.
    """
    if is_model(folder):
        _require_unpacked(read_config(folder), folder, dequantize=dequantize)
        own = name or folder.resolve().name
        return Source(folder, None, folder, own, read_trained_hashes(folder), dequantize)
    adapter = load_adapter(folder)
    where = base or Path(adapter.folder.base)
    if not where.is_dir():
        raise BaseModelNotFoundError(
            f"the base model {where} is not a folder on this machine", details={"base": adapter.folder.base}
        )
    _require_unpacked(read_config(where), where, dequantize=dequantize)
    if is_other_base(folder, where):
        raise AdapterMismatchError(
            f"{where} is not the base that the adapter was trained on: its norms are others",
            cause=f"the adapter names {adapter.folder.base} as its base",
            fix="Name that one: {set:base=FOLDER}. "
            f"If you are sure of this one, take base_fingerprint out of {folder / MANIFEST_FILE}.",
        )
    tokenizer = folder if (folder / TOKENIZER_FILE).is_file() else where
    own = name or name_after(adapter.folder.base)
    return Source(where, adapter, tokenizer, own, read_trained_hashes(folder), dequantize)


def is_model(folder: Path) -> bool:
    """Whether a folder holds a model and no adapter."""
    return not (folder / CONFIG_FILE).is_file() and (folder / "config.json").is_file()


def read_config(folder: Path) -> dict[str, Any]:
    """A model folder's ``config.json``.

    Raises:
        BaseModelNotFoundError: There is no such folder, or no config.json in it.
        ModelInvalidError: It is damaged.
    """
    file = folder / "config.json"
    if not file.is_file():
        raise BaseModelNotFoundError(f"{folder} is not a model folder on this machine: it has no config.json")
    try:
        config = json.loads(file.read_bytes())
    except (OSError, ValueError) as error:
        raise ModelInvalidError(f"{file} cannot be read", cause=str(error)) from error
    if not isinstance(config, dict):
        raise ModelInvalidError(f"{file} is not a JSON object")
    return config


def name_after(base: str) -> str:
    """The last part of a Hub id or path, and that it was tuned; a folder of the Hub's cache counts as its id."""
    return f"{tell_model(base).rpartition('/')[2] or 'model'}-tuned"


def _require_unpacked(config: Mapping[str, Any], folder: Path, *, dequantize: bool) -> None:
    """A base in 4 bits was made from one in 16, and the adapter's changes belong on that."""
    packed = config.get("quantization_config")
    if not packed:
        return
    told = packed if isinstance(packed, dict) else {}
    kind = str(told.get("quant_method", "some"))
    original = re.sub(r"(-unsloth)?-bnb-4bit$", "", str(config.get("_name_or_path") or folder.name))
    is_known = kind == "bitsandbytes" and bool(told.get("load_in_4bit"))
    if not (dequantize and is_known):
        raise ModelInvalidError(
            f"{folder} holds weights packed by {kind} quantization; the export needs them in 16 or 32 bits",
            fix=f"Name the model that it was made from: {setting_ref('base', original)}"
            + ("; or use what 4 bits left of it: {set:dequantize=true}" if is_known else ""),
        )
