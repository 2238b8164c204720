"""The scorecard of a multi-run: what each run did to the data of the runs before it."""

from __future__ import annotations

from statistics import fmean

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from backpropagate.continual.scorecard import Scorecard, find_scorecard
from backpropagate.ui.pages.runs import find_run
from backpropagate.ui.render import show

_WIDTH, _HEIGHT, _LEFT, _BOTTOM = 720, 260, 56, 34


def show_scorecard(request: Request) -> Response:
    """The page of one card."""
    output, store, record = find_run(request)
    events = store.read_metrics(record.run_id)
    card = find_scorecard(record, [event for event in events if event.get("event") == "notice"])
    if card is None:
        raise HTTPException(404, f"The run {record.run_id} has no score card.")
    return show(
        request,
        "card.html",
        output=output.key,
        run=record,
        card=card,
        mean_score=fmean(card.scores[-1]) if card.scores else None,
        lines=_lines(card),
        size=(_WIDTH, _HEIGHT),
        ticks=_ticks(card),
    )


def _scale(card: Scorecard) -> tuple[float, float]:
    flat = [loss for row in card.losses for loss in row]
    return min(flat), (max(flat) - min(flat)) or 1.0


def _place(card: Scorecard, i: int, loss: float) -> tuple[float, float]:
    low, span = _scale(card)
    step = (_WIDTH - _LEFT - 20) / max(1, len(card.losses) - 1)
    return round(_LEFT + i * step, 1), round(12 + (_HEIGHT - _BOTTOM - 24) * (1 - (loss - low) / span), 1)


def _lines(card: Scorecard) -> list[list[tuple[float, float]]]:
    """For each run's validation rows the loss after that run and every later one, as points of the picture."""
    count = len(card.losses)
    return [[_place(card, i, card.losses[i][j]) for i in range(j, count)] for j in range(count)]


def _ticks(card: Scorecard) -> dict[str, list[tuple[float, str]]]:
    low, span = _scale(card)
    heights = [(low + span * share) for share in (0.0, 0.5, 1.0)]
    return {
        "x": [(_place(card, i, low)[0], str(i + 1)) for i in range(len(card.losses))],
        "y": [(_place(card, 0, loss)[1], f"{loss:.3f}") for loss in heights],
    }
