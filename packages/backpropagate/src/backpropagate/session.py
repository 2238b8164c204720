"""One run from its record to its result: what every training run needs around the rail's loop.

`Trainer`, the members of a multi-run, and the multi-run itself all go through here:

    with RunSession.start(context, settings) as run:
        run.use_base(base)
        outcome = run.train(settings, base, rows)
        adapter = run.publish(outcome)
        record = run.finish(outcome)

A session opens the run's record, puts the run's id on log lines, shows events, tells tracker, listens for a stop
request, keeps the promise of ``--offline``, and records how the run ended, whatever ended it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from backpropagate import offline, system
from backpropagate.catalogue import BaseModel, Rows
from backpropagate.distributed import launchers
from backpropagate.event_dispatch import EventDispatcher
from backpropagate.interrupts import Interrupts, no_interrupts
from backpropagate.logs import follow_run
from backpropagate.run_hints import resume_line
from backpropagate.trackers import tracker
from bp_runs import wording
from bp_runs.adapter import read_manifest
from bp_runs.errors import AdapterInvalidError, CodedError, InterruptedRunError
from bp_runs.events import Event, Notice
from bp_runs.rail import Rail, Stop, TrainOutcome
from bp_runs.record import Relation, RunRecord
from bp_runs.spec import Ranks, RunFolders, Settings, TrainSpec
from bp_runs.store import RunStore
from bp_runs.writer import RunWriter


@dataclass(frozen=True, slots=True, kw_only=True)
class SessionContext:
    """What all runs of one call share: where they are recorded, what trains them, and who follows them."""

    store: RunStore
    """The output folder's runs."""
    rail: Rail
    environ: Mapping[str, str]
    """The environment, which is only read."""
    command: Sequence[str] = ()
    """What was typed."""
    followers: Sequence[str] = ()
    """Trackers of the training runs."""
    on_event: Callable[[Event], None] | None = None
    interrupts: Interrupts = field(default=no_interrupts)
    """Opens what asks a run to stop."""
    ranks: Ranks | None = None

    @property
    def machine(self) -> Path:
        """Where facts about this machine are kept from run to run."""
        return system.program_home(self.environ)


