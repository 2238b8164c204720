"""What the page has started: each job with its last lines, and the queue of those that wait."""

from __future__ import annotations

import re
from typing import Any

from starlette.datastructures import FormData
from starlette.requests import Request
from starlette.responses import RedirectResponse, Response

from backpropagate.ui.background import CAN_STOP, BackgroundJobs, command_line, output_of
from backpropagate.ui.render import show, whole_number

_STOP_POLLING = 286
"""HTMX's own status: the answer is shown, and not requested again."""
_SHOWN = 100
_AFTER = {
    "export": ("/export", "Show exports"),
    "download": ("/models", "Show models"),
    "merge": ("/chat", "Chat with it"),
    "train": ("/train", "Back to the form"),
    "multi-run": ("/multi-run", "Back to the form"),
}
"""Where to go after a job, by its command."""
_WORDS = {
    "train": "Starting training",
    "replay": "Starting training",
    "resume": "Resuming training",
    "multi-run": "Starting the multi-run",
    "merge": "Merging adapters",
    "export": "Exporting",
    "download": "Getting a model",
}
"""What a job does, by its command."""
_SHARE = re.compile(r"^\s*(\d{1,3})%", re.MULTILINE)


def show_job(request: Request) -> Response:
    """A job, until its run is there."""
    return _show_job(request, "job.html")


def show_job_state(request: Request) -> Response:
    """The part of that page that moves; once the run is there, the browser is sent to it."""
    return _show_job(request, "parts/job_state.html")


def _show_job(request: Request, template: str) -> Response:
    site = request.app.state.site
    jobs: BackgroundJobs = site.jobs
    job = jobs.find(request.path_params["job"])
    jobs.run_queue()
    is_part = template.startswith("parts/")
    run_id = jobs.run_of(job)
    if run_id is not None:
        key = next((o.key for o in site.places.outputs() if o.path == output_of(job)), "")
        address = f"/runs/{key}/{run_id}"
        return Response(headers={"HX-Redirect": address}) if is_part else RedirectResponse(address, 303)
    status = 200 if jobs.is_alive(job) or not is_part else _STOP_POLLING
    log = jobs.log_of(job)
    shares = _SHARE.findall(log)
    share = int(shares[-1]) if shares and job.state == "running" else None
    open_ = [other.id for other in jobs.queue.jobs() if other.state in ("waiting", "running")]
    before = open_.index(job.id) if job.state == "waiting" and job.id in open_ else 0
    after = _AFTER.get(job.argv[0])
    described = _describe(jobs, job)
    return show(request, template, **described, log=log, share=share, after=after, before=before, status=status)


def _describe(jobs: BackgroundJobs, job: Any) -> dict[str, Any]:
    is_alive = jobs.is_alive(job)
    state = "lost" if job.state == "running" and not is_alive else job.state
    return {
        "job": job,
        "command": command_line(job),
        "is_alive": is_alive,
        "state": state,
        "has_run": output_of(job) is not None,
        "what": _WORDS.get(job.argv[0], job.argv[0].capitalize()),
        "can_stop": job.state == "waiting" or (is_alive and CAN_STOP),
    }


def show_queue(request: Request) -> Response:
    """The page of all jobs."""
    return show(request, "queue.html", rows=_rows(request))


def show_queue_rows(request: Request) -> Response:
    """Its table alone."""
    return show(request, "parts/queue_rows.html", rows=_rows(request))


def _rows(request: Request) -> list[dict[str, Any]]:
    jobs: BackgroundJobs = request.app.state.site.jobs
    jobs.run_queue()
    found = [_describe(jobs, job) for job in jobs.queue.jobs()]
    open_ = [row for row in found if row["state"] in ("running", "waiting")]
    ended = [row for row in found[::-1] if row["state"] not in ("running", "waiting")]
    return [*open_, *ended][:_SHOWN]


def remove(request: Request, _form: FormData) -> Response:
    """Remove a waiting job, or ask a running one to save and end."""
    jobs: BackgroundJobs = request.app.state.site.jobs
    jobs.cancel(jobs.find(request.path_params["job"]))
    return RedirectResponse("/queue", 303)


def move(request: Request, form: FormData) -> Response:
    """Move a waiting job up or down."""
    jobs: BackgroundJobs = request.app.state.site.jobs
    job = jobs.find(request.path_params["job"])
    by = whole_number(str(form.get("by", "")).removeprefix("-"), 0)
    jobs.queue.move(job.id, -by if str(form.get("by", "")).startswith("-") else by)
    return RedirectResponse("/queue", 303)


def clear(request: Request, _form: FormData) -> Response:
    """Remove every job that has ended."""
    request.app.state.site.jobs.queue.remove_ended()
    return RedirectResponse("/queue", 303)
