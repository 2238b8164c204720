"""Train, merge, measure, and again: several runs that each continue from the one before.

    run i:  start from the stream's state → train on slice i → fold the adapter in → measure on every slice so far

The multi-run is a run of its own: its folder keeps slices, state, scorecard and the merged adapter, which is what
``<output>/lora`` becomes. Each training is a run too, with the multi-run as its parent. A crash costs the run that it
happened in and nothing else.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from backpropagate import catalogue
from backpropagate.continual.scorecard import Scorecard
from backpropagate.continual.slices import PLAN_FILE, Slice, read_slices, write_slices
from backpropagate.continual.spec import MultiRunSpec, RunSettings
from backpropagate.continual.stream import JUDGED, SLICES, START, Progress, Stream, join_outcomes, read_progress
from backpropagate.errors import MultiRunGateError, MultiRunStateError, RunsAndRowsError
from backpropagate.run_hints import UNFINISHED, resume_line
from backpropagate.session import RunSession, SessionContext
from backpropagate.settings import all_settings, anchored, resolve
from bp_runs import keep_base
from bp_runs.errors import InterruptedRunError, InvalidSettingError, ResumeNotFoundError
from bp_runs.events import Emit, Notice
from bp_runs.rail import TrainOutcome
from bp_runs.record import RunRecord
from bp_runs.store import RunStore

NEWEST = "newest"
"""Stands for the id of the newest unfinished multi-run."""


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class MultiRunResult:
    """A multi-run that ended well, or was stopped with what was merged kept."""

    run_id: str
    adapter: Path
    """``<output>/lora``; the run's own folder where it was stopped and a finished adapter stands there already."""
    members: tuple[str, ...]
    """Ids of the single runs that were taken in."""
    rejected: tuple[str, ...]
    """Ids of those that the gate left out."""
    card: Scorecard
    outcome: TrainOutcome
    record: RunRecord

    def __repr__(self) -> str:
        left_out = f", {len(self.rejected)} left out" if self.rejected else ""
        return (
            f"MultiRunResult({self.run_id}: {len(self.members)} runs merged{left_out}, adapter {str(self.adapter)!r})"
        )


def check_settings(settings: RunSettings, files: int) -> RunSettings:
    """The settings with as many runs as there are data files, where these are several.

    Raises:
        InvalidSettingError: A setting that a stream of runs cannot have.
        RunsAndRowsError: Another number of runs than of files was requested.
    """
    multi, start = settings.multirun, settings.lora.init_lora_weights
    if settings.training.mode == "full":
        raise InvalidSettingError(
            "{set:training.mode} is full, and a multi-run goes from adapter to adapter",
            fix="Train adapters: {set:training.mode=lora}",
            setting="training.mode",
        )
    if settings.training.start_from is not None:
        raise InvalidSettingError(
            f"{{set:training.start_from}} is {settings.training.start_from}, and a multi-run starts with a new adapter",
            fix="Leave it out: {set:training.start_from}",
            setting="training.start_from",
        )
    if start != "default":
        raise InvalidSettingError(
            f"{{set:lora.init_lora_weights}} is {start}, which changes the base that every run of a multi-run shares",
            fix="Leave it out: {set:lora.init_lora_weights}",
            setting="lora.init_lora_weights",
        )
    if multi.merge != "none" and settings.lora.use_dora:
        raise InvalidSettingError(
            f"{{set:lora.use_dora}} is true and {{set:multirun.merge}} is {multi.merge}, "
            "which can't merge DoRA's magnitudes",
            fix="Train without DoRA: {set:lora.use_dora=false}; or merge nothing: {set:multirun.merge=none}",
            setting="lora.use_dora",
        )
    _check_measures(settings)
    if files > 1 and multi.runs not in (files, MultiRunSpec().runs):
        raise RunsAndRowsError(
            f"there are {files} data files, and {multi.runs} runs were set; with several files, each is one run",
            fix="Leave it out: {set:multirun.runs}",
            setting="multirun.runs",
        )
    return replace(settings, multirun=replace(multi, runs=files)) if files > 1 else settings


