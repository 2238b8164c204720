"""Who may see the page and who may change something: names of hosts, passwords, tokens of forms, headers.

A page on this machine can be reached by every other page that its user's browser shows, so that the local case is
guarded too: a request must name a host of ours (else a foreign name that leads here could read the answers, DNS
rebinding), and one that changes something must come from our own page (its origin) with the token of its session.
"""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import secrets
import socket
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import Request
from starlette.responses import PlainTextResponse, RedirectResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from backpropagate.errors import UiAuthError
from backpropagate.ui_spec import UiSpec
from bp_runs.errors import InvalidSettingError

SAFE_METHODS = frozenset({"GET", "HEAD"})
OPEN_PATHS = ("/static/", "/login")
MOST_BODY = 256 * 2**10  # bytes of a form
_SHORTEST_PASSWORD = 8
_LOOPBACK_NAMES = frozenset({"localhost", "127.0.0.1", "::1"})
_SCRYPT = {"n": 2**14, "r": 8, "p": 1, "maxmem": 64 * 2**20}

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


def require_guarded(spec: UiSpec) -> None:
    """Refuse a page that others would see without a password, before anything listens.

    Raises:
        UiAuthError: It is shared, or listens beyond this machine, and has no password.
        InvalidSettingError: The host is empty, or the password too short.
    """
    if not spec.host.strip():
        raise InvalidSettingError("ui.host is empty", fix="Stay local: {do:ui ui.host=127.0.0.1}")
    if spec.auth is not None:
        name, _, password = spec.auth.partition(":")
        if not name or len(password) < _SHORTEST_PASSWORD:
            raise InvalidSettingError(
                f"ui.auth must be a name, a colon and a password of at least {_SHORTEST_PASSWORD} characters",
                fix="Set it where no list of processes shows it: BACKPROPAGATE_UI__AUTH=user:password",
            )
    elif spec.share or not is_loopback(spec.host):
        where = "--share" if spec.share else f"--host {spec.host}"
        raise UiAuthError(f"{where} lets other machines see the page, and no password is set")


@dataclass(slots=True)
class Passwords:
    """Checks the one password, and makes whoever guesses wait."""

    name: str
    _salt: bytes
    _digest: bytes
    _wrong: dict[str, tuple[int, float]] = field(default_factory=dict)
    """By address: wrong guesses in a row, and until when no other one is looked at."""

    @classmethod
    def of(cls, auth: str) -> Passwords:
        """Of ``user:password``; the password itself is not kept."""
        name, _, password = auth.partition(":")
        salt = secrets.token_bytes(16)
        return cls(name, salt, _digest(password, salt))

    def wait(self, address: str) -> float:
        """Seconds until a guess from the address is looked at."""
        return max(0.0, self._wrong.get(address, (0, 0.0))[1] - time.monotonic())

    def check(self, address: str, name: str, password: str) -> bool:
        """Whether name and password are right; both are always compared, in the same time."""
        is_name = hmac.compare_digest(name.encode(), self.name.encode())
        is_right = hmac.compare_digest(_digest(password, self._salt), self._digest) and is_name
        if is_right:
            self._wrong.pop(address, None)
        else:
            guesses = self._wrong.get(address, (0, 0.0))[0] + 1
            if len(self._wrong) >= _MOST_ADDRESSES:
                self._wrong.clear()
            self._wrong[address] = (guesses, time.monotonic() + min(60.0, 2.0 ** (guesses - 1)))
        return is_right


_MOST_ADDRESSES = 10_000


def _digest(password: str, salt: bytes) -> bytes:
    return hashlib.scrypt(password.encode(), salt=salt, **_SCRYPT)


def token_of(request: Request) -> str:
    """The session's token, which every form of ours carries; made at the first look."""
    token = request.session.setdefault("token", secrets.token_urlsafe(24))
    return str(token)


def comes_from_us(request: Request, token: str) -> bool:
    """Whether a request that changes something has our origin and its session's token."""
    wanted = request.session.get("token", "")
    if not wanted or not hmac.compare_digest(str(wanted).encode(), token.encode()):
        return False
    origin = request.headers.get("origin")
    if origin is not None and urlsplit(origin).netloc != request.headers.get("host"):
        return False
    return request.headers.get("sec-fetch-site", "same-origin") in ("same-origin", "none")


class Gate:
    """The outermost layer: hosts that are not ours are refused, bodies are short, every answer has the headers."""

    def __init__(self, app: ASGIApp, spec: UiSpec) -> None:
        self._app = app
        self._names = _LOOPBACK_NAMES | {name.lower() for name in spec.allowed_hosts}
        self._is_local = is_loopback(spec.host) and not spec.share
        if not self._is_local:
            self._names |= {socket.gethostname().lower(), spec.host.lower()}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http":
            return
        headers = Headers(scope=scope)
        refusal = self._refuse(headers, scope["method"])
        await (refusal or self._app)(scope, receive, _with_headers(send, scope["path"]))

    def _refuse(self, headers: Headers, method: str) -> PlainTextResponse | None:
        if not self._is_ours(headers.get("host", "")):
            return PlainTextResponse("this page is not served under that name\n", 421)
        if method in SAFE_METHODS:
            return None
        length = headers.get("content-length", "")
        if not length.isdigit():
            return PlainTextResponse("the length of the form is missing\n", 411)
        return PlainTextResponse("the form is too long\n", 413) if int(length) > MOST_BODY else None

    def _is_ours(self, host: str) -> bool:
        try:
            name = urlsplit(f"//{host}").hostname or ""
        except ValueError:
            return False
        if name.rstrip(".") in self._names:
            return True
        # An address is no name that somebody else could let lead here.
        return not self._is_local and _is_address(name)


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

    def __init__(self, app: ASGIApp, passwords: Passwords | None) -> None:
        self._app = app
        self._passwords = passwords

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        path = scope["path"]
        is_open = self._passwords is None or any(path.startswith(open_) for open_ in OPEN_PATHS)
        if scope["type"] != "http" or is_open or scope["session"].get("user"):
            await self._app(scope, receive, send)
            return
        if scope["method"] in SAFE_METHODS and "hx-request" not in Headers(scope=scope):
            await RedirectResponse("/login", 303)(scope, receive, send)
            return
        refusal = PlainTextResponse("log in first\n", 401, {"HX-Redirect": "/login"})
        await refusal(scope, receive, send)
