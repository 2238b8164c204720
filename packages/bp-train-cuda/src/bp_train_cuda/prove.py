"""Replaying a recorded run's first steps in `bp_train_cuda.prove_loop`, an independent loop in its own process."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import orjson
import torch

from bp_data import TokenRow
from bp_data.loop.rows import PlannedRows, prepare_rows
from bp_data.preparation import AnyPrepared
from bp_data.token_rows import JudgedRow, PairRow
from bp_runs.errors import GpuOutOfMemoryError, ProofUnsupportedError, TrainingFailedError
from bp_runs.rail import Replay
from bp_runs.record import RunRecord
from bp_runs.spec import LoraSpec, TrainingSpec, TrainSpec
from bp_runs.wording import command_ref
from bp_train_cuda import backend, prove_loop
from bp_train_cuda.model.load import read_config
from bp_train_cuda.optim import choose_optimizer


def replay_steps(spec: TrainSpec, record: RunRecord, steps: int) -> Replay:
    """As `bp_train_cuda.rail.CudaRail.replay_steps`."""
    mode = str(record.model.get("mode", "")).partition(" ")[0]
    device = str(record.model.get("device", "")).partition(" ")[0]
    dtype = str(record.model.get("dtype", ""))
    require_replayable(spec, record, mode=mode, device=device)
    job = build_job(spec, record, steps, mode=mode, device=device, dtype=dtype)
    file = spec.folders.run / "job.json"
    file.write_bytes(orjson.dumps(job))
    tolerance, why = choose_tolerance(job)
    return Replay(losses=tuple(run_job(file)), tolerance=tolerance, why=why)


def require_replayable(spec: TrainSpec, record: RunRecord, *, mode: str, device: str) -> None:
    """Reject runs whose training draws random numbers that another loop can't draw, or that needs hardware not here.

    Raises:
        ProofUnsupportedError: Why not, and what can be proved instead.
    """
    lora, training = spec.lora, spec.training
    adapter = mode != "full"
    reasons: tuple[tuple[bool, str, dict[str, object] | None], ...] = (  # what to change, so that it can be proved
        (mode not in ("lora", "qlora", "full"), "its record does not say how the base was loaded", None),
        (training.engine == "unsloth", "Unsloth's kernels and model are its own", {"training.engine": "native"}),
        (training.engine == "trl", "TRL joins epochs and weighs batches its own way", {"training.engine": "native"}),
        (training.fp8, "its matrices were multiplied in 8-bit floats", {"training.fp8": False}),
        (adapter and lora.dropout > 0, "dropout draws other random numbers", {"lora.dropout": 0}),
        (
            adapter and lora.init_lora_weights != "default",
            f"its adapter starts as {lora.init_lora_weights}, from a decomposition of the base",
            {"lora.init_lora_weights": "default"},
        ),
        (record.hardware.get("sharing") == "fsdp2", "its weights were sharded over several processes", None),
        (spec.initial_adapter is not None, "it started from another adapter", None),
        (device == "cuda" and not torch.cuda.is_available(), "it was trained on a GPU, and there is none here", None),
        (_has_dropout(spec), "the base model itself uses dropout", None),
    )
    for wrong, why, changes in reasons:
        if wrong:
            again = command_ref("replay", record.run_id, **{"training.steps": 10, **(changes or {})})
            fix = None if changes is None else f"Train it again without that, and prove the new run: {again}"
            raise ProofUnsupportedError(f"the run {record.run_id} can't be replayed: {why}", fix=fix)


def _has_dropout(spec: TrainSpec) -> bool:
    config = read_config(spec.base, trust_remote_code=spec.model.trust_remote_code).get_text_config().to_dict()
    return any(
        isinstance(value, float) and value > 0
        for name, value in config.items()
        if "dropout" in name or name.endswith("pdrop")
    )


def build_job(spec: TrainSpec, record: RunRecord, steps: int, *, mode: str, device: str, dtype: str) -> dict[str, Any]:
    """What `prove_loop.replay` needs: plain numbers, and the token ids of the rows that it asks for.

    Raises:
        ProofUnsupportedError: The data, its template or the split is not what the run was trained on.
        CodedError: As `bp_data.loop.rows.prepare_rows`.
    """
    prepared = prepare_rows(spec)
    ranks = int(record.hardware.get("ranks", 1))
    planned = PlannedRows.build(prepared, spec.training, prepared.max_seq_length, ranks)
    _require_same_rows(record, prepared, len(planned.validation))
    rows, packs, training = planned.train.rows, planned.packs, planned.plan.apply_to(spec.training)
    job: dict[str, Any] = {
        "replay": min(steps, planned.plan.steps),
        "base": str(spec.base.resolve()),
        "trust_remote_code": spec.model.trust_remote_code,
        "mode": mode,
        "dtype": dtype,
        "device": device,
        "lora": _lora_numbers(spec.lora),
        "seed": training.seed,
        "shuffled": training.curriculum == "none",
        "examples": len(packs if packs is not None else rows),
        "batch_size": training.batch_size * ranks,
        "gradient_accumulation": training.gradient_accumulation,
        "max_length": prepared.max_seq_length,
        "optimizer": _optimizer(training, mode, device),
        "learning_rate": training.resolved_learning_rate,
        "weight_decay": training.weight_decay,
        "max_grad_norm": training.max_grad_norm,
        "scheduler": training.scheduler,
        "warmup_steps": training.warmup_steps,
        "steps": planned.plan.steps,
        **_method_numbers(training),
    }
    wanted = needed_rows(job, packs)
    job["packs"] = None if packs is None else {str(number): pack for number, pack in enumerate(packs)}
    job["rows"] = {str(place): _to_row(rows[place]) for place in wanted}
    return job


def needed_rows(job: Mapping[str, Any], packs: Sequence[Sequence[int]] | None) -> list[int]:
    """Numbers of the rows that the replay visits, by its own order, and of those whose answers it compares with."""
    steps = [[place for batch in batches for place in batch] for batches in prove_loop.plan_steps(dict(job))]
    visited = {place for places in steps for place in places}
    if packs is not None:
        return sorted({row for place in visited for row in packs[place]})
    if job["method"] == "kto":
        visited |= {other for places in steps for _, other in prove_loop.neighbors(dict(job), places)}
    return sorted(visited)


def _require_same_rows(record: RunRecord, prepared: AnyPrepared, heldout: int) -> None:
    now = {
        "sha256": prepared.data_sha256,
        "template_sha256": prepared.template.sha256,
        "read": prepared.ledger.read,
        "heldout": heldout,
        "tokens": prepared.tokens,
    }
    for name, value in now.items():
        if record.data.get(name) != value:
            raise ProofUnsupportedError(
                f"the data or its chat template changed since the run {record.run_id}",
                cause=f"{name} was {record.data.get(name)} and is {value}",
                fix="Put back the data and the model that the run was trained with, then prove it again.",
            )


def _lora_numbers(spec: LoraSpec) -> dict[str, Any]:
    targets = [name.strip() for name in spec.target_modules.split(",") if name.strip()]
    return {
        "r": spec.r,
        "lora_alpha": spec.resolved_alpha,
        "use_rslora": spec.use_rslora,
        "use_dora": spec.use_dora,
        "target_modules": targets[0] if targets == ["all-linear"] else targets,
    }


def _optimizer(training: TrainingSpec, mode: Any, device: Any) -> str:
    """``adamw`` or ``adamw_8bit``; paging changes no number."""
    chosen = choose_optimizer(training, backend.Mode(mode, "recorded"), backend.Device(device, "recorded", 0))
    return "adamw_8bit" if "8bit" in chosen else "adamw"


def _method_numbers(training: TrainingSpec) -> dict[str, Any]:
    return {
        "method": training.method,
        "beta": getattr(training, f"{training.method}_beta", 0.0),
        "gamma": training.simpo_gamma,
        "good_weight": training.kto_desirable_weight,
        "bad_weight": training.kto_undesirable_weight,
    }


def _to_row(row: TokenRow | PairRow | JudgedRow) -> dict[str, Any]:
    """A row as JSON for the independent loop."""
    answers: tuple[TokenRow, ...]
    match row:
        case PairRow():
            answers = (row.chosen, row.rejected)
        case JudgedRow():
            answers = (row.row,)
        case _:
            answers = (row,)
    good = row.label if isinstance(row, JudgedRow) else None
    return {"answers": [{"ids": a.ids.tolist(), "mask": list(a.mask)} for a in answers], "good": good}


def choose_tolerance(job: Mapping[str, Any]) -> tuple[float, str]:
    """The largest difference of losses, in nats, that rounding explains; and why."""
    if job["mode"] == "full" and job["optimizer"] == "adamw_8bit" and job["dtype"] == "bfloat16":
        return 0.1, "bfloat16 weights were rounded by chance, which is not replayed"
    if job["mode"] == "qlora" or job["optimizer"] == "adamw_8bit":
        return 0.05, "4-bit weights and 8-bit optimizer state magnify bfloat16's rounding"
    if job["dtype"] != "float32":
        return 0.05, "bfloat16 keeps 8 significant bits, and batches are summed in another order"
    if job["device"] == "cuda":
        return 1e-3, "GPU kernels sum float32 in another order"
    return 1e-4, "float32 sums in another order"


def run_job(file: Path) -> list[float]:
    """Run `prove_loop` on a job's file in an isolated process; returns the losses, in nats.

    Raises:
        GpuOutOfMemoryError: One row at a time does not fit the GPU.
        TrainingFailedError: The replay itself broke.
    """
    command = [sys.executable, "-I", prove_loop.__file__, str(file)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603  # our own script
    if done.returncode == 0:
        losses: list[float | None] = orjson.loads(done.stdout.splitlines()[-1])["losses"]
        return [float("nan") if loss is None else loss for loss in losses]
    last = (done.stderr.strip() or f"exit status {done.returncode}").splitlines()[-1]
    if "OutOfMemoryError" in done.stderr:
        raise GpuOutOfMemoryError("the GPU ran out of memory while the run was replayed", cause=last)
    raise TrainingFailedError("the independent loop broke", cause=last)
