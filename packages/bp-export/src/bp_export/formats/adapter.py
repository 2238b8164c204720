"""An adapter by itself, in the forms that other runtimes load beside a base: a GGUF LoRA, and mlx-lm's folder.

Both know one factor for all modules where PEFT may have several, so what differs is multiplied into B. Only adapters
that are nothing but ``scale * B @ A`` on linear weights have such a form.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGUFType, GGUFWriter, Keys

from bp_export.architectures import Architecture
from bp_export.errors import AdapterFormatError
from bp_export.formats.output import write_mark
from bp_export.gguf.file import GgufStream, add_tensor
from bp_export.quant.kernels import TensorType
from bp_merge import Floats, FoldedModel, LoraAdapter, LoraPair, write_tensors
from bp_runs.files import publish_folder, publish_json, sha256_file

MLX_WEIGHTS, MLX_CONFIG = "adapters.safetensors", "adapter_config.json"
_LAYER = re.compile(r"(?:.*\.)?layers\.(\d+)\.(.+)")


def require_plain(adapter: LoraAdapter, format: str) -> None:
    """Refuse what the format cannot say.

    Raises:
        AdapterFormatError: The adapter is more than pairs on linear weights.
    """
    if not adapter.is_plain:
        raise AdapterFormatError(
            f"{adapter.folder.path} holds more than LoRA on linear weights, which {format} cannot say"
        )


def write_gguf_adapter(
    model: FoldedModel, adapter: LoraAdapter, architecture: Architecture, path: Path, *, name: str
) -> tuple[int, int, str]:
    """Write ``<tensor>.lora_a`` (r, d_in) and ``.lora_b`` (d_out, r) in float32, as llama.cpp reads an adapter.

    Args:
        model: The base with the adapter, which knows which tensor each module is.
        adapter: The adapter; `require_plain` comes first.
        architecture: The base's layout.
        path: The file.
        name: Becomes ``general.name``.

    Returns:
        Tensors, bytes and hex SHA-256.
    """
    tensors: dict[str, Floats] = {}
    for source, pair in model.pairs.items():
        clean = architecture.clean_name(source)
        change = architecture.plan_change(clean, model.tensors[source].shape)
        target = architecture.map_name(source)
        # llama.cpp multiplies by alpha / r, with one alpha for all.
        factor = np.float32(pair.scale * pair.a.shape[0] / adapter.folder.alpha)
        tensors[f"{target}.lora_a"] = pair.a if change.columns is None else pair.a[:, change.columns]
        tensors[f"{target}.lora_b"] = (pair.b if change.rows is None else pair.b[change.rows]) * factor
    writer = GGUFWriter(path=None, arch=architecture.name)
    writer.add_type(GGUFType.ADAPTER)
    writer.add_string(Keys.Adapter.TYPE, "lora")
    writer.add_float32(Keys.Adapter.LORA_ALPHA, adapter.folder.alpha)
    writer.add_name(name)
    for key, values in tensors.items():
        add_tensor(writer, key, values.shape, TensorType.F32, values.nbytes)
    with GgufStream(path, writer) as stream:
        for values in tensors.values():
            stream.write_tensor([np.ascontiguousarray(values, "<f4").tobytes()])
        size, sha256 = stream.publish()
    return len(tensors), size, sha256


def write_mlx_adapter(adapter: LoraAdapter, output: Path) -> tuple[int, int, str]:
    """Write mlx-lm's adapter folder: ``lora_a`` (d_in, r) and ``lora_b`` (r, d_out), one r and one scale for all.

    Pairs of a smaller rank are filled up with zeros, which adds nothing.

    Returns:
        Tensors, bytes of all files, and the SHA-256 of the weights.

    Raises:
        AdapterFormatError: A module is not part of a numbered layer.
    """
    matches = {name: _LAYER.fullmatch(name) for name in adapter.modules}
    if outside := [name for name, match in matches.items() if match is None]:
        raise AdapterFormatError(f"{outside[0]} is not part of a layer, and mlx-lm adapts layers only")
    parts = {name: (int(match[1]), match[2]) for name, match in matches.items() if match}
    rank = max(pair.a.shape[0] for pair in adapter.modules.values())
    scale = max(pair.scale for pair in adapter.modules.values())
    tensors = {
        key: values
        for name, pair in adapter.modules.items()
        for key, values in _to_mlx(name, pair, rank, scale).items()
    }
    config: dict[str, Any] = {
        "fine_tune_type": "lora",
        "model": adapter.folder.base,
        "num_layers": 1 + max(layer for layer, _ in parts.values()),
        "lora_parameters": {
            "rank": rank,
            "scale": scale,
            "dropout": 0.0,
            "keys": sorted({key for _, key in parts.values()}),
        },
    }
    with publish_folder(output) as folder:
        write_tensors(folder / MLX_WEIGHTS, tensors)
        publish_json(folder / MLX_CONFIG, config)
        write_mark(folder, "mlx")
    size = sum(file.stat().st_size for file in output.iterdir())
    return len(tensors), size, sha256_file(output / MLX_WEIGHTS)


def _to_mlx(name: str, pair: LoraPair, rank: int, scale: float) -> dict[str, Floats]:
    missing = rank - pair.a.shape[0]
    a = np.pad(pair.a, ((0, missing), (0, 0))).T
    b = np.pad(pair.b * np.float32(pair.scale / scale), ((0, 0), (0, missing))).T
    return {f"{name}.lora_a": np.ascontiguousarray(a), f"{name}.lora_b": np.ascontiguousarray(b)}
