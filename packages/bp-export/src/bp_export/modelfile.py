"""An adapter for Ollama by itself: a folder with a GGUF LoRA and the Modelfile that puts it on a model there.

Ollama 0.34.1 and later refuse adapters; the way there is a merged GGUF.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from gguf import GGUFReader

from bp_export.adapter import write_gguf_adapter
from bp_export.architectures import Architecture
from bp_export.errors import AdapterFormatError
from bp_merge import AdapterMismatchError, FoldedModel, LoraAdapter
from bp_runs.files import publish_folder, publish_json, sha256_file

ADAPTER_FILE, MODELFILE, BASE_FILE = "adapter.gguf", "Modelfile", "base.json"


def write_ollama_adapter(
    model: FoldedModel,
    adapter: LoraAdapter,
    architecture: Architecture,
    output: Path,
    *,
    base: Path,
    runs_on: str,
    name: str,
    stop: Sequence[str],
) -> tuple[int, int, str]:
    """Write the folder.

    Args:
        model: The base with the adapter.
        adapter: The adapter.
        architecture: The base's layout.
        output: The folder to make; it appears there only when it is whole.
        base: The base's folder.
        runs_on: The base in Ollama: a model's name, or the path of a GGUF, which is compared with the base.
        name: The adapter's ``general.name``.
        stop: Stop words.

    Returns:
        Tensors, bytes of all files, and the SHA-256 of the adapter.

    Raises:
        AdapterMismatchError: The GGUF is of another base.
        AdapterFormatError: ``runs_on`` has the look of a path, and there is no GGUF.
    """
    if runs_on.endswith(".gguf"):
        check_base(Path(runs_on), model, architecture)
    lines = [f"FROM {runs_on}", f"ADAPTER ./{ADAPTER_FILE}", *(f"PARAMETER stop {json.dumps(word)}" for word in stop)]
    with publish_folder(output) as folder:
        tensors, _, sha256 = write_gguf_adapter(model, adapter, architecture, folder / ADAPTER_FILE, name=name)
        (folder / MODELFILE).write_text("\n".join(lines) + "\n", encoding="utf-8")
        publish_json(
            folder / BASE_FILE,
            {"base": adapter.folder.base, "config_sha256": sha256_file(base / "config.json"), "from": runs_on},
        )
    return tensors, sum(file.stat().st_size for file in output.iterdir()), sha256


def check_base(path: Path, model: FoldedModel, architecture: Architecture) -> None:
    """Compare a GGUF's vectors with the base's: norms are float32 in every quantization, and differ from base to base.

    Raises:
        AdapterMismatchError: One is missing or differs.
        AdapterFormatError: The file is no GGUF.
    """
    try:
        found = {tensor.name: np.asarray(tensor.data) for tensor in GGUFReader(path).tensors if len(tensor.shape) == 1}
    except (OSError, ValueError, KeyError, IndexError) as error:
        raise AdapterFormatError(f"{path} cannot be read as GGUF", cause=str(error)) from error
    for source, info in model.tensors.items():
        target = architecture.map_name(source)
        if target is None or len(info.shape) != 1:
            continue
        change = architecture.plan_change(architecture.clean_name(source), info.shape)
        expected = change.read_rows(model, source, 0, 1).reshape(-1)
        if not np.array_equal(found.get(target, np.empty(0)), expected):
            raise AdapterMismatchError(f"{path} is not the adapter's base: its {target} differs")
