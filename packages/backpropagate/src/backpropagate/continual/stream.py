"""A stream of runs: each starts from what the ones before left, is folded in, and is measured on all their data.

Nothing here knows where the rows come from or what becomes of the result; see `backpropagate.continual.multirun`.
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

import orjson

from backpropagate import catalogue
from backpropagate.continual.scorecard import Scorecard
from backpropagate.continual.slices import Slice
from backpropagate.continual.spec import RunSettings
from backpropagate.errors import EvalDataError, EvalRailError, MultiRunStateError
from backpropagate.evaluation.compare import METRICS
from backpropagate.session import RunSession, SessionContext
from bp_runs.checkpoint_store import CheckpointFolder
from bp_runs.events import Emit, Notice
from bp_runs.files import publish_folder, publish_json
from bp_runs.rail import ExaminesRows, Rail, Stop, TrainOutcome, WritesWitnesses
from bp_runs.recovery import write_copy
from bp_runs.spec import RunFolders, TrainingSpec, TrainSpec
from bp_runs.store import RunStore

if TYPE_CHECKING:
    from bp_merge import SlaoState

SLICES, AFTER, START, JUDGED, MERGED = "slices", "after", "start", "judged", "merged"
CARD_FILE = "scorecard.json"
_STATE, _PROGRESS = "slao.safetensors", "progress.json"
_ANSWERED = 32
"""Validation rows of a slice that are answered for a metric."""
_OWN_KEYS = ("data.path", "data.samples", "data.on_overflow", "training.learning_rate", "training.seed")


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """What is known after a run, besides the stream's weights."""

    done: int = 0
    """Runs that ended, those that the gate left out included."""
    members: tuple[str, ...] = ()
    rejected: tuple[str, ...] = ()
    slices: tuple[int, ...] = ()
    """Numbers of the members' slices."""
    outcomes: tuple[Mapping[str, Any], ...] = ()
    """`TrainOutcome` of each member as a dict."""
    tuned: str | None = None
    """The newest member's fine-tuned adapter."""
    since_better: int = 0
    """Runs in a row without a lower mean loss."""
    card: Scorecard = field(default_factory=Scorecard)


@dataclass(frozen=True, slots=True, kw_only=True)
class Trained:
    """One run's training, before it is taken in."""

    run_id: str
    plan: Slice
    outcome: TrainOutcome
    before: float | None
    """Loss on the slice's validation rows before the run; None where nothing is held out."""
    before_score: float | None = None
    """As ``before``, of the metric; None where none is requested."""


def learning_rate(settings: RunSettings, number: int) -> float:
    """Of run ``number``, from 1: on a line from the first run's to the last's."""
    first, runs = settings.training.resolved_learning_rate, settings.multirun.runs
    way = (number - 1) / max(1, runs - 1)
    return first * (1 + (settings.multirun.last_lr - 1) * way)