def _check_measures(settings: RunSettings) -> None:
    """Reject measures of validation rows where there are none, or none that could be answered."""
    multi, method = settings.multirun, settings.training.method
    asked = {
        "{set:multirun.eval_gate} is true": multi.eval_gate,
        f"{{set:multirun.patience}} is {multi.patience}": multi.patience,
        f"{{set:multirun.metric}} is {multi.metric}": multi.metric != "none",
    }
    told = next((words for words, is_asked in asked.items() if is_asked), None)
    if told and not multi.heldout:
        raise InvalidSettingError(
            f"{told} and {{set:multirun.heldout}} is 0: there would be nothing to measure on",
            fix="Hold out some rows: {set:multirun.heldout=0.1}",
            setting="multirun.heldout",
        )
    if multi.metric != "none" and method != "sft":
        raise InvalidSettingError(
            f"{{set:multirun.metric}} is {multi.metric} and {{set:training.method}} is {method}, "
            "whose rows hold no single answer",
            fix="Leave it out: {set:multirun.metric}",
            setting="multirun.metric",
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class MultiRun:
    """Starts a multi-run, or continues with one."""

    context: SessionContext
    base: catalogue.BaseModel
    settings: RunSettings
    """As `check_settings` gave them."""
    record: Mapping[str, Mapping[str, Any]]
    """The settings with their sources."""
    remarks: Sequence[Notice]
    """What the user should know of the model."""

    @property
    def store(self) -> RunStore:
        """Its output folder's runs."""
        return self.context.store

    def start(self, sources: Sequence[Path]) -> MultiRunResult:
        """Cut the data into slices and carry out all runs.

        Raises:
            CodedError: Bad input, before anything is loaded; or what failed, recorded with the run that it failed in.
        """
        names = [str(source) for source in sources]
        shown = {"value": names[0] if len(names) == 1 else names, "source": "flag"}
        session = RunSession.start(self.context, {**self.record, "data.path": shown}, kind="multi-run")
        return self._carry_out(session, sources)

    def resume(self, run_id: str) -> MultiRunResult:
        """Resume a multi-run that did not end: at the run that it was cut off in.

        Raises:
            MultiRunStateError: It is done, or another kind of run, or its files are missing or damaged.
            CodedError: As `start`; another process works on it.
        """
        record = self.store.load(run_id)
        if record.kind != "multi-run" or record.status == "completed":
            why = "is done" if record.kind == "multi-run" else f"is a run of the kind {record.kind}, not multi-run"
            raise MultiRunStateError(f"{run_id} {why}")
        done = read_progress(self.store.folder(run_id)).done
        plan = self.store.folder(run_id) / SLICES / PLAN_FILE
        # Killed before its rows were chosen, it starts over: the choice follows from the settings and the seed.
        sources = None if done or plan.is_file() else recorded_sources(record)
        return self._carry_out(RunSession.reopen(self.context, run_id, from_step=done, checkpoint=None), sources)

    def _carry_out(self, session: RunSession, sources: Sequence[Path] | None) -> MultiRunResult:
        with session as run:
            run.use_base(self.base)
            for remark in self.remarks:
                run.emit(remark)
            stream = self._open_stream(run, sources)
            with keep_base(self.context.rail):
                progress, stopped = stream.run_all(run.stop)
            outcome = self._finish(stream, progress, stopped=stopped)
            adapter = run.publish(outcome)
            run.finish(outcome)
        card = progress.card.to_dict()
        return MultiRunResult(
            run_id=run.run_id,
            adapter=adapter,
            members=progress.members,
            rejected=progress.rejected,
            card=progress.card,
            outcome=outcome,
            record=self.store.update(run.run_id, lambda record: record.result.update(score_card=card)),
        )

    def _open_stream(self, run: RunSession, sources: Sequence[Path] | None) -> Stream:
        return Stream(
            context=self.context,
            base=self.base,
            settings=self.settings,
            record=self.record,
            folders=run.folders,
            slices=self._find_slices(run.folders.run / SLICES, sources, run.emit),
            emit=run.emit,
        )

    def _find_slices(self, folder: Path, sources: Sequence[Path] | None, emit: Emit) -> list[Slice]:
        """The plan: made now, or read where the multi-run continues."""
        if sources is not None:
            warn = lambda text: emit(Notice(message=text, level="warning"))  # noqa: E731
            return write_slices(folder, sources, self.settings, warn)
        if not (folder / PLAN_FILE).is_file():
            raise MultiRunStateError(f"{folder / PLAN_FILE} is missing, which tells the rows of the runs to come")
        return read_slices(folder)

    def _finish(self, stream: Stream, progress: Progress, *, stopped: bool) -> TrainOutcome:
        """All runs' outcomes as one, with the merged adapter; what only the stream needed is removed."""
        folders = stream.folders
        if not progress.members and stopped:
            raise InterruptedRunError(
                "the multi-run was stopped before its first run was merged",
                fix=f"Resume it: {resume_line(folders.run_id, folders.output)}",
            )
        if not progress.members:
            raise MultiRunGateError(f"the gate left out all {len(progress.rejected)} runs")
        for leftover in (START, JUDGED):
            shutil.rmtree(folders.run / leftover, ignore_errors=True)
        if self.settings.multirun.keep_adapters == "none" and not stopped:
            stream.drop_adapters((*progress.members, *progress.rejected))
        return join_outcomes(progress, folders.adapter, stopped=stopped)


def read_settings(record: RunRecord) -> RunSettings:
    """The settings that a multi-run was started with, whatever the environment says now.

    Raises:
        InvalidSettingError, UnknownSettingError: Another version recorded what this one does not know.
    """
    known = all_settings()
    flags = {
        known[key].short: anchored(key, entry["value"], record.cwd)
        for key, entry in record.settings.items()
        if key in known and key != "data.path"
    }
    return resolve(flags).settings


def recorded_sources(record: RunRecord) -> list[Path]:
    """The data files of a multi-run, as its record names them, from wherever it is resumed."""
    named = record.setting("data.path")
    return [Path(anchored("data.path", name, record.cwd)) for name in (named if isinstance(named, list) else [named])]


def find_multi_run(store: RunStore, wanted: str) -> str:
    """The id of the multi-run to resume.

    Args:
        wanted: Its id or a part of it; ``newest`` for the newest unfinished one.

    Raises:
        ResumeNotFoundError: There is no unfinished multi-run.
        RunNotFoundError: As `RunStore.find`.
    """
    if wanted != NEWEST:
        return store.find(wanted)
    rows = (row for row in store.list_runs() if row["kind"] == "multi-run" and row["status"] in UNFINISHED)
    found = next(rows, None)
    if found is None:
        raise ResumeNotFoundError(f"no unfinished multi-run in {store.output}")
    return str(found["run_id"])


def first_member(store: RunStore, run_id: str) -> RunRecord | None:
    """The record of a run of a multi-run, which names the base as all of them do; None if none has ended yet."""
    progress = read_progress(store.folder(run_id))
    known = (*progress.members, *progress.rejected)
    return store.load(known[0]) if known else None
