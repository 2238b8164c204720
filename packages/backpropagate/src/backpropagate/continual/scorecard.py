"""The forgetting scorecard: the held-out loss of every run's data after every run, and what follows from it.

``losses[i][j]`` is the loss, in nats, on run j + 1's validation rows after run i + 1 with the adapter that is shipped;
known for j ≤ i. Of T runs (Lopez-Paz and Ranzato, arXiv:1706.08840, with a loss where they have an accuracy):

    average            mean of the last row
    backward transfer  mean over j < T of losses[j][j] - losses[T][j]: above 0, later runs helped earlier ones' data
    forgetting         mean over j < T of losses[T][j] - the lowest of losses[j … T - 1][j]: above 0, it was better once
    merge cost         mean over i of losses[i][i] - the loss of the fine-tuned adapter before it was merged
"""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Any

from bp_runs.record import RunRecord

_STYLE = (
    "body{font:15px system-ui,sans-serif;margin:2em;color:#222}table{border-collapse:collapse}"
    "td,th{padding:.4em .8em;text-align:right;border:1px solid #ddd}svg{margin-top:1.5em}"
)
_COLOURS = ("#1b6ca8", "#c8553d", "#3a7d44", "#8e5ea2", "#d19c1d", "#4d4d4d", "#2a9d8f", "#b5179e")


@dataclass(frozen=True, slots=True, kw_only=True)
class Scorecard:
    """What each run did to the data of the runs before it."""

    runs: tuple[str, ...] = ()
    """Ids, in order; a run that the gate left out is not among them."""
    losses: tuple[tuple[float, ...], ...] = ()
    before_merge: tuple[float, ...] = ()
    """Loss of each run's fine-tuned adapter on its own validation rows."""
    before_run: tuple[float, ...] = ()
    """Loss on each run's validation rows before it; the base's for the first."""
    names: tuple[str, ...] = ()
    """What the runs learned from."""
    merge: str | None = None
    """How the runs were merged, the setting ``multirun.merge``; None in cards of versions that did not say."""
    metric: str | None = None
    """What else was measured, from 0 to 1 and better when higher; None: nothing."""
    scores: tuple[tuple[float, ...], ...] = ()
    """As ``losses``, of the metric."""
    scores_before: tuple[float, ...] = ()
    """As ``before_run``, of the metric."""

    def add_scores(self, metric: str, row: Sequence[float], before: float) -> Scorecard:
        """The card with the newest run's row of a metric too."""
        scores, old = (*self.scores, tuple(row)), (*self.scores_before, before)
        return replace(self, metric=metric, scores=scores, scores_before=old)

    def add(self, run: str, name: str, *, row: Sequence[float], tuned: float, before: float) -> Scorecard:
        """The card after one more run.

        Args:
            row: Losses on the validation rows of every run so far, this one last.
            tuned: Of the fine-tuned adapter on this run's.
            before: On this run's before it.
        """
        return replace(
            self,
            runs=(*self.runs, run),
            losses=(*self.losses, tuple(row)),
            before_merge=(*self.before_merge, tuned),
            before_run=(*self.before_run, before),
            names=(*self.names, name),
        )

    @property
    def average(self) -> float | None:
        """Mean loss on all runs' validation rows now; None before the first run."""
        return fmean(self.losses[-1]) if self.losses else None

    @property
    def backward_transfer(self) -> float | None:
        """None with fewer than two runs."""
        if len(self.losses) < 2:
            return None
        return fmean(self.losses[j][j] - self.losses[-1][j] for j in range(len(self.losses) - 1))

    @property
    def forgetting(self) -> float | None:
        """None with fewer than two runs."""
        count = len(self.losses)
        if count < 2:
            return None
        best = [min(self.losses[i][j] for i in range(j, count - 1)) for j in range(count - 1)]
        return fmean(self.losses[-1][j] - low for j, low in enumerate(best))

    @property
    def merge_cost(self) -> float | None:
        """None before the first run."""
        if not self.losses:
            return None
        return fmean(row[-1] - tuned for row, tuned in zip(self.losses, self.before_merge, strict=True))

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready, the means included."""
        means = {name: getattr(self, name) for name in ("average", "backward_transfer", "forgetting", "merge_cost")}
        names = ("runs", "before_merge", "before_run", "names", "scores_before")
        lists = {name: list(getattr(self, name)) for name in names}
        rows = {name: [list(row) for row in getattr(self, name)] for name in ("losses", "scores")}
        return {**lists, **rows, "metric": self.metric, "merge": self.merge, **means}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Scorecard:
        """The card that `to_dict` wrote."""
        return cls(
            runs=tuple(data["runs"]),
            losses=tuple(tuple(row) for row in data["losses"]),
            before_merge=tuple(data["before_merge"]),
            before_run=tuple(data["before_run"]),
            names=tuple(data["names"]),
            metric=data.get("metric"),
            merge=data.get("merge"),
            scores=tuple(tuple(row) for row in data.get("scores", ())),
            scores_before=tuple(data.get("scores_before", ())),
        )


def card_text(card: Scorecard) -> str:
    """The card for a terminal; empty before the first run."""
    if not card.losses:
        return ""
    count = len(card.losses)
    lines = [
        "  held-out loss on the data of" + "".join(f"{f'run {j + 1}':>9}" for j in range(count)) + "  before merge"
    ]
    before = "".join(f"{loss:>9.3f}" for loss in card.before_run)
    lines.append(f"  {'before that run':<28}{before}")
    for i, row in enumerate(card.losses):
        cells = "".join(f"{loss:>9.3f}" for loss in row) + " " * 9 * (count - len(row))
        lines.append(f"  {f'after run {i + 1}':<28}{cells}{card.before_merge[i]:>14.3f}")
    lines += _score_lines(card)
    lines.append("  " + ", ".join(_means(card)))
    return "\n".join(lines)


def _score_lines(card: Scorecard) -> list[str]:
    """The metric's matrix for a terminal, where there is one."""
    if card.metric is None:
        return []
    head = f"{f'{card.metric} of answers to':<28}" + "".join(f"{f'run {j + 1}':>9}" for j in range(len(card.scores)))
    rows = [("before that run", card.scores_before), *((f"after run {i}", row) for i, row in enumerate(card.scores, 1))]
    return [f"  {head}", *(f"  {name:<28}" + "".join(f"{score:>9.3f}" for score in row) for name, row in rows)]


