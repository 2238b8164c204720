"""Which base an adapter was trained on, told from others of the same shapes: by a few vectors of its weights.

Norms stay as they are when a base is packed in fewer bits, and differ between a model and its instruct version, whose
config.json may be the same. Safetensors' format: 8 bytes with the header's length, the header as JSON, the data.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import orjson

_FILE, _INDEX = "model.safetensors", "model.safetensors.index.json"
_STEMS = ("model.", "model.language_model.", "language_model.model.")
_VECTORS = ("layers.0.input_layernorm.weight", "layers.0.post_attention_layernorm.weight", "norm.weight")
_MOST_HEADER = 100 * 2**20


def fingerprint_base(folder: Path) -> str | None:
    """SHA-256 of a model folder's first and last norms as float32; None where they are not found as safetensors."""
    for stem in _STEMS:
        try:
            vectors = [_read_vector(folder, stem + name) for name in _VECTORS]
        except (OSError, ValueError, KeyError, TypeError):
            continue
        return hashlib.sha256(b"".join(vectors)).hexdigest()
    return None


def _read_vector(folder: Path, name: str) -> bytes:
    """The tensor's bytes; bf16, which is half of a float32, as float32."""
    index = folder / _INDEX
    file = folder / (orjson.loads(index.read_bytes())["weight_map"][name] if index.is_file() else _FILE)
    with file.open("rb") as handle:
        length = int.from_bytes(handle.read(8), "little")
        if length > _MOST_HEADER:
            raise ValueError("no safetensors header")
        entry: Mapping[str, Any] = orjson.loads(handle.read(length))[name]
        start, stop = entry["data_offsets"]
        handle.seek(8 + length + start)
        raw = handle.read(stop - start)
    if entry["dtype"] == "BF16":
        return b"".join(b"\0\0" + raw[i : i + 2] for i in range(0, len(raw), 2))
    return raw
