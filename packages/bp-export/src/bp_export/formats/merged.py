"""The two folder formats: a merged Hugging Face model, and a copy of the adapter."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from functools import partial
from itertools import chain, islice
from pathlib import Path

from bp_data.templates.conversations import ConversationHashes
from bp_export.formats.hash_and_flush import HashAndFlush
from bp_export.formats.output import MARK_FILE, write_mark
from bp_export.gguf.plan import grow_vocabulary, read_config
from bp_export.gguf.writer import CHUNK_WEIGHTS, compute_in_order, count_parts, count_threads
from bp_merge import FoldedModel, TensorInfo, build_header, encode, read_index
from bp_runs.adapter import TEMPLATE_FOLDER, AdapterFolder, copy_tokenizer_files
from bp_runs.files import publish_folder, publish_json, require_folder, require_free_space, sha256_file

SHARD_BYTES = 5 * 10**9
_SPARE_BYTES = 64 * 2**20

_MODEL_FILES = ("config.json", "generation_config.json")
_INDEX_FILE = "model.safetensors.index.json"


def write_merged(
    model: FoldedModel,
    base: Path,
    tokenizer: Path,
    output: Path,
    *,
    hashes: ConversationHashes | None = None,
    progress: Callable[[int, int], None] | None = None,
    threads: int | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> tuple[int, str]:
    """Write the model with its adapter as a Hugging Face folder, a few rows at a time.

    Tensors keep the base's names and dtypes; config files come from the base, tokenizer files from ``tokenizer``.

    Args:
        model: The weights.
        base: Its folder.
        tokenizer: The folder whose tokenizer goes along.
        output: The folder to make; it appears there only when it is whole.
        hashes: How training rendered ten conversations; the folder carries them.
        progress: Called with bytes done and bytes in all.
        threads: As `bp_export.gguf.writer.write_gguf`.
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
    digests, done = {}, 0
    with publish_folder(output) as folder:
        with ExitStack() as stack:
            pool = stack.enter_context(ThreadPoolExecutor(count_threads(threads), "bp-export"))
            calls = _list_chunks(model, shards.values())
            chunks = stack.enter_context(closing(compute_in_order(calls, pool, count_threads(threads))))
            for file_name, infos in shards.items():
                own = islice(chunks, sum(len(_cut_rows(info)) for info in infos.values()))
                digests[file_name] = _write_shard(folder / file_name, infos, count_parts(own, done, total, progress))
                done += sum(info.bytes for info in infos.values())
        if len(shards) > 1:
            weight_map = {name: file_name for file_name, infos in shards.items() for name in infos}
            publish_json(folder / _INDEX_FILE, {"metadata": {"total_size": total}, "weight_map": weight_map})
        _copy_files(base, folder, _MODEL_FILES)
        config = read_config(base)
        grown = grow_vocabulary(config, model)
        grown.pop("quantization_config", None)  # what was packed is written unpacked
        if grown != config:
            publish_json(folder / "config.json", grown)
        copy_tokenizer_files(tokenizer, folder)
        write_mark(folder, "merged", None if hashes is None else hashes.to_dict())
    size = sum(file.stat().st_size for file in output.iterdir())
    return size, sha256_file(output / _INDEX_FILE) if len(shards) > 1 else digests[next(iter(shards))]


def _write_shard(path: Path, infos: Mapping[str, TensorInfo], chunks: Iterator[memoryview]) -> str:
    """Write one file; returns its SHA-256."""
    header = build_header({n: (i.dtype, i.shape) for n, i in infos.items()}, {"format": "pt"})
    parts: Iterator[bytes | memoryview] = chain([header], chunks)
    with path.open("wb") as file, closing(HashAndFlush(file)) as behind:
        for part in parts:
            file.write(part)
            behind.add(part)
        return behind.finish()


def _list_chunks(model: FoldedModel, shards: Iterable[Mapping[str, TensorInfo]]) -> Iterator[Callable[[], memoryview]]:
    for info in (info for infos in shards for info in infos.values()):
        for start, stop in _cut_rows(info):
            yield partial(_encode_rows, model, info, start, stop)


def _encode_rows(model: FoldedModel, info: TensorInfo, start: int, stop: int) -> memoryview:
    return encode(model.read_rows(info.name, start, stop), info.dtype)


def _cut_rows(info: TensorInfo) -> list[tuple[int, int]]:
    step = max(1, CHUNK_WEIGHTS // max(1, info.columns))
    return [(start, min(start + step, info.rows)) for start in range(0, info.rows, step)]


def copy_adapter(adapter: AdapterFolder, output: Path) -> tuple[int, int, str]:
    """Copy an adapter folder's files to ``output``; of its sub-folders only the one with chat templates.

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
        if (adapter.path / TEMPLATE_FOLDER).is_dir():
            shutil.copytree(adapter.path / TEMPLATE_FOLDER, folder / TEMPLATE_FOLDER)
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


def _copy_files(source: Path, target: Path, names: tuple[str, ...]) -> None:
    for name in names:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)
