"""What of an adapter, a model folder or a GGUF goes to the Hub: known files only, and none with a secret in it."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from bp_export.card import Kind
from bp_export.errors import PushSourceError
from bp_export.gguf import MAGIC
from bp_runs.adapter import CONFIG_FILE, MANIFEST_FILE, TOKENIZER_FILES, WEIGHTS_FILE, read_adapter_folder
from bp_runs.redact import redact

_ADAPTER_FILES = (CONFIG_FILE, WEIGHTS_FILE, MANIFEST_FILE)
_MODEL_FILES = ("config.json", "generation_config.json", "model.safetensors.index.json")
_LICENSES = ("LICENSE", "LICENSE.txt", "LICENSE.md")
# A token in a text of prose or of a vocabulary is none: only settings are searched.
_SEARCHED = (CONFIG_FILE, MANIFEST_FILE, "config.json", "generation_config.json", "tokenizer_config.json")
_SPLIT = re.compile(r"(.+)-\d{5}-of-(\d{5})\.gguf")


@dataclass(frozen=True, slots=True)
class Shipment:
    """Files to upload, by the name that they get there."""

    kind: Kind
    files: dict[str, Path]

    @property
    def bytes(self) -> int:
        """Of all files."""
        return sum(path.stat().st_size for path in self.files.values())


def gather(source: Path) -> Shipment:
    """The files of something that training or an export wrote.

    Raises:
        PushSourceError: It is nothing of that sort, or a settings file holds what looks like a secret.
        AdapterInvalidError: It is an adapter that is not whole.
    """
    shipment = _gather(source)
    for name, path in shipment.files.items():
        if name in _SEARCHED and redact(text := path.read_text(encoding="utf-8", errors="replace")) != text:
            raise PushSourceError(
                f"{path} holds what looks like a secret", way_out="Take it out of the file, and replace the secret."
            )
    return shipment


def _gather(source: Path) -> Shipment:
    if source.is_file():
        return Shipment("gguf", {path.name: path for path in _find_parts(source)})
    if (source / CONFIG_FILE).is_file():
        read_adapter_folder(source)
        return Shipment("adapter", _pick(source, (*_ADAPTER_FILES, *TOKENIZER_FILES, *_LICENSES)))
    weights = sorted(path.name for path in source.glob("*.safetensors")) if source.is_dir() else []
    if weights and (source / "config.json").is_file():
        return Shipment("merged", _pick(source, (*_MODEL_FILES, *weights, *TOKENIZER_FILES, *_LICENSES)))
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
        raise PushSourceError(f"{missing[0]} is missing", way_out="Export it again; all parts must be there.")
    return parts