@dataclass(frozen=True, slots=True, kw_only=True)
class Stream:
    """The runs of one multi-run.

    Its folder keeps, from one run to the next: ``after/`` with state, progress and scorecard of the same run, which
    one rename publishes, and ``lora/``, the merged adapter.
    """

    context: SessionContext
    base: catalogue.BaseModel
    settings: RunSettings
    record: Mapping[str, Mapping[str, Any]]
    """The settings with their sources, for the members' records."""
    folders: RunFolders
    """Of the multi-run itself."""
    slices: Sequence[Slice]
    emit: Emit
    """Records an event of the multi-run itself."""

    @property
    def store(self) -> RunStore:
        """The output folder's runs."""
        return self.context.store

    @property
    def rail(self) -> Rail:
        """What trains and measures."""
        return self.context.rail

    def run_all(self, stop: Stop) -> tuple[Progress, bool]:
        """Carry out what is not done yet; the progress then, and whether a stop was requested.

        Raises:
            CodedError: What a run failed with; the runs before it are kept.
        """
        progress = read_progress(self.folders.run)
        state = self._restore(progress)
        self._drop_checkpoints()
        for plan in self.slices[progress.done :]:
            if self._is_over(progress):
                break
            self.emit(Notice(message=self._announce(plan)))
            if state is not None and self.settings.multirun.merge == "slao-preserving":
                state = state.turn()
            shipped = self.folders.adapter if progress.members else None
            before = self._judge(plan, shipped) if plan.heldout else None
            score = None if self.settings.multirun.metric == "none" else self._score(plan, shipped)
            trained = replace(self._train(plan, progress, state, stop, before=before), before_score=score)
            if trained.outcome.stopped:
                return progress, True
            self._drop_checkpoints(trained.run_id)
            progress, state = self._take_in(trained, progress, state)
        self._write_witness(progress)
        return progress, False

    def _write_witness(self, progress: Progress) -> None:
        """What the merged adapter says on the last run's validation rows, for its exports to be compared with."""
        done = [plan for plan in self.slices if plan.heldout and plan.number in progress.slices]
        if self.settings.multirun.merge != "none" and done and isinstance(self.rail, WritesWitnesses):
            self.rail.write_witness(self._heldout_spec(done[-1]), self.folders.adapter, self.emit)

    def drop_adapters(self, members: Sequence[str]) -> None:
        """Remove the weights of single runs; their records stay."""
        for member in members:
            for name in ("lora", MERGED):
                with contextlib.suppress(FileNotFoundError):
                    shutil.rmtree(self.store.folder(member) / name)

    def _drop_checkpoints(self, *members: str) -> None:
        """Remove those of single runs, by default of all: a single run is never resumed; it starts from scratch."""
        mine = members or [r["run_id"] for r in self.store.list_runs() if r["parent"] == self.folders.run_id]
        for member in mine:
            CheckpointFolder(self.store.folder(member)).clear()

    def _is_over(self, progress: Progress) -> bool:
        """Whether the asked patience is at its end."""
        patience = self.settings.multirun.patience
        if not patience or progress.since_better < patience:
            return False
        text = f"ended after run {progress.done}: the mean held-out loss no longer improves"
        self.emit(Notice(message=text))
        return True

    def _announce(self, plan: Slice) -> str:
        replayed = f", {plan.replayed} of them replayed" if plan.replayed else ""
        rate = learning_rate(self.settings, plan.number)
        return f"run {plan.number} of {len(self.slices)}: {plan.train} rows{replayed}, learning rate {rate:.2g}"

    def _train(
        self, plan: Slice, progress: Progress, state: SlaoState | None, stop: Stop, *, before: float | None
    ) -> Trained:
        """One training, recorded as a run of its own."""
        training = replace(
            self.settings.training,
            learning_rate=learning_rate(self.settings, plan.number),
            seed=(self.settings.training.seed + plan.number - 1) % 2**32,
        )
        settings, file = self._settings_for(plan, plan.train_file, training)
        flat = settings.to_flat()
        own = {key: {"value": flat[key], "source": "multi-run"} for key in _OWN_KEYS}
        session = RunSession.start(
            self.context, {**self.record, **own}, parent=(self.folders.run_id, "member"), stop=stop
        )
        with session as run:
            run.use_base(self.base)
            name = self.settings.training.run_name
            run.track(settings, name=f"{name}-{plan.number}" if name else None, group=self.folders.run_id)
            start = self._write_start(progress, state)
            outcome = run.train(settings, self.base, catalogue.Rows(file, None), initial_adapter=start)
            run.finish(outcome)
        return Trained(run_id=run.run_id, plan=plan, outcome=outcome, before=before)

    def _settings_for(self, plan: Slice, name: str, training: TrainingSpec) -> tuple[RunSettings, Path]:
        """The settings for one of a slice's files, which is read whole; documents are split as if read themselves."""
        data, file = self.settings.data, self.folders.run / SLICES / name
        if data.on_overflow == "auto" and plan.source.removesuffix(".gz").endswith((".txt", ".md")):
            data = replace(data, on_overflow="split")
        data = replace(data, path=str(file), samples=None, subset=None, split=None, revision=None)
        return replace(self.settings, data=data, training=training), file

    def _write_start(self, progress: Progress, state: SlaoState | None) -> Path | None:
        """The adapter that the next run starts from; None for a new one."""
        if progress.tuned is None:
            return None
        tuned = Path(progress.tuned)
        if state is None or self.settings.multirun.merge == "ftba-mb":
            return tuned
        return self._write_part("start", self.folders.run / START, tuned, state)

    def _take_in(
        self, trained: Trained, progress: Progress, state: SlaoState | None
    ) -> tuple[Progress, SlaoState | None]:
        """Merge, measure, ask the gate, and publish what is known from now on."""
        plan, tuned = trained.plan, trained.outcome.adapter
        merged, folded = self._merge(trained, state)
        after = replace(progress, done=plan.number)
        if trained.before is not None:
            numbers = (*progress.slices, plan.number)
            row = [self._judge(self.slices[number - 1], merged) for number in numbers]
            old = [*(progress.card.losses[-1] if progress.card.losses else ()), trained.before]
            change = sum(row) / len(row) - sum(old) / len(old)
            after = replace(after, since_better=0 if change < 0 else progress.since_better + 1)
            if self.settings.multirun.eval_gate and change > self.settings.multirun.max_regression:
                return self._leave_out(
                    trained, replace(after, rejected=(*progress.rejected, trained.run_id)), state, change
                )
            own = self._judge(plan, tuned)
            named = replace(progress.card, merge=self.settings.multirun.merge)
            card = named.add(trained.run_id, plan.source, row=row, tuned=own, before=trained.before)
            if trained.before_score is not None:
                scores = [self._score(self.slices[number - 1], merged) for number in numbers]
                card = card.add_scores(self.settings.multirun.metric, scores, trained.before_score)
            after = replace(after, card=card)
        after = replace(
            after,
            members=(*progress.members, trained.run_id),
            slices=(*progress.slices, plan.number),
            outcomes=(*progress.outcomes, trained.outcome.to_dict()),
            tuned=str(tuned),
        )
        self._publish(after, folded)
        _copy_adapter(merged, self.folders.adapter)
        if self.settings.multirun.keep_adapters != "all":
            self.drop_adapters((*progress.members, *progress.rejected))
        self.emit(Notice(message=f"run {plan.number} is taken in", details={"card": after.card.to_dict()}))
        return after, folded

    def _leave_out(
        self, trained: Trained, after: Progress, state: SlaoState | None, change: float
    ) -> tuple[Progress, SlaoState | None]:
        """What the gate rejects leaves no trace in the stream."""
        text = f"the gate leaves run {trained.plan.number} out: the mean held-out loss would change by {change:+.4f}"
        self.emit(Notice(message=text, level="warning", details={"run_id": trained.run_id, "change": change}))
        self._publish(after, state)
        return after, state

    def _merge(self, trained: Trained, state: SlaoState | None) -> tuple[Path, SlaoState | None]:
        """The adapter to ship after this run, and the stream's state."""
        tuned = trained.outcome.adapter
        if self.settings.multirun.merge == "none":
            return tuned, None
        from bp_merge import start_stream

        folded = start_stream(self.folders.run_id, tuned) if state is None else state.fold(tuned)
        return self._write_part("merged", self.store.folder(trained.run_id) / MERGED, tuned, folded), folded

    def _write_part(self, part: str, place: Path, tuned: Path, state: SlaoState) -> Path:
        """An adapter of the stream's state with the settings and tokenizer of a fine-tuned one."""
        from bp_merge import write_adapter_like

        arm = self.settings.multirun.merge
        tensors = state.next_start(qr=arm == "slao") if part == "start" else state.merged_adapter()
        origin = {"method": arm, "part": part, "i": state.i}
        write_adapter_like(tuned, place, tensors, run_id=self.folders.run_id, origin=origin)
        return place

    def _judge(self, plan: Slice, adapter: Path | None) -> float:
        """Loss of an adapter, or of the base alone, on a slice's validation rows."""
        return self.rail.evaluate(self._heldout_spec(plan), adapter, lambda _: None).loss

    def _score(self, plan: Slice, adapter: Path | None) -> float:
        """The asked metric's mean over answers to a slice's first validation rows.

        Raises:
            EvalRailError: The rail cannot answer rows.
            EvalDataError: None of the rows has a prompt.
        """
        if not isinstance(self.rail, ExaminesRows):
            raise EvalRailError(f"the rail {self.rail.name} cannot answer rows, which {{set:multirun.metric}} needs")
        metric, longest = METRICS[self.settings.multirun.metric], self.settings.training.sample_tokens
        spec = self._heldout_spec(plan)
        rows = self.rail.examine(spec, adapter, lambda _: None, answers=_ANSWERED, answer_tokens=longest)
        found = [metric(r.answer, r.reference) for r in rows if r.answer is not None and r.reference is not None]
        if not found:
            raise EvalDataError(f"no held-out row of run {plan.number} has a prompt to be answered")
        return fmean(found)

    def _heldout_spec(self, plan: Slice) -> TrainSpec:
        where = replace(self.folders, run=self.folders.run / JUDGED)
        where.run.mkdir(exist_ok=True)
        settings, file = self._settings_for(plan, plan.heldout_file, replace(self.settings.training, sample_prompts=()))
        return TrainSpec.build(settings, where, self.base.folder, self.base.commit, rows=file)

    def _publish(self, progress: Progress, state: SlaoState | None) -> None:
        """State, progress and scorecard of the same run, in one rename."""
        with publish_folder(self.folders.run / AFTER) as partial:
            if state is not None:
                from bp_merge import write_state

                write_state(partial / _STATE, state)
            card = progress.card.to_dict()
            names = ("done", "members", "rejected", "slices", "outcomes", "tuned", "since_better")
            publish_json(partial / _PROGRESS, {**{name: getattr(progress, name) for name in names}, "card": card})
            publish_json(partial / CARD_FILE, card)
            write_copy(self.folders.run, partial)

    def _restore(self, progress: Progress) -> SlaoState | None:
        """The stream's state; the merged adapter is written again, since a crash may have come before it was."""
        if progress.tuned is None:
            return None
        tuned = Path(progress.tuned)
        if self.settings.multirun.merge == "none":
            _copy_adapter(tuned, self.folders.adapter)
            return None
        from bp_merge import read_state

        state = read_state(self.folders.run / AFTER / _STATE, stream=self.folders.run_id)
        self._write_part("merged", self.folders.adapter, tuned, state)
        return state


