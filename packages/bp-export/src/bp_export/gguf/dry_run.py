"""What an export would write, and how long that would take here; nothing is written."""

from __future__ import annotations

import shutil
import time
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from bp_export.gguf.plan import GgufPlan
from bp_export.gguf.writer import count_threads
from bp_export.quant.kernels import TensorType, quantize_rows

_TRIAL_SHAPE = (32, 2048)


@dataclass(frozen=True, slots=True)
class PlannedTensor:
    """One tensor of the GGUF."""

    name: str
    source: str | None
    """In the checkpoint; None for one that is computed."""
    type: str
    """ggml's name: ``Q4_K``."""
    shape: tuple[int, ...]
    bytes: int
    is_changed: bool
    """Whether the adapter changes it."""


@dataclass(frozen=True, slots=True)
class ExportPlan:
    """The whole file."""

    path: Path
    tensors: tuple[PlannedTensor, ...]
    bytes: int
    """Of all tensors."""
    free_bytes: int
    """On the disk of ``path``."""
    seconds: float
    """What quantizing would take on this machine's cores, from a trial of each type."""


def build_export_plan(plan: GgufPlan, path: Path, *, changed: Collection[str], threads: int | None) -> ExportPlan:
    """Sum a plan up; tries each type on some 65,000 weights."""
    speeds = {kind: _measure(kind) for kind in {tensor.kind for tensor in plan.tensors}}
    work = sum(tensor.rows * tensor.shape[-1] / speeds[tensor.kind] for tensor in plan.tensors)
    existing = next(p for p in (path, *path.absolute().parents) if p.exists())
    tensors = tuple(
        PlannedTensor(t.name, t.source, t.kind.name, t.shape, t.bytes, t.source in changed) for t in plan.tensors
    )
    free, cores = shutil.disk_usage(existing).free, count_threads(threads)
    return ExportPlan(path, tensors, plan.data_bytes, free, work / cores)


def _measure(kind: TensorType) -> float:
    """Weights a second on one core."""
    rows = np.random.default_rng(0).standard_normal(_TRIAL_SHAPE, np.float32)
    begun = time.perf_counter()
    quantize_rows(rows, kind)
    return rows.size / max(time.perf_counter() - begun, 1e-9)
