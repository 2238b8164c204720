"""What is exported: a base model's folder, perhaps an adapter on it, and whose tokenizer goes along."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bp_data.templates.render_hashes import ConversationHashes
from bp_export.errors import AdapterFormatError, BaseModelNotFoundError, ModelInvalidError
from bp_export.hub.cache import find_cached_model
from bp_export.local_paths import has_hub_form, tell_model
from bp_export.model_config import complete_config
from bp_export.verify.template import RenderingCheck, check_folder, read_trained_hashes
from bp_merge import AdapterMismatchError, FoldedModel, LoraAdapter, TensorReader, load_adapter, open_model
from bp_runs.adapter import CONFIG_FILE, MANIFEST_FILE, WEIGHTS_FILE, is_other_base
from bp_runs.errors import AdapterInvalidError, InvalidSettingError
from bp_runs.witness import read_witness
from bp_runs.wording import command_ref, setting_ref

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
        require_safetensors(self.base)
        return FoldedModel(self.open_base(), self.adapter)

    def open_base(self) -> TensorReader:
        """The base's tensors; with ``dequantize`` as the run that made the adapter held them, if its witness says how.

        Raises:
            InvalidSettingError: ``dequantize``, and the adapter was trained on unpacked weights.
            CodedError: As `bp_merge.open_model`.
        """
        witness = read_witness(self.adapter.folder.path) if self.dequantize and self.adapter else None
        if witness is None:
            return open_model(self.base, dequantize=self.dequantize)
        if not witness.base.packed:
            raise InvalidSettingError(
                f"the adapter was trained on {witness.base.dtype} weights, not on weights in 4 bits",
                fix="Leave it out: {set:dequantize}",
                setting="dequantize",
            )
        facts = witness.base
        return open_model(self.base, dequantize=True, packed=facts.packed, double_quantized=facts.double_quantized)


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
    explain_folder(folder)
    adapter = load_adapter(folder)
    where = find_base(base or Path(adapter.folder.base), adapter)
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
    """A model folder's ``config.json``, with what its class assumes where the file is silent.

    Raises:
        BaseModelNotFoundError, ModelInvalidError: As `read_config_file`.
    """
    return complete_config(read_config_file(folder))


def read_config_file(folder: Path) -> dict[str, Any]:
    """A model folder's ``config.json`` as it stands.

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


def find_base(named: Path, adapter: LoraAdapter) -> Path:
    """The base's folder: as named, or for a Hub id what the Hub's cache has of it.

    Raises:
        BaseModelNotFoundError: It is in neither place.
    """
    if named.is_dir():
        return named
    name = named.as_posix()
    details = {"base": adapter.folder.base}
    if not has_hub_form(name):
        raise BaseModelNotFoundError(f"the base model {named} is not a folder on this machine", details=details)
    is_own = name == Path(adapter.folder.base).as_posix()
    revision = adapter.folder.config.get("revision") if is_own else None
    found = find_cached_model(name, revision if isinstance(revision, str) else None)
    if found is None:
        original = _PACKED_NAME.sub("", name)
        raise BaseModelNotFoundError(
            f"the base model {name} is neither a folder nor in the Hub's cache on this machine",
            fix=f"Download it in 16 bits (hf download {original}), and name it: {setting_ref('base', original)}",
            details=details,
        )
    return found


_TO_SAFETENSORS = (
    'Convert it: python -c "import torch; from safetensors.torch import save_file; '
    "save_file(torch.load('{old}', map_location='cpu', weights_only=True), '{new}')\""
)


def explain_folder(folder: Path) -> None:
    """Say what is there instead of an adapter or a model, if it is something known.

    Raises:
        AdapterFormatError: An adapter in another program's files, or a folder of checkpoints.
        BaseModelNotFoundError: There is no such folder.
    """
    if not folder.exists():
        raise AdapterInvalidError(f"there is no folder {folder}")
    config, weights = folder / CONFIG_FILE, folder / WEIGHTS_FILE
    old = folder / "adapter_model.bin"
    if config.is_file() and old.is_file() and not weights.is_file():
        raise AdapterFormatError(
            f"{old} is an adapter in torch's own format; safetensors is needed",
            fix=_TO_SAFETENSORS.format(old=old, new=weights),
        )
    if (folder / "adapters.safetensors").is_file() and not weights.is_file():
        raise AdapterFormatError(
            f"{folder} is an adapter of mlx-lm, and not PEFT's",
            fix="Merge it with mlx-lm's own mlx_lm.fuse, and export the folder that it writes.",
        )
    checkpoints = [path for path in folder.glob("checkpoint-*") if (path / CONFIG_FILE).is_file()]
    if checkpoints and not config.is_file():
        newest = max(checkpoints, key=lambda path: (len(path.name), path.name))
        raise AdapterFormatError(
            f"{folder} holds {len(checkpoints)} checkpoints, and no adapter of its own",
            fix=f"Name the one to export, such as the newest: {command_ref('export', newest)}",
        )


def require_safetensors(folder: Path) -> None:
    """Reject a model whose weights are in torch's own format only.

    Raises:
        ModelInvalidError: It has no safetensors, and how to get them.
    """
    old = sorted(folder.glob("pytorch_model*.bin"))
    if old and not any(folder.glob("*.safetensors")):
        raise ModelInvalidError(
            f"{old[0]} is in torch's own format; safetensors is needed",
            fix='Convert it: python -c "from transformers import AutoModelForCausalLM; AutoModelForCausalLM.'
            f"from_pretrained('{folder}', dtype='auto').save_pretrained('{folder}')\"",
        )


_PACKED_NAME = re.compile(r"(-unsloth)?-bnb-4bit$|-fp8(-dynamic)?$|-gptq(-int\d)?$|-awq$|-int[48]$", re.IGNORECASE)


def _require_unpacked(config: Mapping[str, Any], folder: Path, *, dequantize: bool) -> None:
    """A base in 4 bits was made from one in 16, and the adapter's changes belong on that."""
    packed = config.get("quantization_config")
    if not packed:
        return
    told = packed if isinstance(packed, dict) else {}
    kind = str(told.get("quant_method", "some"))
    if kind == "mxfp4":
        return  # gpt-oss as it is published: there is no original in 16 bits
    is_known = kind == "bitsandbytes" and bool(told.get("load_in_4bit"))
    if not (dequantize and is_known):
        raise ModelInvalidError(
            f"{folder} holds weights packed by {kind} quantization; the export needs them in 16 or 32 bits",
            fix=_name_original(config, folder)
            + ("; or use what 4 bits left of it: {set:dequantize=true}" if is_known else ""),
            details={"quantization": kind},
        )


def _name_original(config: Mapping[str, Any], folder: Path) -> str:
    """Where the unpacked model is, as far as names tell: Qwen/Qwen3-8B of Qwen/Qwen3-8B-FP8."""
    for name in (str(config.get("_name_or_path") or ""), tell_model(str(folder)), folder.name):
        if (original := _PACKED_NAME.sub("", name)) != name:
            return f"Name the model that it was made from: {setting_ref('base', original)}"
    return "Download the model that it was made from, in 16 bits, and name its folder: {set:base=/path/to/original}"
