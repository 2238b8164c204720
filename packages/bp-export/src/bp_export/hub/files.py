"""What of an adapter, a model folder or a GGUF goes to the Hub: known files, without secrets and folders of a machine.

Settings files are uploaded without the folders that they name; weights that name one are rejected.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from bp_export.errors import PushSourceError
from bp_export.formats.output import read_format
from bp_export.gguf.file import MAGIC, read_settings
from bp_export.hub.card import Kind
from bp_export.local_paths import hide_homes, hide_places, is_place, tell_model
from bp_runs.adapter import CONFIG_FILE, MANIFEST_FILE, WEIGHTS_FILE, find_tokenizer_files, read_adapter_folder
from bp_runs.redact import redact

_ADAPTER_FILES = (CONFIG_FILE, WEIGHTS_FILE, MANIFEST_FILE)
_MODEL_FILES = ("config.json", "generation_config.json", "model.safetensors.index.json")
_LICENSES = ("LICENSE", "LICENSE.txt", "LICENSE.md")
# A token in a text of prose or of a vocabulary is none: only settings are searched.
# The manifest comes last, since it holds the others' hashes.
_SEARCHED = (CONFIG_FILE, "config.json", "generation_config.json", "tokenizer_config.json", MANIFEST_FILE)
_ITS_OWN = "Push the adapter's own folder: {do:push ./output/lora repo=me/my-model}"
_MOST_HEADER = 100 * 2**20
_SPLIT = re.compile(r"(.+)-\d{5}-of-(\d{5})\.gguf")


@dataclass(frozen=True, slots=True)
class Shipment:
    """Files to upload, by the name that they get there."""

    kind: Kind
    files: dict[str, Path]
    cleaned: Mapping[str, bytes] = field(default_factory=dict)
    """What is uploaded instead of a file, where that names a machine's folders."""

    @property
    def contents(self) -> dict[str, str | bytes]:
        """What is uploaded by each name: a path, or bytes."""
        return {name: self.cleaned.get(name, str(path)) for name, path in self.files.items()}

    @property
    def bytes(self) -> int:
        """Of all that is uploaded."""
        return sum(
            len(self.cleaned[name]) if name in self.cleaned else path.stat().st_size
            for name, path in self.files.items()
        )


def gather(source: Path) -> Shipment:
    """The files of something that training or an export wrote.

    Raises:
        PushSourceError: It is nothing of that sort, a settings file holds what looks like a secret, or weights name a
            machine's folder.
        AdapterInvalidError: It is an adapter that is not whole.
        ChatFailedError: It is a GGUF that cannot be read.
    """
    shipment = _gather(source)
    for name, path in shipment.files.items():
        if name in _SEARCHED and redact(text := path.read_text(encoding="utf-8", errors="replace")) != text:
            raise PushSourceError(
                f"{path} holds what looks like a secret", fix="Take it out of the file, and replace the secret."
            )
        if shipment.kind == "gguf":
            _require_no_place(path, read_settings(path), "Export the model again with bp-export, and push that.")
        elif path.suffix == ".safetensors":
            _require_no_place(path, _read_metadata(path), "Save the weights again without their metadata.")
    return shipment


def clean_settings(shipment: Shipment, base: str) -> Shipment:
    """The shipment with settings files that name no folder of a machine, and the base by the name that others know.

    Args:
        base: What the adapter's settings and its ``run.json`` say of the base.
    """
    cleaned: dict[str, bytes] = {}
    for name in (name for name in _SEARCHED if name in shipment.files):
        text = shipment.files[name].read_text(encoding="utf-8", errors="replace")
        try:
            told = json.loads(text)
        except ValueError:
            continue  # whoever loads it is going to hear of that
        if (clean := _clean(name, told, base, cleaned, shipment.files)) != told:
            cleaned[name] = (json.dumps(clean, indent=2, ensure_ascii=False) + "\n").encode()
    return replace(shipment, cleaned=cleaned)


def _clean(name: str, told: Any, base: str, cleaned: Mapping[str, bytes], shipped: Collection[str]) -> Any:
    clean = hide_places(told)
    if name == CONFIG_FILE:
        clean["base_model_name_or_path"] = base
    elif name == MANIFEST_FILE:
        clean["base"] = base
        digests = {other: hashlib.sha256(data).hexdigest() for other, data in cleaned.items()}
        # Also without what stays here: the witness, which holds examples of the user's data.
        kept = {other: digest for other, digest in clean.get("files", {}).items() if other in shipped}
        clean["files"] = {other: digests.get(other, digest) for other, digest in kept.items()}
        if isinstance(origin := clean.get("origin"), dict):
            origin["adapters"] = [tell_model(str(path)) for path in origin.get("adapters", [])]
    return clean


def _require_no_place(file: Path, told: Mapping[str, Any], fix: str) -> None:
    for key, value in told.items():
        if isinstance(value, str) and (is_place(value) or hide_homes(value) != value):
            raise PushSourceError(f"{file} names a folder of a machine as {key}: {value[:200]}", fix=fix)


def _read_metadata(file: Path) -> dict[str, Any]:
    """What a safetensors file says besides its tensors; empty where its header cannot be read."""
    with file.open("rb") as handle:
        header = handle.read(min(int.from_bytes(handle.read(8), "little"), _MOST_HEADER))
    try:
        return dict(json.loads(header).get("__metadata__") or {})
    except (ValueError, AttributeError):
        return {}


def _gather(source: Path) -> Shipment:
    if source.is_file():
        return Shipment("gguf", {path.name: path for path in _find_parts(source)})
    if (format := read_format(source)) in ("mlx", "ollama-adapter"):
        raise PushSourceError(f"{source} is an adapter in the form of {format}", fix=_ITS_OWN)
    if (source / CONFIG_FILE).is_file():
        read_adapter_folder(source)
        return Shipment("adapter", _pick(source, (*_ADAPTER_FILES, *find_tokenizer_files(source), *_LICENSES)))
    weights = sorted(path.name for path in source.glob("*.safetensors")) if source.is_dir() else []
    if weights and (source / "config.json").is_file():
        return Shipment("merged", _pick(source, (*_MODEL_FILES, *weights, *find_tokenizer_files(source), *_LICENSES)))
    raise PushSourceError(f"{source} is no adapter folder, model folder or GGUF")


def _pick(folder: Path, names: tuple[str, ...]) -> dict[str, Path]:
    return {name: folder / name for name in names if (folder / name).is_file()}


def _find_parts(file: Path) -> list[Path]:
    with file.open("rb") as handle:
        if handle.read(len(MAGIC)) != MAGIC:
            raise PushSourceError(f"{file} is no GGUF")
    split = _SPLIT.fullmatch(file.name)
    if split is None:
        return [file]
    parts = [file.with_name(f"{split[1]}-{i:05}-of-{split[2]}.gguf") for i in range(1, int(split[2]) + 1)]
    if missing := [part for part in parts if not part.is_file()]:
        raise PushSourceError(f"{missing[0]} is missing", fix="Export it again; all parts must be there.")
    return parts
