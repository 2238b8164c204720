"""Runs side by side: their losses in one picture, and of two of them everything that differs."""

from __future__ import annotations

from typing import Any

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from backpropagate.ui.folders import Output
from backpropagate.ui.pages.runs import metrics_of
from backpropagate.ui.render import show
from bp_runs.diff import diff_runs
from bp_runs.record import RunRecord
from bp_runs.redact import redact_data

MOST_RUNS = 6
"""More lines than these cannot be distinguished."""
_GROUPS = ("settings", "data", "model", "versions", "hardware", "result")


def _find_runs(request: Request) -> list[tuple[Output, RunRecord]]:
    """The runs of the query, ``run=KEY/ID``, each once.

    Raises:
        HTTPException: None, or too many.
        UiPathError, RunNotFoundError, RecordInvalidError: As `runs.find_run`.
    """
    asked = list(dict.fromkeys(request.query_params.getlist("run")))
    if not 1 <= len(asked) <= MOST_RUNS:
        raise HTTPException(400, f"Choose two to {MOST_RUNS} runs to compare.")
    found = []
    for text in asked:
        key, _, run_id = text.partition("/")
        output = request.app.state.site.places.find(key)
        found.append((output, output.store.load(run_id)))
    return found


def show_comparison(request: Request) -> Response:
    """The page of a comparison; without runs it says how to choose some."""
    if not request.query_params.getlist("run"):
        return show(request, "compare.html", runs=[], differs={}, diff=None, groups=_GROUPS, query="")
    found = _find_runs(request)
    diff: dict[str, Any] | None = None
    if len(found) == 2:
        (one, first), (two, second) = found
        events = (one.store.read_metrics(first.run_id), two.store.read_metrics(second.run_id))
        diff = redact_data(diff_runs(first, second, *events).to_dict())
    return show(
        request,
        "compare.html",
        runs=[(output.key, RunRecord(**record.to_dict())) for output, record in found],
        differs=_settings_that_differ([record for _, record in found]),
        diff=diff,
        groups=_GROUPS,
        query=request.url.query,
    )


def _settings_that_differ(records: list[RunRecord]) -> dict[str, list[Any]]:
    """By key: every run's value."""
    keys = list(dict.fromkeys(key for record in records for key in record.settings))
    values = {key: [redact_data(record.setting(key)) for record in records] for key in keys}
    return {key: row for key, row in values.items() if any(value != row[0] for value in row)}


def points(request: Request) -> Response:
    """Each run's numbers, in the order of the query."""
    found = _find_runs(request)
    series = request.app.state.site.series
    runs = [{"run_id": record.run_id, **series.read(metrics_of(output, record)).points()} for output, record in found]
    return JSONResponse({"runs": runs})
