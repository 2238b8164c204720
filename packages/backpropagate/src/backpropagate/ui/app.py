"""The web application: its routes, and what every request passes through before one of them answers."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from http import HTTPStatus

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import FormData
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import RedirectResponse, Response
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles

from backpropagate.errors import JobNotFoundError, UiPathError
from backpropagate.ui.audit import Audit
from backpropagate.ui.background import BackgroundJobs
from backpropagate.ui.chats import Chats
from backpropagate.ui.folders import Places
from backpropagate.ui.live import SeriesCache
from backpropagate.ui.login import Passwords, Sessions
from backpropagate.ui.machine import Machine
from backpropagate.ui.pages import (
    chat,
    combine,
    comparisons,
    data,
    data_check,
    exports,
    home,
    jobs,
    models,
    runs,
    scorecard,
    training,
)
from backpropagate.ui.render import HERE, show
from backpropagate.ui.security import UPLOAD_PATH, Gate, LoginGate, comes_from_us, session_of
from backpropagate.ui_spec import UiSpec
from bp_runs.errors import CodedError, RecordInvalidError, RunNotFoundError, UserError
from bp_runs.redact import redact

_FORM_SECONDS = 20.0  # in which a form must have arrived
_UPLOAD_SECONDS = 15 * 60.0

Change = Callable[[Request, FormData], Response]
"""Answers a form that was found to come from us; may take its time."""


@dataclass(frozen=True, slots=True)
class Site:
    """What the pages share."""

    places: Places
    passwords: Passwords | None
    sessions: Sessions
    jobs: BackgroundJobs
    machine: Machine
    series: SeriesCache
    chats: Chats
    environ: Mapping[str, str]


def build_app(spec: UiSpec, places: Places) -> Gate:
    """The application, guarded; it does not look whether a password is needed, see `security.require_guarded`."""
    passwords = Passwords.of(spec.auth) if spec.auth else None
    cookie = f"backprop_{spec.port}"  # browsers do not tell ports apart
    sessions = Sessions(places.own, cookie)
    chats = Chats(places.own)

    @asynccontextmanager
    async def end_chats(_: Starlette) -> AsyncIterator[None]:
        yield
        await chats.close()

    app = Starlette(
        lifespan=end_chats,
        routes=build_routes(),
        middleware=[Middleware(sessions.layer), Middleware(LoginGate, has_password=passwords is not None)],
        exception_handlers={CodedError: _tell_coded, HTTPException: _tell_http, Exception: _tell_bug},
    )
    app.state.site = Site(
        places, passwords, sessions, BackgroundJobs(places.own), Machine(), SeriesCache(), Chats(places.own), os.environ
    )
    return Gate(app, spec, Audit(places.own))


def build_routes() -> list[Route | Mount]:
    """Every address of the page."""
    run = "/runs/{output}/{run}"
    return [
        Mount("/static", StaticFiles(directory=HERE / "static")),
        Route("/", home.show_home),
        Route("/home/state", home.show_home_state),
        Route("/settings", home.show_settings),
        Route("/chat", chat.show_chat),
        change("/chat/answer", chat.answer),
        Route("/chat/ollama", chat.find_in_ollama),
        change("/chat/pair", chat.hide),
        change("/chat/vote", chat.vote),
        Route("/multi-run", combine.show_multi_run),
        change("/multi-run", combine.start_multi_run),
        Route("/merge", combine.show_merge),
        change("/merge", combine.start_merge),
        Route("/login", _show_login),
        Route("/login", _log_in, methods=["POST"]),
        change("/logout", _log_out),
        Route("/runs", runs.show_table),
        Route("/runs/table", runs.show_rows),
        Route("/compare", comparisons.show_comparison),
        Route("/compare/points", comparisons.points),
        Route(run, runs.show_run),
        Route(f"{run}/points", runs.points),
        Route(f"{run}/events", runs.follow_run),
        Route(f"{run}/summary", runs.show_summary),
        Route(f"{run}/card", scorecard.show_scorecard),
        Route(f"{run}/report", runs.download_report),
        Route(f"{run}/steps.csv", runs.download_csv),
        change(f"{run}/note", runs.change_note),
        change(f"{run}/remove", runs.remove),
        change(f"{run}/protect", runs.protect),
        change(f"{run}/stop", training.stop),
        change(f"{run}/resume", training.go_on),
        Route("/train", training.show_form),
        change("/train", training.start),
        Route("/train/memory", training.show_verdict),
        Route("/data", data.show_data),
        Route("/data/preview", data_check.show_preview),
        Route("/data/check", data_check.show_check),
        Route("/data/train", data_check.train_on),
        change("/data/clean", data_check.clean),
        change(UPLOAD_PATH, data.upload, max_files=1, seconds=_UPLOAD_SECONDS),
        Route("/export", exports.show_exports),
        change("/export", exports.start),
        Route("/export/plan", exports.show_plan),
        Route("/models", models.show_models),
        Route("/models/presets", models.show_presets),
        change("/models/download", models.download),
        change("/models/remove", models.remove),
        Route("/queue", jobs.show_queue),
        Route("/queue/rows", jobs.show_queue_rows),
        change("/queue/{job}/remove", jobs.remove),
        change("/queue/{job}/move", jobs.move),
        change("/queue/clear", jobs.clear),
        Route("/jobs/{job}", jobs.show_job),
        Route("/jobs/{job}/state", jobs.show_job_state),
    ]


def change(path: str, answer: Change, *, max_files: int = 0, seconds: float = _FORM_SECONDS) -> Route:
    """A route that changes something: the form is read and must come from our own page, with its session's token.

    Args:
        max_files: Files that the form may have.
        seconds: In which it must have arrived.
    """

    async def endpoint(request: Request) -> Response:
        form = await read_form(request, max_files, seconds)
        try:
            return await run_in_threadpool(answer, request, form)
        finally:
            await form.close()

    return Route(path, endpoint, methods=["POST"])


async def read_form(request: Request, max_files: int = 0, seconds: float = _FORM_SECONDS) -> FormData:
    """The form of a request that changes something.

    Raises:
        HTTPException: It does not come from our own page with its session's token, or takes too long to arrive.
    """
    try:
        form = await asyncio.wait_for(request.form(max_files=max_files, max_fields=400), seconds)
    except TimeoutError as error:
        raise HTTPException(408, "the form did not arrive in time") from error
    token = form.get("token") or request.headers.get("x-token", "")
    if not isinstance(token, str) or not comes_from_us(request, token):
        await form.close()
        raise HTTPException(403, "this form is too old, or does not come from this page; load the page again")
    return form


def _show_login(request: Request) -> Response:
    if request.app.state.site.passwords is None or session_of(request).user:
        return RedirectResponse("/", 303)
    return show(request, "login.html", wrong=None)


async def _log_in(request: Request) -> Response:
    site: Site = request.app.state.site
    form = await read_form(request)
    if site.passwords is None:
        return RedirectResponse("/", 303)
    address = request.client.host if request.client else ""
    name, password = str(form.get("name", "")), str(form.get("password", ""))
    result = await site.passwords.check(address, name, password, session_of(request).id)
    if isinstance(result, bool):
        if result:
            request.scope["session"] = await run_in_threadpool(site.sessions.log_in, request.scope, name)
            return RedirectResponse("/", 303)
        return show(request, "login.html", wrong="Wrong name or password.", status=401)
    answer = show(request, "login.html", wrong="Too many attempts. Try again in a few seconds.", status=429)
    answer.headers["Retry-After"] = str(int(result) + 1)
    return answer


def _log_out(request: Request, _form: FormData) -> Response:
    site: Site = request.app.state.site
    request.scope["session"] = site.sessions.log_out(session_of(request))
    return RedirectResponse("/login" if site.passwords else "/", 303)


def _tell_coded(request: Request, error: Exception) -> Response:
    assert isinstance(error, CodedError)  # noqa: S101  # Starlette calls it for no other
    missing = isinstance(error, UiPathError | RunNotFoundError | JobNotFoundError)
    # A record that can't be read is no fault of the server: 422.
    status = (
        404
        if missing
        else 400
        if isinstance(error, UserError)
        else 422
        if isinstance(error, RecordInvalidError)
        else 500
    )
    request.scope["audit_note"] = error.code
    return show(request, "error.html", status=status, title=redact(error.message), error=error.to_dict())


def _tell_http(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)  # noqa: S101  # Starlette calls it for no other
    known = error.detail != HTTPStatus(error.status_code).phrase
    title = error.detail if known else {404: "There is no such page."}.get(error.status_code, error.detail)
    return show(request, "error.html", status=error.status_code, title=title, error=None)


def _tell_bug(request: Request, error: Exception) -> Response:
    """An edge: whatever is left is a bug; Starlette raises it again, so that the log has the traceback."""
    title = f"A mistake in backpropagate: {type(error).__name__}"
    return show(request, "error.html", status=500, title=title, error=None)
