"""SmolLM2 in about 56 MiB, for a machine that can be sent no more: each row on a uniform grid, Huffman-coded.

    uv run python benchmarks/continual/pack_model.py --model FOLDER --data stream.npz --out model.pack [--step 0.27]

A grid of ``step`` times the row's root mean square costs about 2.05 - log2(step) bits a weight when its places are
entropy-coded, and adds noise of step² / 12 of the row's power: 0.27 is 3.9 bits and 22 dB, which a grid of 4 bits
without such a code does not reach. The embedding keeps the rows of the tokens that the stream uses. ``stream.py`` takes
the folder and the pack alike, and reports the zero-shot scores, so that what the packing costs can be seen.
"""

from __future__ import annotations

import argparse
import json
import zlib
from pathlib import Path

import numpy as np

from bp_merge import TensorReader, read_model_index


def pack_rows(weight: np.ndarray, step: float) -> tuple[dict, bytes]:
    """A matrix as places on its rows' grids; vectors as float32."""
    if weight.ndim == 1:
        return {"shape": list(weight.shape)}, zlib.compress(weight.astype("<f4").tobytes())
    grid = (step * np.sqrt(np.square(weight).mean(axis=1))).astype(np.float16)
    places = np.clip(np.rint(weight / grid.astype(np.float32)[:, None]), -127, 127).astype(np.int8)
    coder = zlib.compressobj(9, zlib.DEFLATED, 15, 9, zlib.Z_HUFFMAN_ONLY)
    raw = grid.tobytes() + coder.compress(places.tobytes()) + coder.flush()
    return {"shape": list(weight.shape), "rows": weight.shape[0]}, raw


def unpack_rows(entry: dict, raw: bytes) -> np.ndarray:
    """The float32 values of `pack_rows`."""
    if "rows" not in entry:
        return np.frombuffer(zlib.decompress(raw), "<f4").reshape(entry["shape"])
    grid = np.frombuffer(raw[: 2 * entry["rows"]], np.float16).astype(np.float32)
    places = np.frombuffer(zlib.decompress(raw[2 * entry["rows"] :]), np.int8).reshape(entry["shape"])
    return places * grid[:, None]


def read_pack(file: Path) -> tuple[dict, dict[str, np.ndarray]]:
    """A packed model: its config and its tensors in float32."""
    data = file.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    head = json.loads(data[8:start])
    return head["config"], {
        name: unpack_rows(e, data[start + e["start"] : start + e["stop"]]) for name, e in head["tensors"].items()
    }


def read_folder(folder: Path, kept: np.ndarray) -> tuple[dict, dict[str, np.ndarray]]:
    """A Hugging Face folder in the same form: the embedding's kept rows only."""
    config = json.loads((folder / "config.json").read_bytes())
    with TensorReader(read_model_index(folder)) as reader:
        tensors = {name: reader.read(name) for name in reader.tensors}
    tensors["model.embed_tokens.weight"] = tensors["model.embed_tokens.weight"][kept]
    return config, tensors


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--step", type=float, default=0.27)
    options = parser.parse_args()
    config, tensors = read_folder(options.model, np.load(options.data)["kept"])
    entries, blobs, place, noise, power = {}, [], 0, 0.0, 0.0
    for name, weight in sorted(tensors.items()):
        entry, raw = pack_rows(weight, options.step)
        entries[name] = {**entry, "start": place, "stop": place + len(raw)}
        blobs.append(raw)
        place += len(raw)
        noise += float(np.square(unpack_rows(entry, raw) - weight).sum())
        power += float(np.square(weight).sum())
    head = json.dumps({"config": config, "tensors": entries}).encode()
    options.out.write_bytes(len(head).to_bytes(8, "little") + head + b"".join(blobs))
    size = options.out.stat().st_size
    print(f"{size / 2**20:.1f} MiB, {8 * size / sum(w.size for w in tensors.values()):.2f} bits a weight")
    print(f"signal to noise {10 * np.log10(power / noise):.1f} dB")


if __name__ == "__main__":
    main()