class RunSession:
    """One open run; a context manager that records how it ended.

    Made by `start` or `reopen`. Leaving it by an error records that error; KeyboardInterrupt becomes
    InterruptedRunError, with the command that resumes the run.
    """

    def __init__(self, context: SessionContext, writer: RunWriter, stop: Stop | None) -> None:
        self._context = context
        self._writer = writer
        self._watcher = EventDispatcher(writer.emit, context.on_event)
        self._parent_stop = stop
        self._open = contextlib.ExitStack()
        self.stop: Stop = stop or (lambda: False)

    @classmethod
    def start(
        cls,
        context: SessionContext,
        settings: Mapping[str, Mapping[str, Any]],
        *,
        kind: str = "train",
        parent: tuple[str, Relation] | None = None,
        stop: Stop | None = None,
    ) -> Self:
        """A new run, recorded as running from now on.

        Args:
            settings: By dotted key: value and source.
            kind, parent: As `RunStore.start`.
            stop: The stop request of the session that this one is part of; default: its own, from the context.

        Raises:
            CodedError: As `RunStore.start`.
        """
        writer = context.store.start(
            settings=settings,
            rail=context.rail.name,
            command=context.command,
            versions=system.installed_versions(),
            hardware={
                **system.describe_machine(),
                **system.describe_device(context.rail.probe()),
                **launchers.describe(context.ranks),
            },
            kind=kind,
            parent=parent,
        )
        return cls(context, writer, stop)

    @classmethod
    def reopen(
        cls, context: SessionContext, run_id: str, *, from_step: int, checkpoint: str | None, take_over: bool = False
    ) -> Self:
        """An unfinished run, recorded as running again from now on.

        Raises:
            CodedError: As `RunStore.reopen`, which explains the arguments.
        """
        writer = context.store.reopen(run_id, from_step=from_step, checkpoint=checkpoint, take_over=take_over)
        return cls(context, writer, None)

    @property
    def run_id(self) -> str:
        """The run's id."""
        return self._writer.run_id

    @property
    def folders(self) -> RunFolders:
        """Where the run lives."""
        return replace(self._writer.folders, machine=self._context.machine)

    def use_base(self, base: BaseModel) -> None:
        """Record which weights the run trains on; before anything is emitted.

        Raises:
            ResumeChangedError: It is resumed, and they are not those that it began with.
        """
        self._writer.use_base(base.folder)

    def emit(self, event: Event) -> None:
        """Record, log and show an event.

        Raises:
            CodedError: Recording failed, or the run is resumed and its data or model changed.
        """
        self._watcher.emit(event)

    def track(
        self, settings: Settings, *, name: str | None = None, group: str | None = None, done: int | None = None
    ) -> None:
        """Let the trackers follow the run from now on.

        Args:
            name: The run's name there; default: its id.
            group: The multi-run that it is part of.
            done: Steps that were done before it was resumed; None: it begins.
        """
        tracked = tracker.describe_run(
            self.run_id,
            name,
            settings.to_flat(),
            output=self._context.store.output,
            offline=system.is_offline(self._context.environ),
            environ=self._context.environ,
            done=done,
            group=group,
        )
        self._open.enter_context(tracker.follow(self._context.followers, tracked, self._watcher))

    def train(
        self,
        settings: Settings,
        base: BaseModel,
        rows: Rows,
        *,
        checkpoint: Path | None = None,
        initial_adapter: Path | None = None,
    ) -> TrainOutcome:
        """Train by these settings; the arguments are those of `TrainSpec`.

        Raises:
            CodedError: As `Rail.train`.
        """
        spec = TrainSpec.build(
            settings,
            self.folders,
            base.folder,
            base.commit,
            rows=rows.path,
            rows_commit=rows.commit,
            checkpoint=checkpoint,
            initial_adapter=initial_adapter,
            ranks=self._context.ranks,
        )
        return self._context.rail.train(spec, self.emit, self.stop)

    def publish(self, outcome: TrainOutcome) -> Path:
        """Let ``<output>/lora``, or ``model``, be what came out; says which run's adapter that replaced.

        A stopped run does not replace a finished one: its adapter stays in its own folder.

        Raises:
            CodedError: As `RunStore.publish_adapter`.
        """
        store = self._context.store
        place = store.output / outcome.adapter.name
        if outcome.stopped and place.exists():
            return outcome.adapter
        before = _run_of(place)
        place = store.publish_adapter(self.run_id)
        if before not in (None, self.run_id):
            text = f"{place} now belongs to run {self.run_id} and replaced that of run {before}"
            kept = store.folder(str(before)) / place.name
            hint = _export_hint(store, str(before)) if kept.is_dir() else ""
            self.emit(Notice(message=text + hint, details={"run_id": self.run_id, "replaced": before}))
        return place

    def finish(self, outcome: TrainOutcome) -> RunRecord:
        """Record a run that ended well, or was stopped with its adapter kept."""
        return self._writer.finish(outcome)

    def __enter__(self) -> Self:
        context = self._context
        with contextlib.ExitStack() as stack:
            if self._parent_stop is None:
                stack.enter_context(self._interrupts_coded())
            stack.enter_context(follow_run(self.run_id))
            stack.enter_context(self._writer)
            stack.enter_context(self._hints_named())
            if self._parent_stop is None:
                self.stop = stack.enter_context(context.interrupts())
            stack.enter_context(offline.forbid_network(wanted=system.is_network_forbidden(context.environ)))
            self._open = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool | None:
        return self._open.__exit__(kind, error, trace)

    @contextlib.contextmanager
    def _hints_named(self) -> Iterator[None]:
        """Let hints that mean this run name it: ``backprop replay RUN`` becomes a command to paste."""
        try:
            yield
        except CodedError as error:
            error.hint = name_run(error.hint, self.run_id, self._context.store.output)
            raise

    @contextlib.contextmanager
    def _interrupts_coded(self) -> Iterator[None]:
        try:
            yield
        except KeyboardInterrupt as error:
            ranks = self._context.ranks
            line = resume_line(self.run_id, self._context.store.output, ranks.count if ranks else 1)
            raise InterruptedRunError(
                f"the run {self.run_id} was cut off",
                fix=f"Resume it: {line}",
                details={"run_id": self.run_id},
            ) from error


def name_run(hint: str, run_id: str, output: Path) -> str:
    """A hint with the run's id in place of the word RUN."""
    return wording.name_run(hint, run_id, None if output == Path("output") else output)


def _export_hint(store: RunStore, run_id: str) -> str:
    """How to export the adapter of a run, which is named after its output folder unless that is the default one."""
    name = run_id if store.output == Path("output") else str(store.output / run_id)
    return f"; to export that one: {wording.render(wording.command_ref('export', name))}"


def _run_of(place: Path) -> str | None:
    """The run whose adapter or model is in a folder; None if it does not say."""
    try:
        run_id = read_manifest(place).get("run_id")
    except AdapterInvalidError:
        return None
    return run_id if isinstance(run_id, str) else None
