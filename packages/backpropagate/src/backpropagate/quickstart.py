"""The embedded default: train a small real model on example data, export it and talk to it, in minutes on a CPU."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any, Final

import bp_export
from backpropagate import catalogue, quickstart_model, system
from backpropagate.exporting import ExportResult
from backpropagate.interrupts import Interrupts, no_interrupts
from backpropagate.results import TrainResult
from backpropagate.trainer import Trainer
from bp_data import preview_rows
from bp_data.preview import PreviewToken
from bp_runs.errors import InterruptedRunError
from bp_runs.events import Event, SampleAnswer
from bp_runs.rail import Rail
from bp_runs.wording import command_ref

HELD_OUT = ("What is the capital of Germany?", "Who are you?", "How do I boil an egg?")
"""Prompts that are not in the example data."""

QUANTIZATION: Final = "q4_k_m"
_ANSWER_TOKENS = 40

# Chosen on two CPU cores: the style is learned after about 40 steps, the names a little later.
DEFAULTS: dict[str, Any] = {
    "steps": 64,
    "batch_size": 4,
    "gradient_accumulation": 1,
    "lr": 5e-4,
    "warmup_steps": 4,
    "lora_r": 16,
    "max_seq_length": 256,
    "sample_tokens": _ANSWER_TOKENS,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """One held-out prompt and what each stage answers, greedily."""

    prompt: str
    before: str
    after: str
    gguf: str
    """The exported file's answer in llama.cpp."""


@dataclass(frozen=True, slots=True, kw_only=True)
class QuickstartResult:
    """All that quickstart made and measured."""

    training: TrainResult
    export: ExportResult
    answers: tuple[Answer, ...]
    losses: tuple[float, ...]
    seconds: dict[str, float]
    """By stage: model, validate, train, export, chat; and in all."""


@dataclass(slots=True)
class _Clock:
    seconds: dict[str, float]
    began: float
    last: float

    def lap(self, stage: str) -> None:
        """Note the time since the last lap under ``stage``."""
        now = time.perf_counter()
        self.seconds[stage] = round(now - self.last, 2)
        self.last = now


def run_quickstart(
    *,
    output: Path,
    model: str | None = None,
    rail: Rail | None = None,
    say: Callable[[str], None] = lambda _: None,
    on_event: Callable[[Event], None] = lambda _: None,
    on_preview: Callable[[list[PreviewToken]], None] = lambda _: None,
    command: Sequence[str] = (),
    interrupts: Interrupts = no_interrupts,
    **flags: Any,
) -> QuickstartResult:
    """Validate → train → export → answer, on the example data.

    Args:
        output: Folder for runs, adapter and GGUF.
        model: A Hugging Face folder or Hub id instead of the small model.
        rail: As `Trainer`.
        say: Told the title of each stage.
        on_event: Told every event of the run.
        on_preview: Given the first row's tokens and which of them are trained.
        interrupts: As `Trainer`.
        **flags: Settings over quickstart's own, as `Trainer`.

    Raises:
        SmallModelError: There is no model to train.
        CodedError: As `Trainer.train` and `Trainer.export`.
    """
    now = time.perf_counter()
    clock = _Clock({}, now, now)
    say("model     unpacking the small model once" if model is None else f"model     {model}")
    offline = system.is_offline(os.environ)
    name = model or quickstart_model.find_small_model(system.program_home(os.environ), offline=offline)
    base = catalogue.find_model(name, offline=offline)
    clock.lap("model")
    with as_file(files("backpropagate.examples") / "quickstart.jsonl") as data:
        say("validate  the example data as training reads it")
        _validate(data, base.folder, on_preview)
        clock.lap("validate")
        say("train     a LoRA adapter; first and last, three prompts that are not in the data")
        samples: list[SampleAnswer] = []
        defaults = {**DEFAULTS, "sample_prompts": HELD_OUT}
        trainer = Trainer(
            name,
            progress=False,
            output=output,
            rail=rail,
            command=command,
            defaults=defaults,
            interrupts=interrupts,
            **flags,
        )
        losses: list[float] = []

        def watch(event: Event) -> None:
            if isinstance(event, SampleAnswer):
                samples.append(event)
            elif event.kind == "step":
                losses.append(event.loss)  # type: ignore[attr-defined]
            on_event(event)

        training = trainer.train(data, on_event=watch)
    clock.lap("train")
    if training.outcome.stopped:
        raise InterruptedRunError(
            f"quickstart was stopped after {training.outcome.steps} steps; the adapter so far is {training.adapter}",
            fix=f"Start it again, or use what is there: {command_ref('export', training.adapter)}",
        )
    say(f"export    base and adapter become one {QUANTIZATION} GGUF")
    export = trainer.export("gguf", quantization=QUANTIZATION)
    clock.lap("export")
    say("chat      the GGUF answers in llama.cpp")
    answers = tuple(_ask(export.path, samples, training.outcome.steps))
    clock.lap("chat")
    clock.seconds["all"] = round(time.perf_counter() - clock.began, 2)
    return QuickstartResult(
        training=training, export=export, answers=answers, losses=tuple(losses), seconds=clock.seconds
    )


def _validate(data: Path, base: Path, on_preview: Callable[[list[PreviewToken]], None]) -> None:
    from bp_data import PrepareRequest, prepare

    prepared = prepare(PrepareRequest(data, base, DEFAULTS["max_seq_length"]))
    on_preview(preview_rows(prepared, 1)[0])


def _ask(gguf: Path, samples: Sequence[SampleAnswer], last_step: int) -> list[Answer]:
    said = {(s.step, s.prompt): s.answer for s in samples}
    with bp_export.chat.LlamaChat(gguf) as chat:
        return [
            Answer(
                prompt=prompt,
                before=said.get((0, prompt), ""),
                after=said.get((last_step, prompt), ""),
                gguf=chat.answer([{"role": "user", "content": prompt}], max_tokens=_ANSWER_TOKENS).strip(),
            )
            for prompt in HELD_OUT
        ]
