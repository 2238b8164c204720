"""The table of runs, and one run in full, as it happens."""

from __future__ import annotations

import platform
import shlex
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args
from urllib.parse import urlencode

import orjson
from markupsafe import Markup
from starlette.datastructures import FormData
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, RedirectResponse, Response, StreamingResponse

from backpropagate.continual.scorecard import find_scorecard
from backpropagate.run_hints import UNFINISHED, resume_line
from backpropagate.ui.background import CAN_STOP
from backpropagate.ui.folders import Output
from backpropagate.ui.live import RunSeries, follow
from backpropagate.ui.render import HERE, show, tail, whole_number
from backpropagate.ui.security import session_of
from bp_runs.checkpoint_store import CheckpointFolder
from bp_runs.errors import RunStatus
from bp_runs.index import by_age
from bp_runs.metrics import FIRST_STEPS, read_progress
from bp_runs.paths import METRICS_FILE, REJECTED_FILE
from bp_runs.record import RunRecord
from bp_runs.redact import redact, redact_data
from bp_runs.store import RunStore
from bp_runs.wording import render

MOST_ROWS = 100
_COLUMNS = {
    "created_at": "Started",
    "status": "Status",
    "model": "Model",
    "data": "Data",
    "steps": "Steps",
    "final_loss": "Loss",
    "seconds": "Time",
}
_REJECTED_SHOWN = 50
_POINTS_SHOWN = 12


def show_table(request: Request) -> Response:
    """The page of all runs."""
    return show(request, "runs.html", **_table(request))


def show_rows(request: Request) -> Response:
    """The table alone, as the page asks for it again and again."""
    return show(request, "parts/runs_table.html", **_table(request))


