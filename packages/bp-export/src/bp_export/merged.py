"""The two folder formats: a merged Hugging Face model, and a copy of the adapter."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from bp_export.outputs import MARK_FILE, write_mark
from bp_export.plan import grow_vocabulary, read_config
from bp_merge import FoldedModel, TensorInfo, build_header, encode, read_index
from bp_runs.adapter import TOKENIZER_FILES, AdapterFolder
from bp_runs.files import publish_folder, publish_json, require_folder, require_free_space, sha256_file

SHARD_BYTES = 5 * 10**9
CHUNK_WEIGHTS = 2**19
_SPARE_BYTES = 64 * 2**20

_MODEL_FILES = ("config.json", "generation_config.json")
_INDEX_FILE = "model.safetensors.index.json"


def write_merged(
    model: FoldedModel,
    base: Path,
    tokenizer: Path,
    output: Path,
    *,
    progress: Callable[[int, int], None] | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> tuple[int, str]:
    """Write the model with its adapter as a Hugging Face folder, a few rows at a time.

    Tensors keep the base's names and dtypes; config files come from the base, tokenizer files from ``tokenizer``.

    Args:
        model: The weights.
        base: Its folder.
        tokenizer: The folder whose tokenizer goes along.
        output: The folder to make; it appears there only when it is whole.
        progress: Called with bytes done and bytes in all.
        shard_bytes: Weights a file; a model with more gets shards and an index.

    Returns:
        Bytes of all files, and the SHA-256 of model.safetensors or of the index.

    Raises:
        DiskFullError, OutputNotWritableError, TensorsInvalidError: As named; no folder is left.
    """
    shards = cut_shards(model.tensors, shard_bytes)
    total = sum(info.bytes for info in model.tensors.values())
    require_folder(output.parent)
    require_free_space(output.parent, total + _SPARE_BYTES, "the merged model")
    done = 0
    with publish_folder(output) as folder:
        for file_name, infos in shards.items():
            with (folder / file_name).open("wb") as file:
                file.write(build_header({n: (i.dtype, i.shape) for n, i in infos.items()}, {"format": "pt"}))
                for part in (part for info in infos.values() for part in _encode_tensor(model, info)):
                    file.write(part)
                    done += len(part)
                    if progress is not None:
                        progress(done, total)
        if len(shards) > 1:
            weight_map = {name: file_name for file_name, infos in shards.items() for name in infos}
            publish_json(folder / _INDEX_FILE, {"metadata": {"total_size": total}, "weight_map": weight_map})
        _copy_files(base, folder, _MODEL_FILES)
        config = read_config(base)
        grown = grow_vocabulary(config, model)
        grown.pop("quantization_config", None)  # what was packed is written unpacked
        if grown != config:
            publish_json(folder / "config.json", grown)
        _copy_files(tokenizer, folder, TOKENIZER_FILES)
        write_mark(folder, "merged")
    main = output / (_INDEX_FILE if len(shards) > 1 else next(iter(shards)))
    return sum(file.stat().st_size for file in output.iterdir()), sha256_file(main)


def copy_adapter(adapter: AdapterFolder, output: Path) -> tuple[int, int, str]:
    """Copy an adapter folder's files (not its sub-folders) to ``output``.

    Returns:
        Tensors, bytes of all files, and the SHA-256 of the weights.

    Raises:
        TensorsInvalidError: The weights are damaged; they are looked at before anything is copied.
        DiskFullError, OutputNotWritableError: As named; no folder is left.
    """
    tensors = read_index(adapter.weights)
    files = [file for file in adapter.path.iterdir() if file.is_file() and file.name != MARK_FILE]
    size = sum(file.stat().st_size for file in files)
    require_folder(output.parent)
    require_free_space(output.parent, size, "the adapter's copy")
    with publish_folder(output) as folder:
        for file in files:
            shutil.copyfile(file, folder / file.name)
        write_mark(folder, "lora")
    return len(tensors), size, sha256_file(output / adapter.weights.name)


def cut_shards(tensors: Mapping[str, TensorInfo], shard_bytes: int) -> dict[str, dict[str, TensorInfo]]:
    """Tensors by file: in their order, each file up to ``shard_bytes`` but never empty."""
    groups: list[dict[str, TensorInfo]] = [{}]
    filled = 0
    for name, info in tensors.items():
        if groups[-1] and filled + info.bytes > shard_bytes:
            groups.append({})
            filled = 0
        groups[-1][name] = info
        filled += info.bytes
    if len(groups) == 1:
        return {"model.safetensors": groups[0]}
    return {f"model-{i:05d}-of-{len(groups):05d}.safetensors": group for i, group in enumerate(groups, 1)}


def _encode_tensor(model: FoldedModel, info: TensorInfo) -> Iterator[memoryview]:
    step = max(1, CHUNK_WEIGHTS // max(1, info.columns))
    for start in range(0, info.rows, step):
        yield encode(model.read_rows(info.name, start, min(start + step, info.rows)), info.dtype)


def _copy_files(source: Path, target: Path, names: tuple[str, ...]) -> None:
    for name in names:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)
