"""A merged Hugging Face folder: the base's tensors with the adapter in, a few rows at a time."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from dataclasses import dataclass
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import ClassVar

from bp_export.formats.hash_and_flush import HashAndFlush
from bp_export.formats.left_out import note_unreached
from bp_export.formats.output import require_free_folder, write_mark
from bp_export.formats.request import (
    ExportOutcome,
    ExportPlan,
    Format,
    ModelRequest,
    PlannedTensor,
    Progress,
    summarize_plan,
)
from bp_export.gguf.writer import CHUNK_WEIGHTS, compute_in_order, count_parts, count_threads
from bp_export.model_config import fit_config
from bp_export.source import Source, read_config_file
from bp_export.verify.parity import verify_folder
from bp_merge import FoldedModel, TensorInfo, build_header, encode, join_expert
from bp_runs.adapter import copy_tokenizer_files
from bp_runs.files import publish_folder, publish_json, require_folder, require_free_space, sha256_file
from bp_runs.witness import WITNESS_FILE

SHARD_BYTES = 5 * 10**9
_SPARE_BYTES = 64 * 2**20

_MODEL_FILES = ("config.json", "generation_config.json")
_INDEX_FILE = "model.safetensors.index.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class MergedExport(ModelRequest):
    """The format ``merged``."""

    format: ClassVar[Format] = "merged"

    threads: int | None = None
    """Threads that compute; None for the machine's cores, at most 8."""
    verify: bool | None = None
    """Whether to compare the folder with the witness of training; None: if there is one."""

    def plan(self) -> ExportPlan:
        """Every tensor in the base's dtype."""
        source = self.read_source()
        with source.open() as model:
            tensors = tuple(
                PlannedTensor(i.name, i.name, i.dtype, i.shape, i.bytes, not model.changed.isdisjoint(parts))
                for i, parts in list_stored(model).values()
            )
            notes = note_unreached(model)
        return summarize_plan(self._find_target(source), tensors, threads=self.threads, notes=notes)

    def write(self, progress: Progress | None = None) -> ExportOutcome:
        """Write the folder."""
        begun = time.monotonic()
        source = self.read_source()
        rendering = source.check_rendering()
        target = self._find_target(source)
        with source.open() as model:
            require_free_folder(target, force=self.force, sources=source.folders)
            size, sha256 = write_merged(model, source, target, progress=progress, threads=self.threads)
            count, notes, parity = len(list_stored(model)), note_unreached(model), None
            if self.verify or (self.verify is None and (self.adapter / WITNESS_FILE).is_file()):
                parity = verify_folder(target, model, trained=self.adapter, required=bool(self.verify))
        seconds = time.monotonic() - begun
        return ExportOutcome(target, self.format, None, size, count, seconds, sha256, rendering, parity, notes=notes)

    def _find_target(self, source: Source) -> Path:
        return self.output or self.adapter.parent / f"{source.name}-merged"


def write_merged(
    model: FoldedModel,
    source: Source,
    output: Path,
    *,
    progress: Progress | None = None,
    threads: int | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> tuple[int, str]:
    """Write the model with its adapter as a Hugging Face folder.

    Tensors keep the base's names and dtypes; config files come from the base.

    Args:
        model: The weights.
        source: The base's folder, the tokenizer and what training stored.
        output: The folder to make; it appears there only when it is whole.
        progress: Called with bytes done and bytes in all.
        threads: As `bp_export.gguf.writer.write_gguf`.
        shard_bytes: Weights a file; a model with more gets shards and an index.

    Returns:
        Bytes of all files, and the SHA-256 of model.safetensors or of the index.

    Raises:
        DiskFullError, OutputNotWritableError, TensorsInvalidError: As named; no folder is left.
    """
    stored = list_stored(model)
    shards = cut_shards({name: info for name, (info, _) in stored.items()}, shard_bytes)
    total = sum(info.bytes for info in model.tensors.values())
    require_folder(output.parent)
    require_free_space(output.parent, total + _SPARE_BYTES, "the merged model")
    digests, done = {}, 0
    with publish_folder(output) as folder:
        with ExitStack() as stack:
            pool = stack.enter_context(ThreadPoolExecutor(count_threads(threads), "bp-export"))
            calls = {file_name: _list_chunks(model, infos) for file_name, infos in shards.items()}
            every = chain.from_iterable(calls.values())
            chunks = stack.enter_context(closing(compute_in_order(every, pool, count_threads(threads))))
            for file_name, infos in shards.items():
                own = islice(chunks, len(calls[file_name]))
                digests[file_name] = _write_shard(folder / file_name, infos, count_parts(own, done, total, progress))
                done += sum(info.bytes for info in infos.values())
        if len(shards) > 1:
            weight_map = {name: file_name for file_name, infos in shards.items() for name in infos}
            publish_json(folder / _INDEX_FILE, {"metadata": {"total_size": total}, "weight_map": weight_map})
        _write_settings(model, source, folder)
        write_mark(folder, "merged", None if source.hashes is None else source.hashes.to_dict())
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


def list_stored(model: FoldedModel) -> dict[str, tuple[TensorInfo, tuple[str, ...]]]:
    """The tensors as the base's files have them, each with the names of the model's that hold its bytes, in order."""
    owners = {part: name for name, tensor in model.stored.items() for part in tensor.parts}
    found: dict[str, tuple[TensorInfo, tuple[str, ...]]] = {}
    for name, info in model.tensors.items():
        owner = owners.get(name)
        if owner is None:
            found[name] = (info, (name,))
        elif owner not in found:
            found[owner] = (model.stored[owner].info, model.stored[owner].parts)
    return found


def _list_chunks(model: FoldedModel, names: Iterable[str]) -> list[Callable[[], memoryview]]:
    """What computes the bytes of some of the files' tensors, chunk by chunk."""
    stored = list_stored(model)
    calls: list[Callable[[], memoryview]] = []
    for name in names:
        parts = [model.tensors[part] for part in stored[name][1]]
        if name in model.stored and model.stored[name].has_pairs:
            experts = stored[name][0].shape[0]
            each = len(parts) // experts
            calls += [partial(_encode_expert, model, parts[i * each : (i + 1) * each]) for i in range(experts)]
        else:
            calls += [partial(_encode_rows, model, part, *rows) for part in parts for rows in _cut_rows(part)]
    return calls


def _encode_expert(model: FoldedModel, projections: Sequence[TensorInfo]) -> memoryview:
    rows = [model.read_rows(info.name, 0, info.rows).reshape(info.shape) for info in projections]
    return encode(join_expert(rows), projections[0].dtype)


def _encode_rows(model: FoldedModel, info: TensorInfo, start: int, stop: int) -> memoryview:
    return encode(model.read_rows(info.name, start, stop), info.dtype)


def _cut_rows(info: TensorInfo) -> list[tuple[int, int]]:
    step = max(1, CHUNK_WEIGHTS // max(1, info.columns))
    return [(start, min(start + step, info.rows)) for start in range(0, info.rows, step)]


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


def _write_settings(model: FoldedModel, source: Source, folder: Path) -> None:
    for name in _MODEL_FILES:
        if (source.base / name).is_file():
            shutil.copyfile(source.base / name, folder / name)
    config = read_config_file(source.base)
    merged = fit_config(config, model)
    merged.pop("quantization_config", None)  # what was packed is written unpacked
    if merged != config:
        publish_json(folder / "config.json", merged)
    copy_tokenizer_files(source.tokenizer, folder)
