"""The facade: three lines from a data file to a GGUF.

trainer = Trainer("Qwen/Qwen2.5-7B-Instruct")
trainer.train("my_data.jsonl", steps=100)
trainer.export("gguf", quantization="q4_k_m")
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack

from backpropagate import catalogue, memory_estimate, presets, rails, resume_plan, system, warm_start
from backpropagate.data_input import Data, is_in_memory, is_loaded_model, save_model, snapshot
from backpropagate.distributed import launchers
from backpropagate.errors import MainProcessError, RailUnusableError
from backpropagate.event_dispatch import Callback, join_listeners, listener
from backpropagate.exporting import ExportResult, export_adapter, find_base_folder, push_model, warn_unexportable
from backpropagate.interrupts import Interrupts, no_interrupts
from backpropagate.keywords import (
    MetricName,
    QuantizationName,
    RunKeywords,
    StreamKeywords,
    TrainerKeywords,
    TrainKeywords,
)
from backpropagate.python_progress import open_progress
from backpropagate.results import TrainResult
from backpropagate.run_hints import resume_line
from backpropagate.session import RunSession, SessionContext
from backpropagate.settings import (
    TOML_FILE,
    Resolved,
    all_settings,
    by_short_name,
    from_record,
    overlay,
    resolve,
    with_output,
)
from backpropagate.signatures import shows_keywords
from backpropagate.trackers import tracker
from bp_runs.adapter import read_adapter_folder, read_manifest
from bp_runs.checkpoint_store import CheckpointFolder
from bp_runs.errors import (
    CodedError,
    ContractError,
    InvalidSettingError,
    OutputTakenError,
    ResumeChangedError,
    ResumeNotFoundError,
)
from bp_runs.events import Notice
from bp_runs.files import coded_disk_errors
from bp_runs.paths import ADAPTER_NAME, MODEL_NAME, result_name
from bp_runs.rail import LoadsModels, Rail, TrainOutcome
from bp_runs.record import Relation, RunRecord
from bp_runs.spec import Ranks, RunFolders, Settings, TrainSpec
from bp_runs.store import RunStore

if TYPE_CHECKING:
    from backpropagate.continual.multirun import MultiRun, MultiRunResult
    from backpropagate.evaluation.compare import Metric
    from backpropagate.evaluation.evaluate import EvalResult
    from bp_data.preparation import AnyPrepared
    from bp_export import Format, ViaChoice
    from bp_export.hub import PushOutcome
    from bp_runs.proof import Proof
    from bp_runs.rail import MemoryEstimate

_log = logging.getLogger("backpropagate")


_DATA_NAMES = frozenset(all_settings()["data.path"].words)


class Trainer:
    """Trains adapters on one base model and exports them.

    Args:
        model: A Hugging Face folder or Hub id; or a loaded transformers model, which is saved to
            ``<output>/snapshots`` first. Default: the setting ``model.name``.
        tokenizer: Of a loaded model; default: the files that it was loaded with.
        output: Output folder; default: the setting ``training.output_dir``.
        rail: Train on this rail instead of one that is found; for tests and rails of one's own.
        command: What was typed, for the record.
        defaults: Settings by short name that take the place of their own defaults.
        ranks: The place of this process among several that a launcher started, from `take_ranks`; None: it works alone.
        interrupts: Opens what asks a run to stop, while it is under way: `on_interrupt` lets the first Ctrl-C finish
            the step and save. Default: nothing does, and no signal handler is installed.
        progress: Whether training shows its progress: a bar on a terminal, a panel in a notebook. Default: there.
        **flags: Settings by short name, as the CLI's flags with underscores: ``lora_r=16``, ``lr=1e-4``.

    Raises:
        UserError: A setting is unknown or has a value that it cannot take.

    No call changes the environment, installs a signal handler without being told to, or ends the process.
    """

    @shows_keywords(TrainerKeywords)
    def __init__(
        self,
        model: str | Path | Any | None = None,
        *,
        tokenizer: Any = None,
        output: str | Path | None = None,
        rail: Rail | None = None,
        command: Sequence[str] = (),
        defaults: Mapping[str, Any] | None = None,
        ranks: Ranks | None = None,
        interrupts: Interrupts = no_interrupts,
        progress: bool | None = None,
        **flags: Unpack[TrainerKeywords],
    ) -> None:
        data = {name: value for name, value in flags.items() if name in _DATA_NAMES}
        if tokenizer is not None and not is_loaded_model(model):
            raise InvalidSettingError(
                "a tokenizer goes with a model that is loaded, and the model is a name",
                fix="Pass the loaded model too, or neither: the tokenizer is read from the model's files.",
            )
        name = None if is_loaded_model(model) else model
        self._flags = {"model": name, "output": output, **{k: v for k, v in flags.items() if k not in data}}
        self._rail = rail
        self._command = tuple(command)
        self._defaults = dict(defaults or {})
        self._ranks = ranks
        self._interrupts = interrupts
        self._progress = progress
        self.settings = self._resolve({}).settings  # which names the output folder, where examples are written
        if name is not model:
            self._flags["model"] = save_model(model, tokenizer, self.output)
        if data or name is not model:
            self._flags |= self._all_written(data)
            self.settings = self._resolve({}).settings
        self.last: TrainResult | None = None
        self._loaded: tuple[int, tuple[Any, Any]] | None = None

    @property
    def output(self) -> Path:
        """The output folder."""
        return system.to_path(self.settings.training.output_dir)

    @property
    def is_main_process(self) -> bool:
        """Whether this process is the one of several that exports and talks to the user; True for one alone."""
        return self._ranks is None or self._ranks.rank == 0

    @shows_keywords(TrainKeywords)
    def train(
        self,
        data: Data | None = None,
        *,
        resume_run: str | None = None,
        on_event: Callback | None = None,
        callback: Callback | None = None,
        **flags: Unpack[TrainKeywords],
    ) -> TrainResult:
        """Train an adapter and leave it at ``<output>/lora``.

        Of several processes that torchrun or accelerate launch started, all make this call, train together and get the
        same result; see the argument ``ranks`` of `Trainer`.

        Args:
            data: A file, a folder or a Hub dataset; or the examples themselves: a list of dicts, a generator, a
                `datasets.Dataset` or a DataFrame, which is written to ``<output>/snapshots``. Default: the setting
                ``data.path``.
                With the setting ``resume`` unset, an unfinished run of the same settings is continued.
            resume_run: Resume this unfinished run, by part of its id; settings that are given must agree with it.
            on_event: Called with every event of the run, after it is recorded; or an object with methods such as
                ``on_step`` and ``on_eval``, see `backpropagate.event_dispatch.Callback`.
            callback: As ``on_event``, its name in backpropagate 1.x.
            **flags: Settings for this run, over the Trainer's own.

        Raises:
            CodedError: Bad input, before a run is recorded; or a failure, recorded with the run.
            MainProcessError: In a process that is not the main one: there the call failed.
        """
        on_event = on_event or callback
        with self._main_process() as is_main:
            if not is_main:
                return self._newest_result()
            resolved = self._resolve({"data": data, **flags})
            self.settings = resolved.settings
            store = RunStore(self.output)
            resolved = warm_start.settle_start(resolved, store.output, self._rail)
            plan = self._choose(store, resolved, resume_run)
            if plan is None:
                return self._train(store, resolved, on_event)
            try:
                return self._train(store, plan.resolved, on_event, plan)
            except ResumeChangedError as error:
                if resolved.settings.training.resume:
                    raise
                _log.warning("the run %s cannot go on, a new one begins: %s", plan.record.run_id, error.cause)
                return self._train(store, resolved, on_event)

    def resume(
        self,
        run: str | None = None,
        *,
        take_over: bool = False,
        on_event: Callback | None = None,
    ) -> TrainResult:
        """Continue an unfinished run or multi-run by its record; a run from its newest whole checkpoint.

        Args:
            run: Its id or a part of it; None: the newest unfinished one.
            take_over: Continue although the record says that another machine works on it.
            on_event: Called with every event, after it is recorded.

        Raises:
            ResumeNotFoundError: There is none, or it cannot be continued.
            ResumeChangedError: Its data, template or model has changed; the run is left as it stood.
            CodedError: As `train`.
        """
        with self._main_process() as is_main:
            if not is_main:
                return self._newest_result()
            store = RunStore(self.output)
            record = resume_plan.find_record(store, run)
            if record.kind == "multi-run":
                self.multi_run(resume=record.run_id, on_event=on_event)
                return self._newest_result()
            plan = resume_plan.prepare(store, record)
            return self._train(store, plan.resolved, on_event, plan, take_over=take_over)

    @shows_keywords(RunKeywords)
    def replay(
        self,
        run: str,
        *,
        overrides: Mapping[str, Any] | None = None,
        on_event: Callback | None = None,
        **flags: Unpack[RunKeywords],
    ) -> TrainResult:
        """Do a recorded run again as a new one, its child, with some settings changed.

        Args:
            run: Its id or a part of it.
            overrides: By any name of a setting, also as text: ``{"lr": 1e-4, "lora.r": "8"}``.
            on_event: Called with every event, after it is recorded.
            **flags: Settings to change, over ``overrides``: ``lr=1e-4``.

        Raises:
            CodedError: As `train`; or an override that names no setting.
        """
        with self._main_process() as is_main:
            if not is_main:
                return self._newest_result()
            store = RunStore(self.output)
            record = store.load(run)
            if record.kind != "train" or record.is_imported:
                raise ResumeNotFoundError(f"the record of the run {record.run_id} has not all that it was made with")
            return self._train(
                store, from_record(record, self._all_written({**(overrides or {}), **flags})), on_event, parent=record
            )

    def extend(self, run: str, *, steps: int, on_event: Callback | None = None) -> TrainResult:
        """Train a finished run for more steps, as a new run that starts from its newest weights.

        The schedule is planned again for these steps, and the optimizer starts fresh; a notice says so. To finish an
        interrupted run by its own schedule, use `resume`.

        Args:
            run: Its id or a part of it.
            steps: So many more.
            on_event: Called with every event, after it is recorded.

        Raises:
            AdapterSelectionError: The run can't be extended, or has left no weights.
            CodedError: As `train`.
        """
        with self._main_process() as is_main:
            if not is_main:
                return self._newest_result()
            store = RunStore(self.output)
            record = store.load(run)
            resolved, notice = warm_start.plan_extension(store, run, steps, self._rail)
            return self._train(store, resolved, on_event, parent=record, relation="extend", notice=notice)

    @contextlib.contextmanager
    def _main_process(self) -> Iterator[bool]:
        """Whether this process carries the call out: alone, or as the main one. Others train along in the meantime."""
        launchers.require_given(self._ranks, os.environ)
        ranks = self._ranks = launchers.count_call(self._ranks)
        if ranks is None or not ranks.rank:
            with launchers.leading(ranks):
                yield True
            return
        with self._interrupts() as stop:
            folders = launchers.follow(ranks, stop)
        self.last = _read_result(folders, ranks)
        yield False

    def _newest_result(self) -> TrainResult:
        if self.last is None:
            raise ContractError("the call has left no result")
        return self.last

    def _choose(self, store: RunStore, resolved: Resolved, run: str | None) -> resume_plan.ResumePlan | None:
        """The run to resume: the named one, or the one that the setting ``resume`` means; None to begin a new one."""
        resume = resolved.settings.training.resume
        if run is None and resume is None:
            return resume_plan.find_same(store, resolved, self._ranks.count if self._ranks else 1)
        if run is None and not resume:
            return None
        record = resume_plan.find_record(store, run)
        if record.kind != "train":
            line = resume_line(record.run_id, store.output)
            raise ResumeNotFoundError(f"the newest unfinished run, {record.run_id}, is a multi-run", fix=line)
        found = resume_plan.prepare(store, record)
        resume_plan.require_same(resolved, found.resolved, found.record.run_id)
        return found

    def _train(
        self,
        store: RunStore,
        resolved: Resolved,
        on_event: Callback | None,
        plan: resume_plan.ResumePlan | None = None,
        *,
        parent: RunRecord | None = None,
        relation: Relation = "replay",
        notice: Notice | None = None,
        take_over: bool = False,
    ) -> TrainResult:
        resolved = replace(resolved, settings=with_output(resolved.settings, store.output))
        settings = resolved.settings
        pinned = resume_plan.pin(settings, plan.record if plan else parent)
        rows = catalogue.find_rows(pinned.data, os.environ, offline=system.is_offline(os.environ))
        context = self._open_context(store, settings, on_event)
        launchers.require_together(context.rail, self._ranks)
        store.require_own_adapter(result_name(resolved.to_record()))
        base = _find_base(context.rail, pinned)
        if plan is None:
            remarks: list[Notice] = [notice] if notice else []
            made_by = warm_start.parent_of(settings.training.start_from, base.folder)
            if parent is None:
                resolved, chosen = memory_estimate.settle_lora(resolved, context.rail, base.folder, context.machine)
                remarks += presets.remarks(settings.model.name, chosen)
            else:
                remarks += resume_plan.base_notices(parent, base.folder)
            origin: tuple[str, Relation] | None = (made_by, "from") if made_by else None
            origin = (parent.run_id, relation) if parent else origin
            session = RunSession.start(context, resolved.to_record(), parent=origin)
        else:
            remarks = plan.notices(system.installed_versions())
            session = _reopen(context, plan, take_over=take_over)
        self.settings = settings = resolved.settings
        checkpoint = plan.checkpoint.path if plan and plan.checkpoint else None
        with session as run:
            run.use_base(base)
            run.track(settings, name=settings.training.run_name, done=plan.step if plan else None)
            for remark in remarks:
                run.emit(remark)
            start = None if checkpoint or settings.training.start_from is None else Path(settings.training.start_from)
            outcome = run.train(settings, base, rows, checkpoint=checkpoint, initial_adapter=start)
            adapter = run.publish(outcome)
            record = run.finish(outcome)
        self.last = TrainResult(run_id=run.run_id, adapter=adapter, outcome=outcome, record=record, output=store.output)
        return self.last

    def _open_context(self, store: RunStore, settings: Settings, on_event: Callback | None) -> SessionContext:
        return SessionContext(
            store=store,
            rail=self._rail or rails.choose_rail(settings.training.backend),
            environ=os.environ,
            command=self._command,
            followers=tracker.choose_trackers(settings.training.report_to, os.environ),
            on_event=join_listeners(listener(on_event), open_progress(self._progress)),
            interrupts=self._interrupts,
            ranks=self._ranks,
        )

    @shows_keywords(StreamKeywords)
    def multi_run(
        self,
        data: Data | Sequence[str | Path] | None = None,
        *,
        resume: str | None = None,
        on_event: Callback | None = None,
        **flags: Unpack[StreamKeywords],
    ) -> MultiRunResult:
        """Train several runs, each from the one before, and leave their merged adapter at ``<output>/lora``.

        Args:
            data: Data as for `train`, which is cut into slices; or a list of files, one for each run. Default: the
                setting ``data.path``.
            resume: Resume this unfinished multi-run, by its id or a part of it; ``newest`` for the newest one.
            on_event: Called with every event of the multi-run and of its runs.
            **flags: Settings for it, over the Trainer's own: ``runs=3``, ``replay_share=0.05``.

        Raises:
            CodedError: Bad input, before a run is recorded; or a failure, recorded with the run.
        """
        from backpropagate.continual.multirun import check_settings, find_multi_run, read_settings

        launchers.require_given(self._ranks, os.environ)
        launchers.require_one("a multi-run", self._ranks)
        given = by_short_name({"data": self._written(data), **self._all_written(flags)})
        data = given.pop("data", None)
        paths = [data] if isinstance(data, str | Path) else list(data or [])
        resolved = self._resolve({"data": paths[0] if paths else None, **given})
        store = RunStore(system.to_path(resolved.settings.training.output_dir))
        store.require_own_adapter()
        run_id = None if resume is None else find_multi_run(store, resume)
        if run_id is None:
            settings = check_settings(resolved.settings, len(paths))
            sources = _find_sources(settings, paths or [settings.data.path])
        else:
            settings, sources = with_output(read_settings(store.load(run_id)), store.output), []
        stream = self._build_multi_run(store, replace(resolved, settings=settings), on_event, run_id)
        result = stream.start(sources) if run_id is None else stream.resume(run_id)
        self.last = TrainResult(
            run_id=result.run_id,
            adapter=result.adapter,
            outcome=result.outcome,
            record=result.record,
            output=store.output,
        )
        return result

    def _build_multi_run(
        self,
        store: RunStore,
        resolved: Resolved,
        on_event: Callback | None,
        run_id: str | None,
    ) -> MultiRun:
        """All that a multi-run needs besides its rows; ``run_id``: of one that is resumed."""
        from backpropagate.continual.multirun import MultiRun, first_member

        settings = resolved.settings
        context = self._open_context(store, settings, on_event)
        pinned = settings if run_id is None else resume_plan.pin(settings, first_member(store, run_id))
        base, chosen = _find_base(context.rail, pinned), ""
        if run_id is None:  # else ranks stay what they were, whatever is free on the GPU now
            resolved, chosen = memory_estimate.settle_lora(resolved, context.rail, base.folder, context.machine)
        self.settings = settings = resolved.settings
        return MultiRun(
            context=context,
            base=base,
            settings=settings,
            record=resolved.to_record(),
            remarks=presets.remarks(settings.model.name, chosen),
        )

    def export(
        self,
        format: Format = "gguf",
        *,
        quantization: QuantizationName | None = None,
        output: str | Path | None = None,
        output_dir: str | Path | None = None,
        via: ViaChoice | None = None,
        verify: bool | None = None,
        ollama_name: str | None = None,
        force: bool = False,
        progress: Callable[[int, int], None] | None = None,
    ) -> ExportResult:
        """Export the newest adapter of the output folder, or in full fine-tuning the newest model.

        Args:
            format: One of `bp_export.Format`: ``gguf``, ``merged``, ``lora`` …
            quantization: The GGUF's type, one of `bp_export.QUANTIZATIONS`; None for ``q4_k_m``.
            output: The file (GGUF) or folder to write; default: next to the adapter.
            output_dir: As ``output``, its name in backpropagate 1.x.
            via: What writes a GGUF: ``native``, ``llama.cpp`` (its own converter), or ``auto``, as None: llama.cpp for
                classes without a native layout.
            verify: Whether to compare a GGUF with the model in llama.cpp; None for where that is installed.
            ollama_name: Register the GGUF with a running Ollama under this name.
            force: Whether an earlier export, and a model of that name in Ollama, may be replaced.
            progress: Called with bytes written and bytes in all.

        Raises:
            CodedError: Bad input or a failed export; nothing half-written is left.
        """
        launchers.require_main("an export", self._ranks)
        return export_adapter(
            self._newest(),
            format,
            quantization=quantization,
            output=None if (place := output or output_dir) is None else Path(place),
            via=via,
            verify=verify,
            ollama_name=ollama_name,
            force=force,
            progress=progress,
        )

    def evaluate(
        self,
        data: Data | None = None,
        *,
        adapter: str | Path | None = None,
        against: str | Path | None = None,
        answers: int = 20,
        answer_tokens: int = 128,
        metrics: Sequence[MetricName | Metric] | Mapping[str, Metric] = ("exact", "f1", "contains"),
        pattern: str | None = None,
        seed: int = 0,
        on_event: Callback | None = None,
    ) -> EvalResult:
        """Measure an adapter against its base, or against another adapter, on rows that it was not trained on.

        Args:
            data: The rows; default: those that the adapter's run held out.
            adapter: An adapter folder, or a run of the output folder; default: the newest adapter.
            against: As ``adapter``: compare with this one instead of the base.
            answers: So many rows are answered by both; 0: only the loss is measured.
            answer_tokens: Longest answer, in tokens.
            metrics: How answers are scored: built-in names, and functions of your own that take an answer and its
                reference and return a number, higher is better; or functions by name: ``{"rhymes": rhymes}``.
            pattern: A regular expression that a right answer matches; one more metric.
            seed: Of the interval, which is found by resampling.
            on_event: Called with every event.

        Raises:
            CodedError: As `evaluate_adapter`.
        """
        from backpropagate.evaluation.evaluate import evaluate_adapter

        launchers.require_main("an evaluation", self._ranks)
        newest = self.last.adapter if self.last else None
        return evaluate_adapter(
            None if (adapter or newest) is None else str(adapter or newest),
            output=self.output,
            data=None if (rows := self._written(data)) is None else Path(rows),
            against=None if against is None else str(against),
            answers=answers,
            answer_tokens=answer_tokens,
            metrics=metrics,
            pattern=pattern,
            seed=seed,
            rail=self._rail,
            emit=listener(on_event) or (lambda _: None),
        )

    def prove(self, run: str | None = None, *, steps: int = 10) -> Proof:
        """Replay a run's first steps in an independent loop of plain PyTorch, and compare the losses.

        The proof is kept in the run's folder as ``prove.json``; a model card made from the run quotes it.

        Args:
            run: Its id or a part of it; default: the newest run.
            steps: Optimizer steps to replay; at most those that the run recorded.

        Raises:
            ProofUnsupportedError: The independent loop can't repeat the run, or its data changed.
            CodedError: The run, its base or its data can't be used.
        """
        from backpropagate.proof import prove_run

        return prove_run(RunStore(self.output), run, steps=steps, rail=self._rail)

    @shows_keywords(TrainKeywords)
    def validate(self, data: Data | None = None, **flags: Unpack[TrainKeywords]) -> AnyPrepared:
        """Read, tokenize and mask the data as `train` would, without loading the model.

        Returns:
            The rows with their masks, their ledger (read, whole, truncated, dropped and why), and tokens counted.

        Raises:
            CodedError: The data or the settings cannot be used; nothing is recorded.
        """
        from bp_data import PrepareRequest, prepare

        settings = self._resolve({"data": data, **flags}).settings
        rows = catalogue.find_rows(settings.data, os.environ, offline=system.is_offline(os.environ))
        return prepare(PrepareRequest.from_settings(settings, rows.path, catalogue.find_tokenizer(settings)))

    @shows_keywords(RunKeywords)
    def estimate_vram(self, *, memory: int | None = None, **flags: Unpack[RunKeywords]) -> MemoryEstimate:
        """The GPU memory that `train` would need, from the model's shapes alone, in bytes.

        Args:
            memory: Bytes of the GPU; default: what is free on this machine's, where there is one.
            **flags: Settings, over the Trainer's own.

        Raises:
            CodedError: As `backpropagate.memory_estimate.estimate_memory`.
        """
        from backpropagate.memory_estimate import estimate_memory

        return estimate_memory(self._resolve({**flags}).settings, memory=memory or rails.free_memory())

    def push(
        self,
        repo: str,
        source: str | Path | None = None,
        *,
        base: str | Path | None = None,
        private: bool = False,
        force: bool = False,
        revision: str | None = None,
        message: str | None = None,
        token: str | None = None,
        endpoint: str | None = None,
    ) -> PushOutcome:
        """Upload the newest adapter, or an adapter, model or GGUF that is named, with a model card.

        Args:
            repo: ``owner/name``.
            source: What to upload; default: the newest adapter.
            base: The base model's folder or Hub id, where the adapter does not say it.
            private: Whether a new repository is private.
            force: Whether files of the repository may be replaced, by a new commit.
            revision: The branch; default: the main one.
            message: The commit's message.
            token: A token with write access; default: the one of `hf auth login`.
            endpoint: The Hub's address; default: the library's own.

        Raises:
            CodedError: As `bp_export.hub.push`.
        """
        launchers.require_main("an upload", self._ranks)
        return push_model(
            Path(source) if source else self._newest(),
            repo,
            base=base,
            private=private,
            force=force,
            revision=revision,
            message=message,
            token=token,
            endpoint=endpoint,
        )

    def save(self, folder: str | Path) -> Path:
        """Copy the newest adapter, or model after full fine-tuning, to a folder of its own; returns that folder.

        Raises:
            AdapterInvalidError: Nothing has been trained yet.
            OutputTakenError: The folder holds something already.
        """
        target = Path(folder)
        source = read_adapter_folder(self._newest()).path
        if target.exists() and any(target.iterdir()):
            raise OutputTakenError(f"{target} is not empty", fix="Name another folder.")
        with coded_disk_errors(target):
            shutil.copytree(source, target, dirs_exist_ok=True)
        return target

    def chat(self, prompt: str, *, system: str | None = None, max_tokens: int = 512, temperature: float = 0.7) -> str:
        """Answer one prompt with the newest adapter in llama.cpp, as `backprop chat --prompt` does.

        Args:
            prompt: What to ask.
            system: A system message.
            max_tokens: Longest answer, in tokens.
            temperature: 0: always the likeliest token.

        Raises:
            CodedError: As `bp_export.chat.open_session`: nothing is trained yet, or llama.cpp is not installed.
        """
        from bp_export.chat import ChatOptions, ask_once, open_session

        options = ChatOptions(system=system, max_tokens=max_tokens, temperature=temperature)
        adapter = self._newest()
        with open_session(adapter, base=find_base_folder(adapter, None)) as session:
            return "".join(ask_once(session, prompt, options))

    @property
    def model(self) -> Any:
        """The trained model for inference in your own code: the base with the newest adapter, in eval mode.

        Loaded on first use, and again after another training; a transformers or PEFT model on the CUDA rail.

        Raises:
            RailUnusableError: The backend cannot hand a model over.
            CodedError: Nothing has been trained yet, or the model cannot be loaded.
        """
        return self._load()[0]

    @property
    def tokenizer(self) -> Any:
        """The tokenizer of `model`."""
        return self._load()[1]

    def _load(self) -> tuple[Any, Any]:
        newest = self._newest()
        if self._loaded is not None and self._loaded[0] == self._trained_at(newest):
            return self._loaded[1]
        rail = self._rail or rails.choose_rail(self.settings.training.backend)
        if not isinstance(rail, LoadsModels):
            raise RailUnusableError(f"the backend {rail.name} cannot hand a model over")
        is_full = self.settings.training.mode == "full"
        base = newest if is_full else _find_base(rail, self.settings).folder
        folders = RunFolders(run_id="inference", output=self.output, run=self.output)
        loaded = rail.load(TrainSpec.build(self.settings, folders, base), None if is_full else newest)
        self._loaded = (self._trained_at(newest), loaded)
        return loaded

    @staticmethod
    def _trained_at(folder: Path) -> int:
        """What changes when a folder's weights are trained again."""
        return read_adapter_folder(folder).path.stat().st_mtime_ns

    def __repr__(self) -> str:
        trained = "nothing trained yet" if self.last is None else repr(self.last)
        return f"Trainer({self.settings.model.name!r}, output={str(self.output)!r}: {trained})"

    @property
    def runs(self) -> RunStore:
        """The runs of the output folder: ``list_runs()``, ``load(run_id)``, ``read_metrics(run_id)`` …"""
        return RunStore(self.output)

    def _newest(self) -> Path:
        name = MODEL_NAME if self.settings.training.mode == "full" else ADAPTER_NAME
        return self.last.adapter if self.last else self.output / name

    def _resolve(self, flags: Mapping[str, Any]) -> Resolved:
        given = {name: value for name, value in self._all_written(flags).items() if value is not None}
        return resolve(overlay(self._flags, given), os.environ, Path(TOML_FILE), self._defaults)

    def _all_written(self, flags: Mapping[str, Any]) -> dict[str, Any]:
        """Settings with examples in memory replaced by their files, so that no message can hold the examples."""
        output = flags.get("output")
        return {k: self._written(v, output) if k in _DATA_NAMES else v for k, v in flags.items()}

    def _written(self, data: Any, output: str | Path | None = None) -> Any:
        """``data``, or the file that its examples were written to."""
        return snapshot(data, self.output if output is None else system.to_path(output)) if is_in_memory(data) else data


