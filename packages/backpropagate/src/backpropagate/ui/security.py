"""Which requests are answered at all: names of hosts, tokens of forms, headers, and the login.

A page on this machine can be reached by every other page that its user's browser shows, so that the local case is
guarded too: a request must name a host of ours (else a foreign name that leads here could read the answers, DNS
rebinding), and one that changes something must come from our own page (its origin) with the token of its session.
"""

from __future__ import annotations

import asyncio
import hmac
import ipaddress
import socket
from collections.abc import Mapping
from dataclasses import replace
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import Request
from starlette.responses import PlainTextResponse, RedirectResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from backpropagate.errors import UiAuthError
from backpropagate.system import to_path
from backpropagate.ui.audit import Audit
from backpropagate.ui.login import Session
from backpropagate.ui_spec import UiSpec
from bp_runs.errors import InvalidSettingError

SAFE_METHODS = frozenset({"GET", "HEAD"})
OPEN_PATHS = ("/static/", "/login")
MOST_BODY = 256 * 2**10  # bytes of a form
UPLOAD_PATH = "/data/upload"
MOST_UPLOAD = 2 * 2**30  # bytes of a data file; longer ones are opened where they are
_MOST_DIGITS = 12  # of a length
_REFUSED = 400  # HTTP statuses from here on are rejections
_LOOPBACK_NAMES = frozenset({"localhost", "127.0.0.1", "::1"})

HEADERS: Mapping[str, str] = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
        "form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    # With no-referrer browsers would send "Origin: null" with our own forms.
    "Referrer-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "camera=(), microphone=(), geolocation=()",
}


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches the address; a name other than localhost counts as reachable."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


SHORT_PASSWORD = 8
"""A password with fewer characters is accepted with a warning."""


def read_auth(spec: UiSpec) -> UiSpec:
    """The settings with ``auth`` from the file that ``auth_file`` names.

    Raises:
        InvalidSettingError: Both are set, or the file can't be read.
    """
    if spec.auth_file is None:
        return spec
    if spec.auth is not None:
        raise InvalidSettingError(
            "ui.auth and ui.auth_file both set a password", fix="Leave one of them out.", setting="ui.auth_file"
        )
    file = to_path(spec.auth_file)
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidSettingError(
            f"{file} can't be read",
            cause=str(error),
            fix=f"Write user:password into it: {file}",
            setting="ui.auth_file",
        ) from error
    return replace(spec, auth=lines[0].strip() if lines else "", auth_file=None)


def require_guarded(spec: UiSpec) -> None:
    """Reject a page that others would see without a password, before anything listens.

    Raises:
        UiAuthError: It is shared, or listens beyond this machine, and has no password.
        InvalidSettingError: The host is empty, or the password too short.
    """
    if not spec.host.strip():
        raise InvalidSettingError("ui.host is empty", fix="Stay local: {do:ui ui.host=127.0.0.1}")
    if spec.auth is not None:
        name, _, password = spec.auth.partition(":")
        if not name or not password:
            raise InvalidSettingError(
                "ui.auth must be a name, a colon and a password",
                fix="Set it where no list of processes shows it: BACKPROPAGATE_UI__AUTH=user:password",
            )
        return
    public = [name for name in spec.allowed_hosts if not is_loopback(name)]
    opened = "{set:ui.share=true}" if spec.share else f"{{set:ui.host={spec.host}}}"
    if not spec.share and is_loopback(spec.host):
        if not public:
            return
        opened = f"{{set:ui.allowed_hosts={public[0]}}}"
    raise UiAuthError(f"{opened} lets other machines see the page, and no password is set")


def session_of(request: Request) -> Session:
    """The session of a request."""
    found: Session = request.scope["session"]
    return found


def comes_from_us(request: Request, token: str) -> bool:
    """Whether a request that changes something has our origin and its session's token."""
    if not hmac.compare_digest(session_of(request).token.encode(), token.encode()):
        return False
    origin = request.headers.get("origin")
    if origin is not None and urlsplit(origin).netloc != request.headers.get("host"):
        return False
    return request.headers.get("sec-fetch-site", "same-origin") in ("same-origin", "none")


