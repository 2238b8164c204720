"""The one pass: read a few rows of the base, add the adapter, round, quantize, append; then the next rows.

Chunks are computed by a few threads, a few ahead of the writing and from one tensor to the next, and written in order:
products and quantizers let go of the interpreter. Memory stays near a few chunks more than threads, and the adapter.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, closing
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TypeAlias

from gguf import GGUFWriter, Keys

from bp_export.gguf.file import GgufStream, name_split
from bp_export.gguf.plan import GgufPlan, TensorPlan
from bp_export.gguf.stored import StoredWeights
from bp_export.quant.kernels import TensorType, choose_engine, is_finite, quantize_rows
from bp_merge import Floats, FoldedModel, TensorsInvalidError

CHUNK_WEIGHTS = 2**19
MOST_THREADS = 8

Weights: TypeAlias = FoldedModel | StoredWeights
"""A checkpoint with its adapter, or a GGUF that is quantized."""
Progress = Callable[[int, int], None]
"""Called with bytes done and bytes in all."""


def write_gguf(
    plan: GgufPlan,
    model: Weights,
    path: Path,
    *,
    progress: Progress | None = None,
    threads: int | None = None,
) -> tuple[int, str]:
    """Write a planned GGUF to ``path``; it appears there only when it is whole.

    Args:
        plan: What to write.
        model: Where the weights come from.
        path: The file.
        progress: Called after each chunk with the tensor bytes written and their total.
        threads: Threads that compute; None for the machine's cores, at most 8. The bytes do not depend on it.

    Returns:
        The file's bytes and its hex SHA-256.

    Raises:
        DiskFullError, OutputNotWritableError, TensorsInvalidError, GgmlMissingError: As named; no file is left.
    """
    [written] = write_parts([(path, plan.writer, plan.tensors)], plan, model, progress=progress, threads=threads)
    return written


def write_split(
    plan: GgufPlan,
    model: Weights,
    path: Path,
    groups: Sequence[Sequence[TensorPlan]],
    *,
    progress: Progress | None = None,
    threads: int | None = None,
) -> list[tuple[int, str]]:
    """Write a planned GGUF to several files (`name_split`), none of which appears before all are written.

    The first holds all settings, the others only which of how many they are (gguf-split in llama.cpp).

    Returns:
        Each file's bytes and hex SHA-256.

    Raises:
        As `write_gguf`.
    """
    infos = plan.writer.tensors[0]
    parts = []
    for number, tensors in enumerate(groups):
        writer = plan.writer if number == 0 else GGUFWriter(path=None, arch=plan.writer.arch)
        writer.tensors = [{tensor.name: infos[tensor.name] for tensor in tensors}]
        writer.add_uint16(Keys.Split.LLM_KV_SPLIT_NO, number)
        writer.add_uint16(Keys.Split.LLM_KV_SPLIT_COUNT, len(groups))
        writer.add_int32(Keys.Split.LLM_KV_SPLIT_TENSORS_COUNT, len(plan.tensors))
        parts.append((name_split(path, number + 1, len(groups)), writer, tensors))
    return write_parts(parts, plan, model, progress=progress, threads=threads)


def cut_plan(plan: GgufPlan, split_bytes: int) -> list[list[TensorPlan]]:
    """The tensors by file: in their order, each file's up to ``split_bytes`` but never none."""
    groups: list[list[TensorPlan]] = [[]]
    filled = 0
    for tensor in plan.tensors:
        if groups[-1] and filled + tensor.bytes > split_bytes:
            groups.append([])
            filled = 0
        groups[-1].append(tensor)
        filled += tensor.bytes
    return groups


def write_parts(
    parts: Sequence[tuple[Path, GGUFWriter, Sequence[TensorPlan]]],
    plan: GgufPlan,
    model: Weights,
    *,
    progress: Progress | None,
    threads: int | None,
) -> list[tuple[int, str]]:
    """Write files with their tensors, and publish them when all are written."""
    for tensor in plan.tensors:
        choose_engine(tensor.kind, is_weighted=tensor.name in plan.importance)
    count = count_threads(threads)
    total, done = plan.data_bytes, 0
    with ExitStack() as stack:
        pool = stack.enter_context(ThreadPoolExecutor(count, "bp-export"))
        chunks = stack.enter_context(closing(compute_in_order(_list_chunks(plan, model), pool, count)))
        streams = []
        for path, writer, tensors in parts:
            streams.append(stack.enter_context(GgufStream(path, writer)))
            for tensor in tensors:
                own = islice(chunks, len(cut_rows(tensor)) * max(1, len(tensor.sources)))
                streams[-1].write_tensor(count_parts(own, done, total, progress))
                done += tensor.bytes
        return [stream.publish() for stream in streams]


def count_threads(asked: int | None) -> int:
    """Threads that compute: as asked, or the machine's cores, at most 8."""
    return asked or min(os.cpu_count() or 1, MOST_THREADS)


def compute_in_order(
    calls: Iterable[Callable[[], memoryview]], pool: ThreadPoolExecutor, ahead: int
) -> Generator[memoryview]:
    """What the calls return, in their order, with ``ahead`` of them under way while one is used."""
    waiting: deque[Future[memoryview]] = deque()
    try:
        for call in calls:
            waiting.append(pool.submit(call))
            if len(waiting) > ahead:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        for future in waiting:
            future.cancel()


def _list_chunks(plan: GgufPlan, model: Weights) -> Iterator[Callable[[], memoryview]]:
    """The file's data, chunk by chunk."""
    extra = plan.extra_tensors
    for tensor in plan.tensors:
        weights = plan.importance.get(tensor.name)
        if not tensor.sources:
            yield partial(_quantize_vector, extra[tensor.name], tensor.kind)
        for index, source in enumerate(tensor.sources):
            own = weights if weights is None or weights.ndim == 1 else weights[index]
            for rows in cut_rows(tensor):
                yield partial(_compute_chunk, tensor, source, own, model, rows)


def count_parts(parts: Iterator[memoryview], done: int, total: int, progress: Progress | None) -> Iterator[memoryview]:
    """The parts, each told to ``progress`` when the next one is requested, beginning with ``done`` bytes."""
    for part in parts:
        yield part
        done += len(part)
        if progress is not None:
            progress(done, total)


def cut_rows(tensor: TensorPlan) -> list[tuple[int, int]]:
    """Ranges of rows of each source: about half a million weights, never cutting through a unit that changes places."""
    if not tensor.sources:
        return [(0, tensor.rows)]
    rows = tensor.rows // len(tensor.sources)
    unit = tensor.change.unit
    step = max(1, CHUNK_WEIGHTS // (tensor.shape[-1] * unit)) * unit
    return [(start, min(start + step, rows)) for start in range(0, rows, step)]


def _quantize_vector(values: Floats, kind: TensorType) -> memoryview:
    return quantize_rows(values.reshape(1, -1), kind).data


def _compute_chunk(
    tensor: TensorPlan, source: str, weights: Floats | None, model: Weights, rows: tuple[int, int]
) -> memoryview:
    if isinstance(model, StoredWeights):
        if model.find(source).kind == tensor.kind:
            return model.read_bytes(source, *rows)
        values = model.read_rows(source, *rows)
    else:
        if tensor.kind == TensorType.MXFP4 and (packed := model.read_packed(source, *rows)) is not None:
            return packed.data
        values = tensor.change.read_rows(model, source, *rows)
    if not is_finite(values):
        raise TensorsInvalidError(
            f"{source} holds weights that are not finite",
            fix="Download the base model again; if only the merged weights are not finite, the training diverged.",
        )
    return quantize_rows(values, tensor.kind, weights).data
