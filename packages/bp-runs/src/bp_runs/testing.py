"""A rail for tests of everything but training: it learns nothing, in milliseconds, and keeps every contract."""

from __future__ import annotations

import hashlib
import random
import struct
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import orjson

from bp_runs.adapter import CONFIG_FILE, WEIGHTS_FILE, add_to_manifest, write_manifest
from bp_runs.checkpoint_store import Reason
from bp_runs.errors import CodedError, NothingHeldOutError
from bp_runs.events import (
    AdapterSaved,
    DataReady,
    Emit,
    ModelLoaded,
    Notice,
    RowCounts,
    RunPlanned,
    SampleAnswer,
    StepDone,
)
from bp_runs.files import publish_folder, sha256_file
from bp_runs.metrics import LossEnds
from bp_runs.rail import EvalOutcome, Part, Probe, RowOutcome, Stop, TrainOutcome
from bp_runs.save import SaveSchedule, save_checkpoint
from bp_runs.spec import Settings, TrainSpec
from bp_runs.witness import WITNESS_FILE, BaseFacts, Witness, WitnessPrompt, write_witness

_STATE_FILE = "losses.json"
FAKE_MODULE = "base_model.model.model.layers.0.self_attn.q_proj"


@dataclass(frozen=True, slots=True, kw_only=True)
class FakeRail:
    """Emits what a real rail emits, with a loss of 4 / (step + 1), and writes a valid adapter.

    Its weights are the initial adapter's, or else zeros, changed by the seed; it measures a loss of 1 to 2 that
    depends on the adapter's and the rows' bytes alone.

    Args:
        width: d_in and d_out of the one adapted module.
        usable: What the probe says.
        fail_at: The step before which ``failure`` is raised; 0: never.
        failure: The error to raise.
        judge: Says the loss of an adapter (None: the base alone) on a data file instead.
    """

    name: str = "fake"
    width: int = 8
    usable: bool = True
    fail_at: int = 0
    failure: CodedError | None = None
    judge: Callable[[Path | None, Path], float] | None = None

    def probe(self) -> Probe:
        """Usable as told."""
        return Probe(usable=self.usable, why="told so by the test", device="none", memory=None)

    def check(self, settings: Settings, folder: Path) -> None:
        """Every model will do."""

    def train(self, spec: TrainSpec, emit: Emit, stop: Stop) -> TrainOutcome:
        """Go through the motions; raises ``failure`` where told."""
        spec, plan = _plan_run(spec)
        emit(_model_loaded(spec))
        emit(_data_ready(spec))
        emit(plan)
        if spec.checkpoint is None:
            emit_answers(spec, emit, step=0, answer="before")
        losses = _read_losses(spec)
        stopped = False
        schedule = SaveSchedule(spec)
        for step in range(len(losses) + 1, plan.steps + 1):
            if step == self.fail_at and self.failure:
                raise self.failure
            losses.append(4.0 / (step + 1))
            emit(_step_done(spec, step, losses[-1]))
            stopped = stop() and step < plan.steps
            if stopped or schedule.is_due(step):
                self._save(spec, emit, losses, "stop" if stopped else "schedule")
                schedule.saved()
            if stopped:
                break
        emit_answers(spec, emit, step=len(losses), answer="after")
        size = write_fake_adapter(spec, self.width)
        emit(AdapterSaved(path=str(spec.folders.adapter), bytes=size))
        first, final = LossEnds(losses).means()
        return TrainOutcome(
            adapter=spec.folders.adapter,
            steps=len(losses),
            first_loss=first,
            final_loss=final,
            tokens=16 * len(losses),
            seconds=0.001,
            peak_memory=1,
            stopped=stopped,
            rows=_count_rows(plan.rows.read, len(losses), plan.examples_per_step),
        )

    def evaluate(self, spec: TrainSpec, adapter: Path | None, emit: Emit, *, part: Part = "all") -> EvalOutcome:
        """A loss made up from the bytes of adapter and rows, or the one that ``judge`` says."""
        file = spec.rows_path
        rows = file.read_bytes().splitlines()
        if part == "heldout":
            rows = rows[: round(spec.training.eval_share * len(rows))]
        if not rows:
            raise NothingHeldOutError(f"of the rows in {file} none is held out")
        emit_answers(spec, emit, step=0, answer="before" if adapter is None else "after")
        loss = self.judge(adapter, file) if self.judge else _made_up_loss(adapter, rows)
        return EvalOutcome(loss=loss, tokens=8 * len(rows), rows=len(rows))

    def write_witness(self, spec: TrainSpec, adapter: Path, emit: Emit) -> None:
        """A witness of one place, bound to the adapter's weights."""
        del emit
        prompt = WitnessPrompt(kind="validation", ids=(1, 2), places=(0,), tokens=((2, 3),), logprobs=((-0.1, -2.5),))
        base = BaseFacts(mode="lora", dtype="float32")
        found = Witness(run_id=spec.folders.run_id, base=base, prompts=(prompt,))
        write_witness(adapter, found, weights=adapter / WEIGHTS_FILE)
        add_to_manifest(adapter, WITNESS_FILE)

    def examine(
        self,
        spec: TrainSpec,
        adapter: Path | None,
        emit: Emit,
        *,
        part: Part = "all",
        answers: int = 0,
        answer_tokens: int = 128,
    ) -> list[RowOutcome]:
        """Each line is a row; an adapter halves its loss, and says ``Aye`` where the base says ``Yes``."""
        rows = Path(spec.data.path).read_bytes().splitlines()
        rows = rows[: round(spec.training.eval_share * len(rows))] if part == "heldout" else rows
        emit(Notice(message=f"{len(rows)} rows"))
        told = [
            RowOutcome(loss=(2.0 if adapter is None else 1.0) + _made_up_loss(None, [row]), tokens=8) for row in rows
        ]
        word = "Yes" if adapter is None else "Aye"
        said = [
            replace(row, prompt=f"{number}?", reference=f"Aye {number}", answer=f"{word} {number}"[:answer_tokens])
            for number, row in enumerate(told[:answers])
        ]
        return said + told[answers:]

    def _save(self, spec: TrainSpec, emit: Emit, losses: list[float], reason: Reason) -> None:
        def write(folder: Path) -> None:
            (folder / _STATE_FILE).write_bytes(orjson.dumps(losses))
            (folder / "weights.bin").write_bytes(bytes(self.width * 1024))

        save_checkpoint(spec, emit, write, rail=self.name, step=len(losses), need=self.width * 1024, reason=reason)


