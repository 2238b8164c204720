"""What a training call returns: short in a terminal, a page with the loss curve in a notebook."""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bp_runs.errors import CodedError
from bp_runs.events import SampleAnswer, StepDone
from bp_runs.rail import TrainOutcome
from bp_runs.record import RunRecord
from bp_runs.store import RunStore

_WIDTH, _HEIGHT = 480, 120


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class TrainResult:
    """A run that ended well, or was stopped with its adapter kept."""

    run_id: str
    adapter: Path
    """``<output>/lora``; the run's own folder if it was stopped and a finished adapter is there already."""
    outcome: TrainOutcome
    record: RunRecord
    output: Path
    """The output folder, which holds the run's record and events."""

    @property
    def final_loss(self) -> float:
        """The mean training loss of the last tenth of the steps, in nats per trained token."""
        return self.outcome.final_loss

    def __repr__(self) -> str:
        done = self.outcome
        validated = "" if done.eval_loss is None else f", validation loss {done.eval_loss:.3f}"
        state = "stopped after " if done.stopped else ""
        return (
            f"TrainResult({self.run_id}: {state}{done.steps} steps, loss {done.first_loss:.3f} → "
            f"{done.final_loss:.3f}{validated}, adapter {str(self.adapter)!r})"
        )

    def _repr_html_(self) -> str:
        """For notebooks: the numbers, the loss curve, completions before and after, and the next call."""
        events = self._events()
        losses = [e["loss"] for e in events if e.get("event") == StepDone.kind and _is_number(e.get("loss"))]
        rows = {
            "run": self.run_id,
            "loss": f"{self.outcome.first_loss:.3f} → {self.outcome.final_loss:.3f} in {self.outcome.steps} steps",
            "validation": "" if self.outcome.eval_loss is None else f"{self.outcome.eval_loss:.3f}",
            "examples": self.record.describe_rows() or "",
            "adapter": str(self.adapter),
        }
        cells = "".join(f"<tr><th>{k}</th><td>{html.escape(v)}</td></tr>" for k, v in rows.items() if v)
        return (
            f"<div class='backpropagate-result'><table>{cells}</table>{loss_svg(losses)}{_samples(events)}"
            '<p>Next: <code>trainer.export("gguf", quantization="q4_k_m")</code></p></div>'
        )

    def _events(self) -> list[dict[str, Any]]:
        try:
            return RunStore(self.output).read_metrics(self.run_id)
        except CodedError:
            return []  # the run's folder was removed since


def loss_svg(losses: Sequence[float]) -> str:
    """The loss over steps as an SVG line; empty for fewer than two steps."""
    if len(losses) < 2:
        return ""
    low, span = min(losses), (max(losses) - min(losses)) or 1.0
    step = _WIDTH / (len(losses) - 1)
    points = " ".join(f"{i * step:.1f},{_HEIGHT * (1 - (loss - low) / span):.1f}" for i, loss in enumerate(losses))
    return (
        f'<svg viewBox="-2 -4 {_WIDTH + 4} {_HEIGHT + 8}" width="{_WIDTH}" role="img" '
        f'aria-label="training loss from {losses[0]:.3f} to {losses[-1]:.3f}">'
        f'<polyline points="{points}" fill="none" stroke="currentColor" stroke-width="1.5"/></svg>'
    )


def _samples(events: Sequence[Mapping[str, Any]]) -> str:
    """Sample prompts with their first and last completion."""
    answers: dict[str, list[str]] = {}
    for event in events:
        if event.get("event") == SampleAnswer.kind:
            answers.setdefault(event["prompt"], []).append(event["answer"])
    rows = "".join(
        f"<tr><td>{html.escape(prompt)}</td><td>{html.escape(said[0])}</td><td>{html.escape(said[-1])}</td></tr>"
        for prompt, said in answers.items()
    )
    return f"<table><tr><th>prompt</th><th>before</th><th>after</th></tr>{rows}</table>" if rows else ""


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)
