"""What a trace of the GPU's kernels says: how long it computed, at what, and where it had nothing to do."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

KINDS = (  # the first that has a part of a kernel's name
    ("attention", ("flash", "fmha", "sdpa", "attention", "cudnn")),
    ("matrix products", ("gemm", "cutlass", "nvjet", "cublas", "wgmma", "splitk")),
    ("dequantization", ("dequant",)),
    ("optimizer", ("optimizer", "adam", "multi_tensor", "lpnorm", "foreach")),
    ("norms", ("rms", "layernorm", "layer_norm")),
    ("positions", ("rope",)),
    ("feed-forward", ("swiglu", "silu", "geglu", "gelu")),
    ("softmax and loss", ("softmax", "logsumexp", "cross_entropy", "exp_kernel", "log_kernel")),
    ("adds", ("cudafunctor_add", "addfunctor", "add_kernel")),
    ("multiplications", ("mulfunctor", "mul_kernel")),
    ("copies between host and GPU", ("memcpy htod", "memcpy dtoh")),
    ("copies", ("memcpy", "copy")),
    ("fills", ("memset", "fillfunctor")),
    ("gathers", ("catarray", "index", "gather", "scatter")),
    ("sums", ("reduce",)),
    ("other elementwise", ("elementwise", "vectorized")),
)


def read_trace(file: Path, steps: int) -> dict[str, Any]:
    """Busy share, kernels by kind and the longest gaps between them, of a Chrome trace of ``steps`` steps."""
    events = [e for e in json.loads(file.read_text())["traceEvents"] if e.get("ph") == "X"]
    kernels = [e for e in events if e.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")]
    if not kernels:
        return {"kernels": 0}
    spans = sorted((float(e["ts"]), float(e["ts"]) + float(e["dur"])) for e in kernels)
    busy, gaps, end = 0.0, [], spans[0][0]
    for start, stop in spans:
        if start > end:
            gaps.append((start - end, end))
        busy += max(0.0, stop - max(start, end))
        end = max(end, stop)
    total = end - spans[0][0]
    milliseconds: Counter[str] = Counter()
    counts: Counter[str] = Counter()
    names: Counter[str] = Counter()
    name_counts: Counter[str] = Counter()
    for kernel in kernels:
        kind = kind_of(kernel["name"])
        milliseconds[kind] += kernel["dur"] / 1e3
        counts[kind] += 1
        names[kernel["name"][:200]] += kernel["dur"] / 1e3
        name_counts[kernel["name"][:200]] += 1
    runtime = [e for e in events if e.get("cat") in ("cuda_runtime", "cuda_driver")]
    calls: Counter[str] = Counter()
    for call in runtime:
        calls[call["name"]] += 1
    waits = sorted(((e["dur"] / 1e3, e["name"]) for e in runtime if "ynchronize" in e["name"]), reverse=True)
    return {
        "busy_share": round(busy / total, 4),
        "traced_ms_per_step": round(total / 1e3 / steps, 1),
        "busy_ms_per_step": round(busy / 1e3 / steps, 1),
        "idle_ms_per_step_by_gap": _gap_table([gap for gap, _ in gaps], steps),
        "longest_gaps_ms": [[round(gap / 1e3, 2), describe_gap(at, kernels)] for gap, at in sorted(gaps)[-6:][::-1]],
        "kernels_per_step": round(len(kernels) / steps),
        "kernels_under_6_us": round(sum(1 for e in kernels if e["dur"] < 6) / steps),
        "ms_per_step": {k: [round(v / steps, 2), round(counts[k] / steps)] for k, v in milliseconds.most_common()},
        "calls": dict(calls.most_common(8)),
        "waits_ms": [[round(ms, 2), name] for ms, name in waits[:8]],
        "tables": {"kernels": [[round(ms / steps, 3), round(name_counts[n] / steps, 1), n] for n, ms in names.most_common(80)]},
    }  # fmt: skip


def _gap_table(gaps: Sequence[float], steps: int) -> dict[str, float]:
    """Milliseconds a step without a kernel, by how long a gap is, in microseconds."""
    bounds = ((0, 5), (5, 20), (20, 100), (100, 1000), (1000, float("inf")))
    return {
        f"{low}-{high} µs": round(sum(gap for gap in gaps if low <= gap < high) / 1e3 / steps, 2)
        for low, high in bounds
    }


def describe_gap(at: float, kernels: Sequence[dict[str, Any]]) -> str:
    """The kernels around a gap."""
    before = max((k for k in kernels if k["ts"] + k["dur"] <= at + 0.01), key=lambda k: k["ts"], default=None)
    after = min((k for k in kernels if k["ts"] > at), key=lambda k: k["ts"], default=None)
    return " > ".join(kind_of(k["name"]) + ": " + k["name"][:60] for k in (before, after) if k is not None)


def kind_of(name: str) -> str:
    """A row of `KINDS`."""
    low = name.lower()
    return next((kind for kind, parts in KINDS if any(part in low for part in parts)), "other")
