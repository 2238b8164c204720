"""Is the tuned model better than its base, on rows that it has not seen? Measured, with an interval and a verdict."""

from __future__ import annotations

import logging
import os
import re
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

from backpropagate import adapter_lookup, catalogue, rails, settings, system
from backpropagate.errors import EvalDataError, EvalGateError, EvalRailError
from backpropagate.evaluation.compare import (
    METRICS,
    Difference,
    Metric,
    Metrics,
    choose_metrics,
    compare_answers,
    compare_losses,
    matches,
)
from bp_runs.adapter import AdapterFolder, read_adapter_folder
from bp_runs.errors import CodedError, InvalidSettingError, RunNotFoundError
from bp_runs.evaluations import add_evaluation
from bp_runs.events import Emit
from bp_runs.paths import adapter_folder
from bp_runs.rail import ExaminesRows, Part, Rail, RowOutcome, keep_base
from bp_runs.record import RunRecord, utc_now
from bp_runs.spec import RunFolders, Settings, TrainSpec
from bp_runs.store import RunStore

_log = logging.getLogger("backpropagate")

Gate: TypeAlias = Literal["not-worse", "better"]


@dataclass(frozen=True, slots=True, kw_only=True)
class EvalResult:
    """Two models on the same rows."""

    adapter: Path
    against: str
    """``base``, or the folder of the adapter that stood in for it."""
    data: str
    part: Part
    rows: int
    differences: tuple[Difference, ...]
    """Loss first, then the metrics."""
    base: tuple[RowOutcome, ...]
    tuned: tuple[RowOutcome, ...]
    run_id: str | None
    """The adapter's run; None for one from elsewhere."""

    @property
    def verdict(self) -> str:
        """The loss's verdict, which needs no answers."""
        return self.differences[0].verdict

    def summary(self) -> dict[str, Any]:
        """JSON-ready, without rows and answers."""
        return {
            "adapter": str(self.adapter),
            "against": self.against,
            "data": self.data,
            "part": self.part,
            "run_id": self.run_id,
            "rows": self.rows,
            "verdict": self.verdict,
            "measures": [_finite(d.to_dict()) for d in self.differences],
        }

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready; rows that were answered are listed with both answers."""
        pairs = zip(self.base, self.tuned, strict=True)
        answered = [
            {"prompt": b.prompt, "reference": b.reference, "base": b.answer, "tuned": t.answer}
            for b, t in pairs
            if b.answer is not None
        ]
        return {
            **self.summary(),
            "answers": answered,
            "losses": {"base": [r.loss for r in self.base], "tuned": [r.loss for r in self.tuned]},
        }


def _finite(row: dict[str, Any]) -> dict[str, Any]:
    return {k: None if isinstance(v, float) and abs(v) == float("inf") else v for k, v in row.items()}


@dataclass(frozen=True, slots=True)
class _Subject:
    """An adapter and the run that it came from, where that is known."""

    path: Path
    folder: AdapterFolder
    record: RunRecord | None


def evaluate_adapter(
    target: str | None = None,
    *,
    output: Path,
    data: Path | None = None,
    against: str | None = None,
    answers: int = 20,
    answer_tokens: int = 128,
    metrics: Metrics = tuple(METRICS),
    pattern: str | None = None,
    seed: int = 0,
    rail: Rail | None = None,
    emit: Emit = lambda _: None,
) -> EvalResult:
    """Measure an adapter against its base, or against another adapter of the same base.

    Args:
        target: An adapter folder, or a run of ``output``; default: ``<output>/lora``.
        output: The output folder.
        data: Rows that were not trained on; default: the rows that the adapter's run held out.
        against: As ``target``: compare with this adapter instead of the base.
        answers: So many rows are answered by both, greedily.
        answer_tokens: Longest answer, in tokens.
        metrics: Names of `METRICS`, or functions that take an answer and its reference and return a number, higher is
            better; or such functions by name.
        pattern: A regular expression that a right answer matches; one more metric.
        seed: Of the bootstrap.
        rail: As `Trainer`.
        emit: Receives the run's events.

    Raises:
        EvalDataError: There are no rows to measure on.
        EvalRailError: The rail cannot look at single rows.
        CodedError: The adapter, its base or the data cannot be used.
    """
    chosen = choose_metrics(metrics) | ({"regex": _compile(pattern)} if pattern else {})
    subject = find_adapter(target, output)
    other = find_adapter(against, output) if against is not None else None
    wanted = _settings_of(subject, data)
    rail = rail or rails.choose_rail(wanted.training.backend)
    if not isinstance(rail, ExaminesRows):
        raise EvalRailError(f"the rail {rail.name} cannot look at single rows")
    offline = system.is_offline(os.environ)
    rows = catalogue.find_rows(wanted.data, os.environ, offline=offline)
    part: Part = "all" if data is not None else "heldout"
    base = catalogue.find_model(
        wanted.model.name, revision=wanted.model.revision, offline=system.is_offline(os.environ)
    )
    with tempfile.TemporaryDirectory(prefix="backprop-eval-") as scratch, keep_base(rail):
        folders = RunFolders(run_id=subject.folder.run_id or "eval", output=output, run=Path(scratch))
        spec = TrainSpec.build(wanted, folders, base.folder, base.commit, rows=rows.path, rows_commit=rows.commit)
        told: list[list[RowOutcome]] = [
            rail.examine(spec, adapter, emit, part=part, answers=answers, answer_tokens=answer_tokens)
            for adapter in (other.path if other else None, subject.path)
        ]
    result = EvalResult(
        adapter=subject.path,
        against=str(other.path) if other else "base",
        data=wanted.data.path,
        part=part,
        rows=len(told[0]),
        differences=_compare(told[0], told[1], chosen, seed),
        base=tuple(told[0]),
        tuned=tuple(told[1]),
        run_id=subject.folder.run_id,
    )
    _keep(result, subject, output)
    return result


def _keep(result: EvalResult, subject: _Subject, output: Path) -> None:
    """Record the measures with the adapter's run, for `show-run` and `diff-runs`."""
    folder = None if subject.record is None else RunStore(output).folder(subject.record.run_id)
    if folder is None or not folder.is_dir():
        return  # an adapter from elsewhere
    try:
        add_evaluation(folder, {"at": utc_now(), **result.summary()})
    except CodedError as error:
        _log.warning("the evaluation is not recorded: %s", error.message)