def _read_result(folders: RunFolders | None, ranks: Ranks) -> TrainResult:
    """What the main process recorded of the run that all ranks have trained.

    Raises:
        MainProcessError: It began none, or the run did not end well.
    """
    which = f"process {ranks.rank} of {ranks.count} trained along"
    if folders is None:
        raise MainProcessError(f"{which}, and the main process began no run")
    record = RunStore(folders.output).load(folders.run_id)
    if not record.result:
        error = (record.error or {}).get("message")
        raise MainProcessError(f"{which}, and the run {record.run_id} is {record.status}", cause=error)
    outcome = TrainOutcome.from_dict(record.result)
    place = folders.output / outcome.adapter.name
    is_published = read_manifest(place).get("run_id") == record.run_id
    return TrainResult(
        run_id=record.run_id,
        adapter=place if is_published else outcome.adapter,
        outcome=outcome,
        record=record,
        output=folders.output,
    )


def _find_sources(settings: Settings, paths: Sequence[str | Path]) -> list[Path]:
    """Where the rows of a multi-run's data sets are, fetched where they are the Hub's."""
    is_offline = system.is_offline(os.environ)
    asked = [replace(settings.data, path=str(path)) for path in paths]
    return [catalogue.find_rows(data, os.environ, offline=is_offline).path for data in asked]


def _reopen(context: SessionContext, plan: resume_plan.ResumePlan, *, take_over: bool) -> RunSession:
    name = plan.checkpoint.path.name if plan.checkpoint else None
    session = RunSession.reopen(context, plan.record.run_id, from_step=plan.step, checkpoint=name, take_over=take_over)
    with contextlib.suppress(CodedError):  # where it cannot be noted, it is reported all the same
        CheckpointFolder(session.folders.run).note_damage(plan.damaged)
    return session


def _find_base(rail: Rail, settings: Settings) -> catalogue.BaseModel:
    """The base model on disk; rejected before its weights are fetched where the rail cannot train it."""
    find = partial(
        catalogue.find_model,
        settings.model.name,
        revision=settings.model.revision,
        offline=system.is_offline(os.environ),
        with_code=settings.model.trust_remote_code,
    )
    folder = find(need=catalogue.TOKENIZER).folder
    rail.check(settings, folder)
    warn_unexportable(folder)
    return find()
