"""The web application: its routes, and what every request passes through before one of them answers."""

from __future__ import annotations

import secrets
from collections.abc import Callable
from dataclasses import dataclass
from http import HTTPStatus

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import FormData
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.sessions import SessionMiddleware
from starlette.requests import Request
from starlette.responses import RedirectResponse, Response
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles

from backpropagate.errors import UiPathError
from backpropagate.ui.background import Launches
from backpropagate.ui.folders import Places
from backpropagate.ui.machine import Machine
from backpropagate.ui.pages import comparisons, data, exports, models, runs, scorecard, training
from backpropagate.ui.render import HERE, show
from backpropagate.ui.security import Gate, LoginGate, Passwords, comes_from_us
from backpropagate.ui_spec import UiSpec
from bp_runs.errors import CodedError, RunNotFoundError, UserError
from bp_runs.redact import redact

_SESSION_SECONDS = 12 * 60 * 60

Change = Callable[[Request, FormData], Response]
"""Answers a form that was found to come from us; may take its time."""


@dataclass(frozen=True, slots=True)
class Site:
    """What the pages share."""

    places: Places
    passwords: Passwords | None
    launches: Launches
    machine: Machine


def build_app(spec: UiSpec, places: Places) -> Gate:
    """The application, guarded; it does not look whether a password is needed, see `security.require_guarded`."""
    passwords = Passwords.of(spec.auth) if spec.auth else None
    cookie = f"backprop_{spec.port}"  # browsers do not tell ports apart
    app = Starlette(
        routes=build_routes(),
        middleware=[
            Middleware(
                SessionMiddleware,
                secret_key=secrets.token_urlsafe(32),
                session_cookie=cookie,
                max_age=_SESSION_SECONDS,
                same_site="strict",
            ),
            Middleware(LoginGate, passwords=passwords),
        ],
        exception_handlers={CodedError: _tell_coded, HTTPException: _tell_http, Exception: _tell_bug},
    )
    app.state.site = Site(places, passwords, Launches(places.own), Machine())
    return Gate(app, spec)


def build_routes() -> list[Route | Mount]:
    """Every address of the page."""
    run = "/runs/{output}/{run}"
    return [
        Mount("/static", StaticFiles(directory=HERE / "static")),
        Route("/", lambda _: RedirectResponse("/runs", 303)),
        Route("/login", _show_login),
        change("/login", _log_in),
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
        change(f"{run}/stop", training.stop),
        change(f"{run}/resume", training.go_on),
        Route("/train", training.show_form),
        change("/train", training.start),
        Route("/train/memory", training.show_verdict),
        Route("/data", data.show_data),
        Route("/data/preview", data.show_preview),
        Route("/data/check", data.show_check),
        Route("/export", exports.show_exports),
        change("/export", exports.start),
        Route("/models", models.show_models),
        Route("/launches/{launch}", training.show_launch),
        Route("/launches/{launch}/state", training.show_launch_state),
    ]


def change(path: str, answer: Change) -> Route:
    """A route that changes something: the form is read and must come from our own page, with its session's token."""

    async def endpoint(request: Request) -> Response:
        form = await request.form(max_files=0, max_fields=400)
        token = form.get("token") or request.headers.get("x-token", "")
        if not isinstance(token, str) or not comes_from_us(request, token):
            raise HTTPException(403, "this form is too old, or does not come from this page; load the page again")
        return await run_in_threadpool(answer, request, form)

    return Route(path, endpoint, methods=["POST"])


def _show_login(request: Request) -> Response:
    if request.app.state.site.passwords is None or request.session.get("user"):
        return RedirectResponse("/runs", 303)
    return show(request, "login.html", wrong=None)


def _log_in(request: Request, form: FormData) -> Response:
    passwords: Passwords | None = request.app.state.site.passwords
    if passwords is None:
        return RedirectResponse("/runs", 303)
    address = request.client.host if request.client else ""
    if wait := passwords.wait(address):
        wrong = f"Too many wrong passwords; try again in {wait:.0f} s."
        answer = show(request, "login.html", wrong=wrong, status=429)
        answer.headers["Retry-After"] = str(int(wait) + 1)
        return answer
    name, password = str(form.get("name", "")), str(form.get("password", ""))
    if not passwords.check(address, name, password):
        return show(request, "login.html", wrong="That name and password do not go together.", status=401)
    request.session.clear()  # a new token: the old one was given to somebody unknown
    request.session["user"] = name
    return RedirectResponse("/runs", 303)


def _log_out(request: Request, _form: FormData) -> Response:
    request.session.clear()
    return RedirectResponse("/login" if request.app.state.site.passwords else "/runs", 303)


def _tell_coded(request: Request, error: Exception) -> Response:
    assert isinstance(error, CodedError)  # noqa: S101  # Starlette calls it for no other
    missing = isinstance(error, UiPathError | RunNotFoundError)
    status = 404 if missing else 400 if isinstance(error, UserError) else 500
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