def read_progress(folder: Path) -> Progress:
    """What a multi-run's folder says of its runs; nothing done where it says nothing.

    Raises:
        MultiRunStateError: It is damaged.
    """
    file = folder / AFTER / _PROGRESS
    if not file.is_file():
        return Progress()
    try:
        data = orjson.loads(file.read_bytes())
        lists = {name: tuple(data[name]) for name in ("members", "rejected", "slices", "outcomes")}
        card = Scorecard.from_dict(data["card"])
        return Progress(done=data["done"], tuned=data["tuned"], since_better=data["since_better"], card=card, **lists)
    except (orjson.JSONDecodeError, KeyError, TypeError) as error:
        raise MultiRunStateError(f"{file} is damaged", cause=repr(error)) from error


def join_outcomes(progress: Progress, adapter: Path, *, stopped: bool) -> TrainOutcome:
    """All members' outcomes as one; the loss goes from the first run's first to the last run's last."""
    outcomes = progress.outcomes
    return TrainOutcome(
        adapter=adapter,
        steps=sum(o["steps"] for o in outcomes),
        first_loss=outcomes[0]["first_loss"],
        final_loss=outcomes[-1]["final_loss"],
        tokens=sum(o["tokens"] for o in outcomes),
        seconds=sum(o["seconds"] for o in outcomes),
        peak_memory=max(o["peak_memory"] for o in outcomes),
        stopped=stopped,
        eval_loss=progress.card.average,
    )


def _copy_adapter(source: Path, target: Path) -> None:
    with publish_folder(target) as partial:
        for file in source.iterdir():
            if file.is_file():
                shutil.copy2(file, partial / file.name)
