"""The adapter-folder contract: PEFT's files, plus ``run.json`` with the run id and the files' hashes.

    adapter_config.json          PEFT's settings: base, r, lora_alpha, target_modules, …
    adapter_model.safetensors    lora_A (r, d_in) and lora_B (d_out, r) of each adapted module
    tokenizer.json, chat_template.jinja, …   as trained
    run.json                     {"schema", "run_id", "base", "base_fingerprint", "files": {name: sha256}, "template"}

``template`` holds the hashes of ten rendered conversations (`bp_data.templates.render_hashes`), which whoever renders
chats for the model later must reproduce.

Every rail writes it; merge and export read only it.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson

from bp_runs.errors import AdapterInvalidError
from bp_runs.files import publish_json, sha256_file
from bp_runs.fingerprint import fingerprint_base

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
MANIFEST_FILE = "run.json"
TEMPLATE_FILE = "chat_template.jinja"
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    TEMPLATE_FILE,
    "chat_template.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
)
"""Files that make up a tokenizer and its chat template, of which a folder has some; see `find_tokenizer_files`."""
TEMPLATE_FOLDER = "additional_chat_templates"
"""Folder next to the tokenizer for chat templates with names, such as ``tool_use.jinja``."""
MANIFEST_SCHEMA = "backpropagate.adapter/1"
MODEL_SCHEMA = "backpropagate.model/1"


@dataclass(frozen=True, slots=True)
class AdapterFolder:
    """A PEFT adapter on disk, checked to be complete; no tensor has been read."""

    path: Path
    config: Mapping[str, Any]
    """``adapter_config.json`` as it stands."""
    base: str
    """The base model: a folder or a Hub id."""
    r: int
    alpha: float
    run_id: str | None
    """The run that made it; None for adapters from elsewhere."""

    @property
    def weights(self) -> Path:
        """The safetensors file with all of the adapter's tensors."""
        return self.path / WEIGHTS_FILE


def read_adapter_folder(path: Path) -> AdapterFolder:
    """Read an adapter folder's settings and check that its files are there.

    Raises:
        AdapterInvalidError: A file is missing, not JSON, or not a LoRA adapter's.
    """
    if not path.is_dir():
        raise AdapterInvalidError(f"{path} is not a folder")
    config = _read_json(path / CONFIG_FILE)
    if str(config.get("peft_type", "LORA")).upper() != "LORA":
        raise AdapterInvalidError(f"{path} holds a {config['peft_type']} adapter; only LoRA adapters are understood")
    if not (path / WEIGHTS_FILE).is_file():
        raise AdapterInvalidError(f"{path / WEIGHTS_FILE} is missing")
    base = config.get("base_model_name_or_path")
    r = config.get("r")
    if not isinstance(base, str) or not isinstance(r, int) or r < 1:
        raise AdapterInvalidError(f"{path / CONFIG_FILE} does not name its base model and rank")
    alpha = config.get("lora_alpha", r)
    if not isinstance(alpha, int | float):
        raise AdapterInvalidError(f"{path / CONFIG_FILE}: lora_alpha is {alpha!r}, not a number")
    run_id = read_manifest(path).get("run_id")
    return AdapterFolder(
        path=path,
        config=config,
        base=base,
        r=r,
        alpha=float(alpha),
        run_id=run_id if isinstance(run_id, str) else None,
    )


def read_manifest(path: Path) -> Mapping[str, Any]:
    """The folder's ``run.json``; empty for an adapter that another tool wrote."""
    file = path / MANIFEST_FILE
    return _read_json(file) if file.is_file() else {}


def find_tokenizer_files(folder: Path) -> list[str]:
    """Names, relative to ``folder``, of the files that make up its tokenizer and chat templates."""
    named = sorted((folder / TEMPLATE_FOLDER).glob("*.jinja"))
    return [
        *(name for name in TOKENIZER_FILES if (folder / name).is_file()),
        *(f"{TEMPLATE_FOLDER}/{file.name}" for file in named if file.is_file()),
    ]