class Gate:
    """The outermost layer: hosts that are not ours are rejected, bodies are short, every answer has the headers."""

    def __init__(self, app: ASGIApp, spec: UiSpec, audit: Audit) -> None:
        self._app = app
        self._audit = audit
        self._proxies = frozenset(spec.trusted_proxies)
        self._names = _LOOPBACK_NAMES | {name.lower() for name in spec.allowed_hosts} | {spec.host.lower()}
        self._is_local = is_loopback(spec.host) and not spec.share
        if not self._is_local:
            self._names |= {socket.gethostname().lower()}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
        if scope["type"] != "http":
            return
        headers = Headers(scope=scope)
        if (scope.get("client") or ("",))[0] in self._proxies:
            _take_forwarded(scope, headers, self._proxies)
        refusal = self._refuse(headers, scope["method"], scope["path"])
        await (refusal or self._app)(scope, receive, self._audited(scope, _with_headers(send, scope["path"])))

    def _audited(self, scope: Scope, send: Send) -> Send:
        """Note what changes something and what is rejected, once it is answered."""

        async def send_noted(message: Message) -> None:
            if message["type"] == "http.response.start":
                status = int(message["status"])
                if scope["method"] not in SAFE_METHODS or status >= _REFUSED or scope.get("audit_note"):
                    await asyncio.to_thread(self._audit.write, scope, status)
            await send(message)

        return send_noted

    def _refuse(self, headers: Headers, method: str, path: str) -> PlainTextResponse | None:
        if not self._is_ours(headers.get("host", "")):
            return PlainTextResponse("this page is not served under that name\n", 421)
        if method in SAFE_METHODS:
            return None
        length = headers.get("content-length", "")
        if not length.isdigit():
            return PlainTextResponse("the length of the form is missing\n", 411)
        most = MOST_UPLOAD if path == UPLOAD_PATH else MOST_BODY
        is_long = len(length) > _MOST_DIGITS or int(length) > most
        return PlainTextResponse("the form is too long\n", 413) if is_long else None

    def _is_ours(self, host: str) -> bool:
        try:
            name = urlsplit(f"//{host}").hostname or ""
        except ValueError:
            return False
        if name.rstrip(".") in self._names:
            return True
        # An address is no name that somebody else could let lead here.
        return not self._is_local and _is_address(name)


def _take_forwarded(scope: Scope, headers: Headers, proxies: frozenset[str]) -> None:
    """Believe a trusted proxy about its client: the last address in ``X-Forwarded-For`` that is no such proxy."""
    named = [part.strip() for part in headers.get("x-forwarded-for", "").split(",")]
    others = [name for name in named if _is_address(name) and name not in proxies]
    if others:
        scope["client"] = (others[-1], 0)
    if headers.get("x-forwarded-proto") == "https":
        scope["scheme"] = "https"


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def _with_headers(send: Send, path: str) -> Send:
    async def send_with(message: Message) -> None:
        if message["type"] == "http.response.start":
            headers = MutableHeaders(scope=message)
            for name, value in HEADERS.items():
                headers[name] = value
            headers.setdefault("Cache-Control", "no-cache" if path.startswith("/static/") else "no-store")
        await send(message)

    return send_with


class LoginGate:
    """Sends whoever has not logged in to the login page, where a password is set."""

    def __init__(self, app: ASGIApp, *, has_password: bool) -> None:
        self._app = app
        self._has_password = has_password

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        is_open = not self._has_password or any(scope.get("path", "").startswith(open_) for open_ in OPEN_PATHS)
        if scope["type"] != "http" or is_open or scope["session"].user:
            await self._app(scope, receive, send)
            return
        if scope["method"] in SAFE_METHODS and "hx-request" not in Headers(scope=scope):
            await RedirectResponse("/login", 303)(scope, receive, send)
            return
        refusal = PlainTextResponse("log in first\n", 401, {"HX-Redirect": "/login"})
        await refusal(scope, receive, send)
