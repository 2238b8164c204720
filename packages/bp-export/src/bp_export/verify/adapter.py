"""A written mlx-lm folder, read back, against the PEFT adapter: the change of every module must be the same.

A product of random vectors with both changes is compared, so the d_out x d_in matrices are never computed (Freivalds,
"Probabilistic machines can use less running time", 1977).
"""

from __future__ import annotations

import json
import time
from pathlib import Path

import numpy as np

from bp_export.errors import ParityFailedError
from bp_export.verify.report import ParityCheck, ParityReport, report_untested
from bp_merge import LoraAdapter, LoraPair, TensorReader, read_index
from bp_runs.errors import AdapterInvalidError
from bp_runs.witness import read_witness

_PROBES = 4
_ERROR = 1e-5
"""Largest relative error that float32 explains."""


def verify_mlx_adapter(folder: Path, adapter: LoraAdapter) -> ParityReport:
    """Compare the folder with the adapter that it was written from.

    Args:
        folder: Holds ``adapters.safetensors`` and ``adapter_config.json``.
        adapter: The PEFT adapter.

    Raises:
        ParityFailedError: A module is missing, is another's, or changes its base differently; the folder stays.
    """
    begun = time.monotonic()
    config = json.loads((folder / "adapter_config.json").read_bytes())
    with TensorReader(read_index(folder / "adapters.safetensors")) as reader:
        names = {f"{name}.{end}" for name in adapter.modules for end in ("lora_a", "lora_b")}
        odd = sorted(names ^ set(reader.tensors))
        errors = {} if odd else {name: _measure(reader, name, pair, config) for name, pair in adapter.modules.items()}
    worst = max(errors, key=lambda name: errors[name], default="")
    error = errors.get(worst)
    note = f"{len(errors)} modules change their base as the adapter does, to {error:.0e}" if not odd else ""
    if error is not None and error > _ERROR:
        note = f"{worst} changes its base differently than the adapter does, by {error:.0e} of it"
    note = f"{odd[0]} is on one side only" if odd else note
    passed = error is not None and error <= _ERROR
    check = ParityCheck("adapter", "passed" if passed else "failed", error, _ERROR, note)
    checks = (check, report_untested("witness", _describe_witness(adapter.folder.path)))
    report = ParityReport(checks, "adapter", None, time.monotonic() - begun)
    if not passed:
        raise ParityFailedError(
            f"{folder} was written, and it is not the trained adapter",
            cause=note,
            fix="Export it again; if that fails too, report it with this message.",
            details={"path": str(folder), **report.to_dict()},
        )
    return report


def _measure(reader: TensorReader, name: str, pair: LoraPair, config: dict[str, dict[str, float]]) -> float:
    """Relative error of the written change, over a few random vectors."""
    a, b = reader.read(f"{name}.lora_a"), reader.read(f"{name}.lora_b")
    if (a.shape[0], b.shape[1]) != (pair.a.shape[1], pair.b.shape[0]) or a.shape[1] != b.shape[0]:
        return float("inf")
    x = np.random.default_rng(0).standard_normal((_PROBES, a.shape[0]), np.float32)
    written = (x @ a) @ b * np.float32(config["lora_parameters"]["scale"])
    trained = (x @ pair.a.T) @ pair.b.T * np.float32(pair.scale)
    size = float(np.linalg.norm(trained))
    error = float(np.linalg.norm(written - trained)) / (size or 1.0)
    return error if np.isfinite(error) else float("inf")  # NaN is neither the largest nor the smallest


def _describe_witness(adapter: Path) -> str:
    try:
        witness = read_witness(adapter)
    except AdapterInvalidError as error:
        return error.message
    if witness is None:
        return "training stored no witness of this adapter"
    if witness.weights_sha256 is None:
        return "no model was run here, and the witness names no weights"
    return "no model was run here; training measured it with the very weights that the folder was compared with"