def copy_tokenizer_files(source: Path, target: Path) -> None:
    """Copy a folder's tokenizer and chat templates into another folder."""
    for name in find_tokenizer_files(source):
        (target / name).parent.mkdir(exist_ok=True)
        shutil.copyfile(source / name, target / name)


def write_manifest(
    path: Path,
    *,
    run_id: str,
    base: str,
    base_folder: Path | None = None,
    fingerprint: str | None = None,
    origin: Mapping[str, Any] | None = None,
    schema: str = MANIFEST_SCHEMA,
    known: Mapping[str, str] | None = None,
    template: Mapping[str, Any] | None = None,
) -> None:
    """Write ``run.json`` into a finished adapter's or model's folder: the run's id and every file's SHA-256.

    Args:
        base_folder: Where the base is, whose fingerprint tells it from others of the same shapes.
        fingerprint: The base's, for an adapter that was made of others which know it.
        origin: For adapters that were not trained but made of others: how, and of which.
        known: SHA-256 of files by name, where they were computed while these were written.
        template: Hashes of ten rendered conversations, `bp_data.templates.render_hashes.ConversationHashes.to_dict`.
    """
    own = {p.name for p in path.iterdir() if p.is_file() and p.name != MANIFEST_FILE}
    names = sorted(own | set(find_tokenizer_files(path)))
    files = {name: (known or {}).get(name) or sha256_file(path / name) for name in names}
    manifest: dict[str, Any] = {"schema": schema, "run_id": run_id, "base": base, "files": files}
    if found := fingerprint if base_folder is None else fingerprint_base(base_folder):
        manifest["base_fingerprint"] = found
    if template is not None:
        manifest["template"] = dict(template)
    publish_json(path / MANIFEST_FILE, manifest if origin is None else {**manifest, "origin": dict(origin)})


def add_to_manifest(path: Path, name: str) -> None:
    """Take a file that was put into a finished folder into its ``run.json``."""
    manifest = dict(read_manifest(path))
    manifest["files"] = {**manifest.get("files", {}), name: sha256_file(path / name)}
    publish_json(path / MANIFEST_FILE, manifest)


def is_other_base(path: Path, base_folder: Path) -> bool:
    """Whether an adapter folder names the fingerprint of another base than a folder's; False where either has none."""
    recorded, found = read_manifest(path).get("base_fingerprint"), fingerprint_base(base_folder)
    return recorded is not None and found is not None and recorded != found


def require_same_base(path: Path, base_folder: Path) -> AdapterFolder:
    """The adapter folder, unless it was made on other weights than a base's.

    Raises:
        AdapterInvalidError: Likewise for a folder that is no adapter.
    """
    folder = read_adapter_folder(path)
    if is_other_base(path, base_folder):
        raise AdapterInvalidError(
            f"{path} was trained on another base than {base_folder}: their norms differ",
            cause=f"it names {folder.base} as its base",
            fix=f"Use that one; if you are sure of this one, remove base_fingerprint from {MANIFEST_FILE}.",
        )
    return folder


def changed_files(path: Path) -> list[str]:
    """Names of files that are gone or whose bytes no longer match ``run.json``; empty when all hold."""
    recorded: Mapping[str, str] = read_manifest(path).get("files", {})
    return [n for n, digest in recorded.items() if not (path / n).is_file() or sha256_file(path / n) != digest]


def _read_json(file: Path) -> dict[str, Any]:
    try:
        data = orjson.loads(file.read_bytes())
    except FileNotFoundError as error:
        raise AdapterInvalidError(f"{file} is missing") from error
    except OSError as error:
        raise AdapterInvalidError(f"{file} cannot be read", cause=str(error)) from error
    except orjson.JSONDecodeError as error:
        raise AdapterInvalidError(f"{file} is not JSON", cause=str(error)) from error
    if not isinstance(data, dict):
        raise AdapterInvalidError(f"{file} is not a JSON object")
    return data
