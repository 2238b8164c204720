"""Does an independent loop compute the losses that a run recorded? Replayed, compared, and kept with the run."""

from __future__ import annotations

import math
import os
import tempfile
from pathlib import Path

from backpropagate import catalogue, rails, resume_plan, settings, system
from backpropagate.errors import ProofFailedError
from backpropagate.run_hints import output_setting
from bp_runs.errors import InvalidSettingError, ProofUnsupportedError, RunNotFoundError
from bp_runs.proof import Proof, write_proof
from bp_runs.rail import Rail, ReplaysSteps
from bp_runs.record import RunRecord, utc_now
from bp_runs.spec import RunFolders, TrainSpec
from bp_runs.store import RunStore
from bp_runs.wording import command_ref


def prove_run(store: RunStore, run: str | None, *, steps: int = 10, rail: Rail | None = None) -> Proof:
    """Replay a run's first steps in an independent loop, compare the losses, and keep the proof with the run.

    Args:
        run: The run's id or a part of it; None: the newest run.
        steps: Optimizer steps to replay; at most those that were recorded.
        rail: As `Trainer`.

    Raises:
        InvalidSettingError: ``steps`` is less than 1.
        ProofUnsupportedError: The independent loop can't repeat the run, or its data changed.
        CodedError: The run, its base or its data can't be used.
    """
    if steps < 1:
        raise InvalidSettingError(
            f"{{set:steps}} is {steps}; it must be at least 1", fix="Replay ten: {do:prove steps=10}"
        )
    record = store.load(run or _newest(store))
    _require_plain(store, record)
    recorded = _recorded_losses(store, record)[:steps]
    if not recorded:
        raise ProofUnsupportedError(
            f"the run {record.run_id} recorded no step",
            fix=f"Choose a run that trained: {command_ref('list-runs', **output_setting(store.output))}",
        )
    wanted = resume_plan.pin(settings.from_record(record).settings, record)
    rail = rail or rails.choose_rail(record.rail)
    if not isinstance(rail, ReplaysSteps):
        raise ProofUnsupportedError(
            f"the backend {rail.name} can't replay steps", fix="Prove a run of the backend cuda."
        )
    offline = system.is_offline(os.environ)
    rows = catalogue.find_rows(wanted.data, os.environ, offline=offline)
    base = catalogue.find_model(wanted.model.name, revision=wanted.model.revision, offline=offline)
    with tempfile.TemporaryDirectory(prefix="backprop-prove-") as scratch:
        folders = RunFolders(run_id=record.run_id, output=store.output, run=Path(scratch))
        start = wanted.training.start_from
        spec = TrainSpec.build(
            wanted,
            folders,
            base.folder,
            base.commit,
            initial_adapter=None if start is None else Path(start),
            rows=rows.path,
            rows_commit=rows.commit,
        )
        replay = rail.replay_steps(spec, record, len(recorded))
    proof = Proof(
        run_id=record.run_id,
        at=utc_now(),
        recorded=tuple(recorded),
        replayed=replay.losses,
        tolerance=replay.tolerance,
        why=replay.why,
        versions=system.installed_versions(),
    )
    write_proof(store.folder(record.run_id), proof)
    return proof


def failure(proof: Proof) -> ProofFailedError | None:
    """Why the proof failed, with the first step that differs; None where it passed."""
    if proof.passed:
        return None
    step = next(at for at, gap in enumerate(proof.differences) if not gap <= proof.tolerance)
    return ProofFailedError(
        f"the replay of the run {proof.run_id} differs by {proof.largest:.2g}; up to {proof.tolerance:g} is rounding",
        cause=f"first at step {step + 1}: recorded {proof.recorded[step]:.6f}, replayed {proof.replayed[step]:.6f}",
        details={"largest": proof.to_dict()["largest"], "tolerance": proof.tolerance, "step": step + 1},
    )


def _newest(store: RunStore) -> str:
    rows = [row for row in store.list_newest(50)[0] if row["kind"] == "train"]
    if not rows:
        raise RunNotFoundError(f"no runs in {store.output}", fix="Start one: {do:train data.path=my_data.jsonl}")
    return str(rows[0]["run_id"])


def _require_plain(store: RunStore, record: RunRecord) -> None:
    """Reject runs whose beginning the record does not hold."""
    choose = f"Choose a single training run: {command_ref('list-runs', **output_setting(store.output))}"
    relation = (record.parent or {}).get("relation")
    if record.is_imported:
        raise ProofUnsupportedError(
            f"the run {record.run_id} was imported: its record lacks the settings it was trained with", fix=choose
        )
    if record.kind != "train" or relation not in (None, "replay"):
        what = "is a multi-run" if record.kind != "train" else f"started from the run {(record.parent or {})['run_id']}"
        raise ProofUnsupportedError(
            f"the run {record.run_id} {what}, and only a run that starts from the base is replayed", fix=choose
        )


def _recorded_losses(store: RunStore, record: RunRecord) -> list[float]:
    """Losses of the steps from the first on, up to one that is missing or not finite."""
    found = {e["step"]: e["loss"] for e in store.read_metrics(record.run_id) if e.get("event") == "step"}
    losses: list[float] = []
    while isinstance(loss := found.get(len(losses) + 1), int | float) and math.isfinite(loss):
        losses.append(float(loss))
    return losses