def _means(card: Scorecard) -> list[str]:
    found = [f"merged by {card.merge}"] if card.merge not in (None, "none") else []
    found += [] if card.average is None else [f"average {card.average:.3f}"]
    signed = (
        ("backward transfer", card.backward_transfer),
        ("forgetting", card.forgetting),
        ("merge cost", card.merge_cost),
    )
    found += [f"{name} {value:+.3f}" for name, value in signed if value is not None]
    return found + ([f"{card.metric} {fmean(card.scores[-1]):.3f}"] if card.scores else [])


def card_html(card: Scorecard, title: str) -> str:
    """The card as one page without anything from elsewhere: the matrix, colored, and each run's loss over the runs."""
    flat = [loss for row in card.losses for loss in row] or [0.0]
    low, span = min(flat), (max(flat) - min(flat)) or 1.0
    means = html.escape(", ".join(_means(card)))
    scores = ""
    if card.metric is not None:
        told = f"{html.escape(card.metric)} of answers to held-out rows, from 0 to 1; higher is better."
        scores = f"<p>{told}</p>{_table(card, card.scores, 1, 0)}"
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{html.escape(title)}</title>'
        f"<style>{_STYLE}</style><h1>{html.escape(title)}</h1><p>Held-out loss in nats; lower is better. {means}.</p>"
        f"{_table(card, card.losses, low, low + span)}{_lines(card, low, span)}{scores}</html>\n"
    )


def _table(card: Scorecard, matrix: Sequence[Sequence[float]], good: float, bad: float) -> str:
    """A matrix, from green for ``good`` to red for ``bad``."""
    head = "".join(f"<th>{html.escape(name)}</th>" for name in card.names)
    rows = ""
    for i, row in enumerate(matrix):
        cells = "".join(
            f'<td style="background:hsl({120 - 120 * (value - good) / (bad - good):.0f},60%,85%)">{value:.3f}</td>'
            for value in row
        )
        rows += f"<tr><th>after run {i + 1}</th>{cells}{'<td></td>' * (len(matrix) - len(row))}</tr>"
    return f"<table><tr><th></th>{head}</tr>{rows}</table>"


def _lines(card: Scorecard, low: float, span: float) -> str:
    """One line for each run's validation rows, from that run on."""
    count, width, height = len(card.losses), 640, 260
    step = (width - 60) / max(1, count - 1)

    def point(i: int, loss: float) -> str:
        return f"{40 + i * step:.0f},{20 + (height - 50) * (1 - (loss - low) / span):.0f}"

    drawn = ""
    for j in range(count):
        places = [point(i, card.losses[i][j]) for i in range(j, count)]
        colour = _COLOURS[j % len(_COLOURS)]
        drawn += f'<polyline fill="none" stroke="{colour}" stroke-width="2" points="{" ".join(places)}"/>'
        drawn += "".join(
            f'<circle r="3" fill="{colour}" cx="{p.partition(",")[0]}" cy="{p.partition(",")[2]}"/>' for p in places
        )
    ticks = "".join(f'<text x="{40 + i * step:.0f}" y="{height - 6}">{i + 1}</text>' for i in range(count))
    ends = f'<text x="0" y="24">{low + span:.2f}</text><text x="0" y="{height - 28}">{low:.2f}</text>'
    return f'<svg width="{width}" height="{height}" font-size="12" role="img">{drawn}{ticks}{ends}</svg>'


def find_scorecard(record: RunRecord, notices: Sequence[Mapping[str, Any]]) -> Scorecard | None:
    """The scorecard of the record, or of the newest notice while the multi-run runs; None if there is none."""
    told = [notice["details"]["card"] for notice in notices if "card" in (notice.get("details") or {})]
    found = record.result.get("score_card") or (told[-1] if told else None)
    card = Scorecard.from_dict(found) if found else None
    return card if card and card.losses else None
