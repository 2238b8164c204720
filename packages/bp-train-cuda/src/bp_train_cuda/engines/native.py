"""The native engine: builds what `bp_data.loop.loop.run_loop` needs, runs it, and saves what comes out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import set_seed

from bp_data.loop.examples import RowExamples, build_examples
from bp_data.loop.loop import LoopParts, LoopState, run_loop
from bp_data.loop.memory import HALVINGS, MemoryGuard
from bp_data.loop.preflight import is_due
from bp_data.loop.rows import pad_token
from bp_data.loop.run import build_loop, choosing_weights, summarize_run
from bp_data.loop.sampler import ExampleOrder, StepSampler
from bp_data.preparation import AnyPrepared
from bp_runs.events import Emit, Notice
from bp_runs.methods import METHODS
from bp_runs.rail import Stop, TrainOutcome
from bp_runs.spec import TrainSpec
from bp_train_cuda import backend
from bp_train_cuda.backend import TorchMemory
from bp_train_cuda.checkpoint import Checkpointer
from bp_train_cuda.distributed.process_group import ProcessGroup
from bp_train_cuda.distributed.sharding import gather_weights, reshard, shard_model
from bp_train_cuda.engines.base import (
    Loaded,
    answer_prompts,
    close_model,
    open_model,
    save_result,
)
from bp_train_cuda.engines.framework import TorchFramework
from bp_train_cuda.guards.monitor import open_monitor
from bp_train_cuda.memory import planner
from bp_train_cuda.memory.fit import GpuFit
from bp_train_cuda.memory.preflight import run_preflight
from bp_train_cuda.model.activations import untile_feed_forward
from bp_train_cuda.model.log_probs import LogProbModel
from bp_train_cuda.model.lora_linear import use_fast_lora
from bp_train_cuda.model.packing import require_packable
from bp_train_cuda.model.varlen import stop_varlen, use_varlen
from bp_train_cuda.optim import build_optimizer, choose_optimizer, rounds_away

_ROUNDED_AWAY = Notice(
    message="this optimizer rounds small changes of bfloat16 weights away; adamw_8bit and paged_adamw_8bit keep them",
    details={"try": {"training.optim": "adamw_8bit"}},
)


@dataclass(frozen=True, slots=True)
class NativeRun:
    """One training run, from a base model in memory to a saved adapter; `train` runs it."""

    spec: TrainSpec
    prepared: AnyPrepared
    heldout: Sequence[Any]
    emit: Emit
    stop: Stop
    loaded: Loaded
    group: ProcessGroup

    def train(self) -> TrainOutcome:
        """Build what the loop needs, run it, save what comes out."""
        group, mode = self.group, self.loaded.mode
        wrapped, parts, state, fit = self._build()
        save = partial(self._save, wrapped, parts.guard)
        with choosing_weights(parts, state, save, self.spec.folders.run_id):
            run_loop(parts, state)
        folder = save()  # before anything that may still fail
        if group.rank == 0 and not group.is_sharded:
            plan = parts.framework.activations  # type: ignore[attr-defined]
            is_least = plan is None or not plan.has_kept
            fit.remember(
                parts.guard.halvings, parts.framework.peak_memory(), parts.sampler.batch_size, is_least=is_least
            )
        parts.sample(state.step)
        peaks = group.all_gather(parts.framework.peak_memory())
        if group.count > 1:
            shown = ", ".join(f"{one / 2**30:.1f}" for one in peaks)
            self.emit(Notice(message=f"peak memory of each process: {shown} GiB", details={"peaks": peaks}))
        if not group.is_sharded:
            untile_feed_forward(wrapped.model)
            stop_varlen(wrapped.model)
            close_model(wrapped.model, mode)
        return summarize_run(parts, state, folder, max(peaks))

    def _build(self) -> tuple[LogProbModel, LoopParts, LoopState, GpuFit]:
        """The model in memory, and the loop at its first step or where its checkpoint was."""
        spec, group, device = self.spec, self.group, self.loaded.device
        peak = backend.PeakMemory(device)
        model = open_model(spec, self.loaded, self.emit, group)
        # FSDP2 swaps the weights that these would hold on to, and Unsloth has its own forms of all of them.
        is_plain = not group.is_sharded and spec.training.engine != "unsloth"
        if self.loaded.mode.name != "full" and is_plain:
            use_fast_lora(model)
        wrapped = LogProbModel(model)
        packing = use_varlen(model) if is_plain and METHODS[spec.training.method].loss is None else None
        lays_flat = packing is not None
        if packing is None and spec.training.packing:
            packing = require_packable(model)
        if group.is_sharded:
            shard_model(wrapped, model, self.loaded.base, device.kind)
        sample = partial(self._answer, wrapped)
        if spec.checkpoint is None:
            sample(0)
        if group.count > 1:
            set_seed(spec.training.seed + group.rank)  # dropout differs from rank to rank
        fit = GpuFit(spec, self.loaded.mode.name, device, self.emit)
        framework = self._build_framework(wrapped, peak)
        if packing is not None:
            framework.pack_arguments, framework.lays_flat = packing.arguments, lays_flat
            for examples in (framework.examples, framework.heldout):
                if isinstance(examples, RowExamples):
                    examples.flat = "ragged" if lays_flat else "packs"
        together, halvings = self._plan(model, framework)
        parts, state, saver = self._build_loop(framework, sample, fit, together, halvings)
        self._start(parts, framework)
        saver.restore()
        return wrapped, parts, state, fit

    def _build_framework(self, wrapped: LogProbModel, peak: backend.PeakMemory) -> TorchFramework:
        training, prepared, loaded = self.spec.training, self.prepared, self.loaded
        build = partial(
            build_examples, training.method, pad_id=pad_token(prepared), room=prepared.max_seq_length,
            seed=training.seed,
        )  # fmt: skip
        if self.group.is_sharded:
            reshard(wrapped)  # sample answers left unsharded weights in their place, which no step would update
        name = choose_optimizer(training, loaded.mode, loaded.device, is_sharded=self.group.is_sharded)
        optimizer = build_optimizer(name, wrapped.model, training)
        if rounds_away(optimizer):
            self.emit(_ROUNDED_AWAY)
        wrapped.train()
        return TorchFramework(
            model=wrapped,
            examples=build(rows=prepared.rows, packing=training.packing),
            heldout=build(rows=self.heldout) if len(self.heldout) else None,
            training=training,
            group=self.group,
            reader=MemoryGuard(TorchMemory(), self.emit, enabled=training.oom_recovery),
            device=torch.device(loaded.device.kind),
            autocast=loaded.autocast,
            peak=peak,
            # 4-bit layers never cast under autocast; DoRA measures norms in its input's dtype.
            plain_inputs=loaded.mode.name == "lora" and not self.spec.lora.use_dora,
            optimizer=optimizer,
        )

    def _plan(self, model: Any, framework: TorchFramework) -> tuple[int, int]:
        """Plan the GPU's memory: how many micro-batches of a step run as one, and how often that one is halved."""
        if self.group.is_sharded or self.spec.training.engine == "unsloth":
            return 1, 0
        training = self.spec.training
        plan = framework.activations = planner.plan_activations(self.spec, self.loaded.mode.name, model)
        lengths = framework.examples.lengths()
        if plan is None or not len(lengths):
            return 1, 0
        # Ranks must agree on it, and packs joined to one row would need a larger mask.
        alone = self.group.count == 1 and (framework.lays_flat or not training.packing)
        together = planner.choose_rows(self.spec, plan, lengths) if alone else 1
        larger = min(max(lengths), int(2 * sum(lengths) / len(lengths))) * METHODS[training.method].completions
        most = 0 if training.packing or not training.oom_recovery else HALVINGS
        halvings = planner.choose_halvings(plan, together * training.batch_size, larger, most)
        self.emit(planner.describe_plan(self.spec, plan, together, halvings, lengths))
        return together, halvings

    def _build_loop(
        self, framework: TorchFramework, sample: Any, fit: GpuFit, together: int, halvings: int
    ) -> tuple[LoopParts, LoopState, Checkpointer]:
        spec, training, group = self.spec, self.spec.training, self.group
        rows = training.batch_size * together
        guard = MemoryGuard(
            framework,
            self.emit,
            enabled=training.oom_recovery,
            halvings=max(halvings, fit.recall_halvings(rows)),
            most=HALVINGS + together.bit_length() - 1,
            has_dropout=self.loaded.mode.name != "full" and spec.lora.dropout > 0,
        )
        monitor = open_monitor(training, self.loaded.device, self.emit, self.stop)
        order = ExampleOrder(framework.examples.count, training.seed, shuffled=training.curriculum == "none")
        accumulation = training.gradient_accumulation // together
        sampler = StepSampler(order, rows, accumulation, rank=group.rank, ranks=group.count)
        return build_loop(
            framework,
            spec,
            guard,
            sampler,
            lambda state, validator: Checkpointer(
                spec, self.emit, framework, state, validator=validator, guard=guard, group=group
            ),
            monitor=monitor,
            group=group,
            emit=self.emit,
            stop=self.stop,
            sample=sample,
        )

    def _start(self, parts: LoopParts, framework: TorchFramework) -> None:
        """Measure the reference of methods that have one, and run the preflight."""
        framework.measure_references(parts.sampler, parts.steps, self.emit)
        if is_due(self.spec, on_gpu=self.loaded.device.kind == "cuda"):
            run_preflight(self.spec, parts, framework)

    def _answer(self, wrapped: LogProbModel, step: int) -> None:
        """Sample answers; with sharded weights all ranks generate together, else the main process alone."""
        if self.group.rank == 0 or self.group.is_sharded:
            generate = wrapped.generate if self.group.is_sharded else None
            answer_prompts(self.spec, self.prepared, wrapped.model, self.emit, step=step, generate=generate)

    def _save(self, wrapped: LogProbModel, guard: MemoryGuard) -> Path:
        weights = None
        if self.group.is_sharded:
            dtype = backend.choose_dtype(self.spec.model.dtype, backend.choose_device())  # before it became float32
            weights = partial(_gather, wrapped, dtype)
        return save_result(
            self.spec,
            self.prepared,
            wrapped.model,
            self.loaded,
            self.emit,
            heldout=self.heldout,
            guard=guard,
            group=self.group,
            weights=weights,
        )


def _gather(wrapped: LogProbModel, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    return {name.removeprefix("model."): weight for name, weight in gather_weights(wrapped, dtype).items()}
