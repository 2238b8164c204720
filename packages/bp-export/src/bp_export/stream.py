"""The one pass: read a few rows of the base, add the adapter, round, quantize, append; then the next rows.

Chunks are computed by a few threads, a few ahead of the writing, and written in order: NumPy's products and ggml's
kernels let go of the interpreter. Memory stays near ``threads + 1`` chunks and the adapter.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from bp_export.gguf import GgufStream
from bp_export.plan import GgufPlan, TensorPlan
from bp_export.quantize import load_ggml, quantize_rows
from bp_merge import Floats, FoldedModel

CHUNK_WEIGHTS = 2**19
MOST_THREADS = 8

Progress = Callable[[int, int], None]
"""Called with bytes done and bytes in all."""


def write_gguf(
    plan: GgufPlan,
    model: FoldedModel,
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
    load_ggml()
    count = threads or min(os.cpu_count() or 1, MOST_THREADS)
    total, done = plan.data_bytes, 0
    extra = plan.architecture.build_extra_tensors()
    with GgufStream(path, plan.writer) as stream, ThreadPoolExecutor(count, "bp-export") as pool:
        for tensor in plan.tensors:
            parts = (
                _compute_parts(tensor, plan.importance.get(tensor.name), model, pool, count)
                if tensor.source is not None
                else iter([quantize_rows(extra[tensor.name].reshape(1, -1), tensor.kind)])
            )
            stream.write_tensor(_count_parts(parts, done, total, progress))
            done += tensor.bytes
        return stream.publish()


def _count_parts(parts: Iterator[bytes], done: int, total: int, progress: Progress | None) -> Iterator[bytes]:
    for part in parts:
        yield part
        done += len(part)
        if progress is not None:
            progress(done, total)


def _compute_parts(
    tensor: TensorPlan, weights: Floats | None, model: FoldedModel, pool: ThreadPoolExecutor, ahead: int
) -> Iterator[bytes]:
    """The tensor's bytes chunk by chunk, in order, with ``ahead`` chunks under way."""
    waiting: deque[Future[bytes]] = deque()
    try:
        for start, stop in cut_rows(tensor):
            waiting.append(pool.submit(_compute_chunk, tensor, weights, model, start, stop))
            if len(waiting) > ahead:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        for future in waiting:
            future.cancel()


def cut_rows(tensor: TensorPlan) -> Iterator[tuple[int, int]]:
    """Ranges of rows of about half a million weights, never cutting through a unit whose rows change places."""
    unit = tensor.change.unit
    step = max(1, CHUNK_WEIGHTS // (tensor.shape[-1] * unit)) * unit
    for start in range(0, tensor.rows, step):
        yield start, min(start + step, tensor.rows)


def _compute_chunk(tensor: TensorPlan, weights: Floats | None, model: FoldedModel, start: int, stop: int) -> bytes:
    rows = tensor.change.read_rows(model, str(tensor.source), start, stop)
    return quantize_rows(rows, tensor.kind, weights)