def _plan_run(spec: TrainSpec) -> tuple[TrainSpec, RunPlanned]:
    """The spec with its number of steps, and the plan: about three epochs unless steps or epochs are set."""
    training, rows = spec.training, _count_lines(spec)
    size = training.batch_size * training.gradient_accumulation
    per_epoch = max(1, -(-rows // size))
    steps = training.steps or max(1, round((training.epochs or 3) * per_epoch))
    plan = RunPlanned(
        steps=steps,
        epochs=steps / per_epoch,
        steps_per_epoch=per_epoch,
        examples_per_step=size,
        eval_steps=training.eval_steps or per_epoch,
        origin="steps" if training.steps else "epochs" if training.epochs else "default",
        rows=_count_rows(rows, steps, size),
    )
    return replace(spec, training=replace(training, steps=steps, epochs=None, eval_steps=plan.eval_steps)), plan


def _count_rows(rows: int, steps: int, size: int) -> RowCounts:
    visited = min(rows, steps * size)
    passes = steps * size / max(1, rows)
    return RowCounts(
        read=rows, visited=visited, truncated=0, not_reached=rows - visited, held_out=0, dropped=0, passes=passes
    )


def _count_lines(spec: TrainSpec) -> int:
    return len(spec.rows_path.read_bytes().splitlines())


def _read_losses(spec: TrainSpec) -> list[float]:
    if spec.checkpoint is None:
        return []
    losses: list[float] = orjson.loads((spec.checkpoint / _STATE_FILE).read_bytes())
    return losses


def _made_up_loss(adapter: Path | None, rows: list[bytes]) -> float:
    digest = hashlib.sha256(b"\n".join(rows))
    if adapter is not None:
        digest.update((adapter / WEIGHTS_FILE).read_bytes())
    return 1.0 + digest.digest()[0] / 256


def emit_answers(spec: TrainSpec, emit: Emit, *, step: int, answer: str) -> None:
    """Emit the same ``answer`` to every sample prompt."""
    for prompt in spec.training.sample_prompts:
        emit(SampleAnswer(step=step, prompt=prompt, answer=answer))


def write_fake_adapter(spec: TrainSpec, width: int) -> int:
    """Write an adapter folder for one module; returns the weights' size in bytes."""
    config = {
        "peft_type": "LORA",
        "base_model_name_or_path": spec.model.name,
        "r": spec.lora.r,
        "lora_alpha": spec.lora.resolved_alpha,
        "target_modules": ["q_proj"],
    }
    with publish_folder(spec.folders.adapter) as folder:
        (folder / CONFIG_FILE).write_bytes(orjson.dumps(config))
        weights = _build_weights(spec, width)
        (folder / WEIGHTS_FILE).write_bytes(weights)
        write_manifest(folder, run_id=spec.folders.run_id, base=spec.model.name)
    return len(weights)


def _build_weights(spec: TrainSpec, width: int) -> bytes:
    """A safetensors file: u64 length of the header, JSON header, data."""
    count = spec.lora.r * width
    header = orjson.dumps(
        {
            f"{FAKE_MODULE}.lora_A.weight": {
                "dtype": "F32",
                "shape": [spec.lora.r, width],
                "data_offsets": [0, 4 * count],
            },
            f"{FAKE_MODULE}.lora_B.weight": {
                "dtype": "F32",
                "shape": [width, spec.lora.r],
                "data_offsets": [4 * count, 8 * count],
            },
        }
    )
    before = [0.0] * (2 * count)
    if spec.initial_adapter is not None:
        data = (spec.initial_adapter / WEIGHTS_FILE).read_bytes()[-8 * count :]
        before = list(struct.unpack(f"<{2 * count}f", data))
    draw = random.Random(f"{spec.training.seed} {sha256_file(spec.rows_path)}")  # noqa: S311 - must repeat
    values = [value + draw.uniform(-0.1, 0.1) for value in before]
    return struct.pack("<Q", len(header)) + header + struct.pack(f"<{2 * count}f", *values)


def _model_loaded(spec: TrainSpec) -> ModelLoaded:
    config = spec.base / "config.json"
    digest = hashlib.sha256(config.read_bytes() if config.is_file() else spec.model.name.encode()).hexdigest()
    return ModelLoaded(
        name=spec.model.name,
        revision=spec.base_commit,
        config_sha256=digest,
        parameters=1,
        trainable=1,
        mode="lora",
        dtype="float32",
        device="none",
    )


def _data_ready(spec: TrainSpec) -> DataReady:
    file = spec.rows_path
    rows = _count_lines(spec)
    return DataReady(
        path=spec.data.path,
        sha256=sha256_file(file),
        revision=spec.rows_commit,
        template="none",
        template_sha256="",
        read=rows,
        whole=rows,
        truncated=0,
        dropped=0,
        tokens=16 * rows,
        trained_tokens=8 * rows,
    )


def _step_done(spec: TrainSpec, step: int, loss: float) -> StepDone:
    return StepDone(
        step=step,
        steps=spec.training.planned_steps,
        loss=loss,
        learning_rate=spec.training.resolved_learning_rate,
        grad_norm=1.0,
        tokens=16 * step,
        tokens_per_second=1000.0,
        memory_bytes=1,
    )