def _table(request: Request) -> dict[str, Any]:
    asked = {name: request.query_params.get(name, "") for name in ("q", "status", "output", "sort", "dir", "page")}
    outputs = request.app.state.site.places.outputs()
    rows = [
        {**row, "output": output.key, "output_name": output.name}
        for output in outputs
        if asked["output"] in ("", output.key)
        for row in output.store.list_runs()
    ]
    rows = [row for row in rows if asked["status"] in ("", row["status"]) and _has(row, asked["q"])]
    column = asked["sort"] if asked["sort"] in _COLUMNS else "created_at"
    is_down = asked["dir"] != "up"
    if column == "created_at" and len({row["output"] for row in rows}) == 1:
        rows.sort(key=by_age, reverse=is_down)  # one folder's runs: as they began, whatever the clock said
        known = rows
    else:
        known = sorted(
            (r for r in rows if r[column] is not None), key=lambda r: (r[column], r["run_id"]), reverse=is_down
        )
    rows = known + [row for row in rows if row[column] is None]
    page = whole_number(asked["page"], 1)
    pages = max(1, -(-len(rows) // MOST_ROWS))
    page = min(max(1, page), pages)
    shown = rows[(page - 1) * MOST_ROWS : page * MOST_ROWS]
    by_key = {output.key: output for output in outputs}
    for row in shown:
        if row["status"] == "running":
            store = by_key[row["output"]].store
            progress = read_progress(store.folder(row["run_id"]) / METRICS_FILE)
            row["steps"], row["final_loss"] = progress.get("step"), progress.get("loss")
    return {
        "rows": shown,
        "total": len(rows),
        "page": page,
        "pages": pages,
        "columns": _COLUMNS,
        "sort": column,
        "is_down": is_down,
        "asked": asked,
        "statuses": get_args(RunStatus),
        "outputs": outputs,
        "query": lambda **changes: urlencode({k: v for k, v in {**asked, **changes}.items() if v}),
    }


def _has(row: Mapping[str, Any], text: str) -> bool:
    told = (
        row["run_id"],
        row.get("title"),
        row["model"],
        row["data"],
        row["kind"],
        row["error"],
        *row["tags"],
        row["output_name"],
    )
    return all(word in " ".join(str(t) for t in told if t).lower() for word in text.lower().split())


def find_run(request: Request) -> tuple[Output, RunStore, RunRecord]:
    """The run of an address.

    Raises:
        UiPathError, RunNotFoundError, RecordInvalidError: There is none, or its record cannot be read.
    """
    output = request.app.state.site.places.find(request.path_params["output"])
    return output, output.store, output.store.load(request.path_params["run"])


def metrics_of(output: Output, record: RunRecord) -> Path:
    """A run's ``metrics.jsonl``."""
    return output.store.folder(record.run_id) / METRICS_FILE


def show_run(request: Request) -> Response:
    """One run in full."""
    output, store, record = find_run(request)
    series = request.app.state.site.series.read(metrics_of(output, record))
    return show(
        request,
        "run.html",
        **_summary(request, output, record, series),
        command=redact(shlex.join(record.command)),
        settings=redact_data(record.settings),
        log=_log_of(request, record),
        rejected=_read_rejected(store, record),
        most_rejected=_REJECTED_SHOWN,
        points=series.newest(_POINTS_SHOWN),
    )


def show_summary(request: Request) -> Response:
    """What changes while the run trains, as the page asks for it when something has happened."""
    output, _, record = find_run(request)
    series = request.app.state.site.series.read(metrics_of(output, record))
    return show(request, "parts/run_renewed.html", **_summary(request, output, record, series))


def _summary(request: Request, output: Output, record: RunRecord, series: RunSeries) -> dict[str, Any]:
    is_member = (record.parent or {}).get("relation") == "member"
    can_resume = record.status in UNFINISHED and not is_member and not record.is_imported
    first, final = series.losses()
    if record.status == "running" and series.count < FIRST_STEPS:
        first = None  # it is the mean over five steps, and must not change once it was shown
    return {
        "output": output.key,
        "output_name": output.name,
        "is_own": output.is_own,
        "run": RunRecord(**record.to_dict()),
        "plan": record.describe_plan(),
        "counted": record.describe_rows(),
        "step": series.step(-1) if series.count else None,
        "first_loss": first if first is not None else record.result.get("first_loss"),
        "checkpoints": CheckpointFolder(output.store.folder(record.run_id)).read(),
        "title": title_of(record),
        "final_loss": final if final is not None else record.result.get("final_loss"),
        "proof": _proof(record, series, record.describe_rows()),
        "evals": series.evals,
        "samples": _samples(series.samples),
        "notices": _last_of_each(redact_data(series.notices), "message"),
        "files": _last_of_each(RunRecord(**record.to_dict()).artifacts, "path"),
        "can_stop": CAN_STOP and record.host == platform.node(),
        "is_asked": request.app.state.site.jobs.is_asked(record),
        "has_card": find_scorecard(record, series.notices) is not None,
        "members": _members(output.store, record),
        "go_on": render(resume_line(record.run_id, output.path)) if can_resume else None,
    }


def _members(store: RunStore, record: RunRecord) -> list[dict[str, Any]]:
    """The runs of a multi-run, oldest first; for other runs the list of all is not even read."""
    if record.kind != "multi-run":
        return []
    return [row for row in store.list_runs() if row["parent"] == record.run_id][::-1]


def _last_of_each(found: list[dict[str, Any]], name: str) -> list[dict[str, Any]]:
    """Without those that a later one has repeated: a resumed run says and writes some things again."""
    last = {str(one.get(name)): place for place, one in enumerate(found)}
    return [one for place, one in enumerate(found) if last[str(one.get(name))] == place]


def _samples(events: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Prompts, each with its answers by step."""
    found: dict[str, dict[int, str]] = {}
    for event in events:
        found.setdefault(str(event.get("prompt", "")), {})[event["step"]] = str(event.get("answer", ""))
    return [{"prompt": prompt, "answers": answers} for prompt, answers in found.items()]


def _proof(record: RunRecord, series: RunSeries, counted: str | None) -> list[dict[str, str]]:
    """What shows that the run learned and lost nothing: each point with ``mark`` yes, no or open, and words."""
    points = []
    if counted:
        points.append({"mark": "yes", "text": f"Every row is accounted for: {counted}"})
    first, final = series.losses()
    if first is not None and final is not None and series.count > 1:
        points.append(
            {"mark": "yes" if final < first else "no", "text": f"Training loss went from {first:.3f} to {final:.3f}"}
        )
    losses = [event["loss"] for event in series.evals if event["loss"] is not None]
    if len(losses) > 1:
        mark = "yes" if min(losses[1:]) < losses[0] else "no"
        points.append({"mark": mark, "text": f"Validation loss went from {losses[0]:.3f} to {min(losses):.3f} at best"})
    elif not losses:
        points.append({"mark": "open", "text": "Not validated: no examples were held out"})
    exports = [a for a in record.artifacts if a.get("parity")]
    for artifact in exports:
        checks = artifact["parity"].get("checks") or []
        results = Counter(str(check.get("result", "")) for check in checks)
        failed = results["failed"]
        passed = results["ok"] + results["passed"]
        untested = len(checks) - failed - passed
        text = (
            f"Export {artifact.get('quantization', '')}: {passed} checks passed, {failed} failed, {untested} not tested"
        )
        step = artifact.get("step")
        is_stale = isinstance(step, int) and series.count > 0 and step < series.step(-1)["step"]
        text += f"; made at step {step}, the run is further now: export again" if is_stale else ""
        mark = "no" if failed else "yes" if passed and not is_stale else "open"
        points.append({"mark": mark, "text": text})
    if not exports:
        points.append({"mark": "open", "text": "Not exported yet"})
    return points


def _read_rejected(store: RunStore, record: RunRecord) -> list[dict[str, Any]]:
    """The first rows of ``rejected.jsonl``."""
    rows = []
    try:
        with (store.folder(record.run_id) / REJECTED_FILE).open("rb") as file:
            for line in file:
                rows.append(redact_data(orjson.loads(line)))
                if len(rows) == _REJECTED_SHOWN:
                    break
    except (OSError, orjson.JSONDecodeError):
        return rows
    return rows


def points(request: Request) -> Response:
    """The numbers that the charts begin with."""
    output, _, record = find_run(request)
    series = request.app.state.site.series.read(metrics_of(output, record))
    return JSONResponse({**series.points(), "status": record.status})


def follow_run(request: Request) -> Response:
    """The run's events from ``Last-Event-ID``, or the query's ``after``, as they come."""
    _, store, record = find_run(request)
    sessions, session = request.app.state.site.sessions, session_of(request)
    after = request.headers.get("last-event-id") or request.query_params.get("after", "")
    return StreamingResponse(
        follow(
            store.folder(record.run_id) / METRICS_FILE,
            whole_number(after, None),
            lambda: store.load(record.run_id).status,
            lambda: sessions.is_valid(session),
        ),
        media_type="text/event-stream",
        headers={"X-Accel-Buffering": "no"},
    )


def title_of(record: RunRecord) -> str:
    """What a person called the run; else its model and data."""
    return record.title or f"{tail(record.setting('model.name'))} on {tail(record.setting('data.path'))}"


def _log_of(request: Request, record: RunRecord) -> str:
    """The last lines of the process that works on the run or did last, if this page started it."""
    jobs = request.app.state.site.jobs
    sessions = {(session.get("pid"), str(session.get("at", ""))) for session in record.sessions}
    for job in reversed(jobs.queue.jobs()):
        if any(job.pid == pid and at >= str(job.started_at) for pid, at in sessions if job.pid):
            return str(jobs.log_of(job))
    return ""


def download_csv(request: Request) -> Response:
    """Every step's numbers as a CSV file."""
    output, _, record = find_run(request)
    series = request.app.state.site.series.read(metrics_of(output, record))
    headers = {"Content-Disposition": f'attachment; filename="run-{record.run_id}.csv"'}
    return StreamingResponse(series.csv(), media_type="text/csv; charset=utf-8", headers=headers)


def change_note(request: Request, form: FormData) -> Response:
    """Set a run's name, note and tags."""
    output, store, record = find_run(request)
    title = " ".join(str(form.get("title", "")).split())[:120]
    note = str(form.get("note", "")).strip()[:2000]
    tags = [tag.strip()[:40] for tag in str(form.get("tags", "")).split(",") if tag.strip()][:20]

    def change(found: RunRecord) -> None:
        found.title, found.note, found.tags = title, note, tags

    store.update(record.run_id, change)
    return RedirectResponse(f"/runs/{output.key}/{record.run_id}", 303)


def remove(request: Request, form: FormData) -> Response:
    """Delete a run of the page's own folders, once its id is typed.

    Raises:
        HTTPException: It is somebody else's, or the id is not what was typed.
    """
    output, store, record = find_run(request)
    if not output.is_own:
        raise HTTPException(403, "This page deletes only in its own folder. Use `backprop runs rm` in a terminal.")
    if str(form.get("confirm", "")).strip() != record.run_id[-6:]:
        raise HTTPException(400, "Type the last six characters of the run's id to delete it.")
    store.remove(record.run_id)
    return RedirectResponse("/runs", 303)


def protect(request: Request, form: FormData) -> Response:
    """Keep a checkpoint for good."""
    output, store, record = find_run(request)
    CheckpointFolder(store.folder(record.run_id)).protect(whole_number(str(form.get("step", "")), -1))
    return RedirectResponse(f"/runs/{output.key}/{record.run_id}#h-checkpoints", 303)


def download_report(request: Request) -> Response:
    """One HTML file about the run, to share: no scripts, nothing loaded from elsewhere, secrets masked."""
    output, store, record = find_run(request)
    series = request.app.state.site.series.read(metrics_of(output, record))
    style = Markup(f"<style>{(HERE / 'static/page.css').read_text(encoding='utf-8')}</style>")  # noqa: S704  # our own file
    page = show(
        request,
        "report.html",
        **_summary(request, output, record, series),
        settings=redact_data(record.settings),
        rejected=_read_rejected(store, record),
        head=style,
        curve=_curve(series),
    )
    page.headers["Content-Disposition"] = f'attachment; filename="run-{record.run_id}.html"'
    return page


_CURVE = (720, 220)


def _curve(series: RunSeries) -> str:
    """The training loss as points of a polyline in a picture of `_CURVE`."""
    columns = series.points()["columns"]
    found = [(step, loss) for step, loss in zip(columns["step"], columns["loss"], strict=True) if loss is not None]
    if len(found) < 2:
        return ""
    (first, _), (last, _) = found[0], found[-1]
    low, high = min(loss for _, loss in found), max(loss for _, loss in found)
    width, height = _CURVE
    return " ".join(
        f"{width * (step - first) / max(1, last - first):.1f},{height * (high - loss) / ((high - low) or 1):.1f}"
        for step, loss in found
    )
