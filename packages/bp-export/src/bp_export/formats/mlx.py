"""An adapter as mlx-lm loads it next to a base: a folder with its own names, one rank and one scale for all modules."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from bp_export.errors import AdapterFormatError
from bp_export.formats.gguf_adapter import require_plain
from bp_export.formats.lora import LoraExport
from bp_export.formats.output import write_mark
from bp_export.formats.request import Format
from bp_export.verify.adapter import verify_mlx_adapter
from bp_export.verify.report import ParityReport
from bp_merge import Floats, LoraAdapter, LoraPair, load_adapter, write_tensors
from bp_runs.adapter import AdapterFolder
from bp_runs.files import publish_folder, publish_json, sha256_file

MLX_WEIGHTS, MLX_CONFIG = "adapters.safetensors", "adapter_config.json"
_LAYER = re.compile(r"(?:.*\.)?layers\.(\d+)\.(.+)")


@dataclass(frozen=True, slots=True, kw_only=True)
class MlxExport(LoraExport):
    """The format ``mlx``."""

    format: ClassVar[Format] = "mlx"

    def write_folder(self, folder: AdapterFolder, target: Path) -> tuple[int, int, str]:
        """Write the folder; returns as `write_mlx_adapter`."""
        adapter = load_adapter(folder.path)
        require_plain(adapter, self.format)
        return write_mlx_adapter(adapter, target)

    def verify_written(self, folder: AdapterFolder, target: Path) -> ParityReport:
        """As `bp_export.verify.adapter.verify_mlx_adapter`."""
        return verify_mlx_adapter(target, load_adapter(folder.path))


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