def _compare(
    base: Sequence[RowOutcome], tuned: Sequence[RowOutcome], metrics: dict[str, Metric], seed: int
) -> tuple[Difference, ...]:
    found = [compare_answers(base, tuned, name, metric, seed=seed) for name, metric in metrics.items()]
    return (compare_losses(base, tuned, seed=seed), *(difference for difference in found if difference))


def _compile(pattern: str) -> Metric:
    try:
        return matches(re.compile(pattern))
    except re.error as error:
        raise InvalidSettingError(
            f"--regex {pattern!r} is not a regular expression", cause=str(error), fix="Fix it, or leave it out."
        ) from error


def find_adapter(target: str | None, output: Path) -> _Subject:
    """The adapter of a folder or a run.

    Raises:
        AdapterInvalidError, RunNotFoundError: There is none.
    """
    path = adapter_folder(output) if target is None else system.to_path(target)
    if target is not None and not path.exists():
        path = adapter_lookup.find_adapter(target, output)
    folder = read_adapter_folder(path)
    return _Subject(path, folder, _record_of(folder, path, output))


def _record_of(folder: AdapterFolder, path: Path, output: Path) -> RunRecord | None:
    """The run's record, in the output folder or where the adapter itself lies."""
    for place in (output, path.resolve().parent, *path.resolve().parents[2:3]):
        try:
            return RunStore(place).load(folder.run_id) if folder.run_id else None
        except RunNotFoundError:
            continue
    return None


def _settings_of(subject: _Subject, data: Path | None) -> Settings:
    """The settings of the adapter's run, so that the same rows are held out and the same tokens counted."""
    record = subject.record
    if record is None and data is None:
        raise EvalDataError(f"no run tells which rows {subject.path} was not trained on")
    known = settings.all_settings()
    recorded = {known[k].short: v["value"] for k, v in (record.settings if record else {}).items() if k in known}
    flags: dict[str, Any] = {**recorded, "output": None, "sample_prompts": None}
    if record is None:
        flags["model"] = subject.folder.base
    if data is not None:
        flags |= dict.fromkeys(("subset", "split", "data_revision"))  # which chose a part of the run's own data
    if data is None and flags.get("method", "sft") != "sft":
        raise EvalDataError(f"the run was trained with {flags['method']}: its rows hold no single answer")
    where = data if data is not None else str(flags["data"])
    if record is not None and data is None and (Path(record.cwd) / system.to_path(where)).exists():
        where = Path(record.cwd) / system.to_path(where)
    return settings.resolve({**flags, "method": None, "data": str(where)}).settings


def gate_refusal(result: EvalResult, gate: Gate) -> EvalGateError | None:
    """Why the tuned model does not pass, with the measures in its details; None where it does.

    It does not where it is clearly worse in any measure, or, for ``better``, where its loss is not clearly lower.
    """
    worse = [d.name for d in result.differences if d.verdict == "worse"]
    details = {"measures": [_finite(d.to_dict()) for d in result.differences]}
    if worse:
        return EvalGateError(f"worse than {result.against} in: {', '.join(worse)}", details=details)
    if gate == "better" and result.verdict != "better":
        return EvalGateError(f"not clearly better than {result.against}: {result.verdict}", details=details)
    return None
