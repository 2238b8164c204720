"""Who is logged in: the password check and its back-off, and sessions that the server can end.

A session cookie holds a random id and its signature. Whether somebody is logged in under that id is the server's
knowledge, so that logging out, or the end of the time, also ends every copy of the cookie. The signing key stays on
disk, so a restart of the server breaks no open form.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import os
import secrets
import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import orjson
from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import cookie_parser
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from bp_runs.files import coded_disk_errors

SESSION_SECONDS = 12 * 60 * 60.0
"""A login ends after this long, whatever happens."""
IDLE_SECONDS = 2 * 60 * 60.0
"""And after this long without a request that a person made."""
POLLED = ("/table", "/events", "/points", "/summary", "/state", "/queue/rows")
"""Ends of addresses that an open tab asks for by itself; they keep no session alive."""
_MOST_LOGINS = 1000
_SCRYPT = {"n": 2**14, "r": 8, "p": 1, "maxmem": 64 * 2**20}
_MOST_GUESSES = 3  # wrong passwords of one address and name before each further one waits its turn
_MOST_WAITING = 16  # attempts of one address and name that may wait
_MOST_HASHES = 64  # attempts of everybody that may wait for the one hash that is computed at a time
_LONGEST_PAUSE = 2.0  # seconds between two looks at passwords of one address and name
_MOST_NAMES = 10_000


def write_private(file: Path, data: bytes) -> None:
    """Publish a file that only this user can read.

    Raises:
        DiskFullError, OutputNotWritableError: It cannot be written.
    """
    partial = file.with_name(f".{file.name}.{secrets.token_hex(4)}")
    with coded_disk_errors(file):
        file.parent.mkdir(parents=True, exist_ok=True)
        try:
            with os.fdopen(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as out:
                out.write(data)
            partial.replace(file)
        finally:
            partial.unlink(missing_ok=True)


def load_secret(folder: Path) -> bytes:
    """The key that signs cookies and form tokens, made at the first start; 32 bytes.

    Raises:
        DiskFullError, OutputNotWritableError: It cannot be written.
    """
    file = folder / ".secret"
    with suppress(OSError):
        found = file.read_bytes()
        if len(found) == 32:
            return found
    made = secrets.token_bytes(32)
    write_private(file, made)
    return made


@dataclass(slots=True)
class Session:
    """What a request knows of its browser."""

    id: str
    user: str | None
    token: str
    """Every form that changes something carries it."""


class Sessions:
    """The sessions of one page; an ASGI layer that puts a `Session` into ``scope["session"]``."""

    def __init__(self, folder: Path, cookie: str, clock: Callable[[], float] = time.time) -> None:
        self._file = folder / ".logins.json"
        self._key = load_secret(folder)
        self._cookie = cookie
        self._clock = clock
        self._logins = self._load()
        """By hash of the session's id: user, beginning and last use; the ids themselves are on no disk."""
        self._ended: OrderedDict[str, None] = OrderedDict()
        """Hashes of logins that ended while this server ran: whoever still comes with one is noted."""

    def layer(self, app: ASGIApp) -> ASGIApp:
        """``app`` behind the sessions."""

        async def with_session(scope: Scope, receive: Receive, send: Send) -> None:
            if scope["type"] != "http":
                await app(scope, receive, send)
                return
            given = cookie_parser(Headers(scope=scope).get("cookie", "")).get(self._cookie, "")
            scope["session"] = session = self._open(given, scope)

            async def send_cookie(message: Message) -> None:
                if message["type"] == "http.response.start":
                    now: Session = scope["session"]
                    if now.id != session.id or self._spell(now.id) != given:
                        self._set(MutableHeaders(scope=message), now.id, is_secure=scope["scheme"] == "https")
                await send(message)

            await app(scope, receive, send_cookie)

        return with_session

    def log_in(self, scope: Mapping[str, Any], user: str) -> Session:
        """A new session of a user: its id and token were never shown to anybody else."""
        self._logins.pop(_hash(scope["session"].id), None)
        session = self._make(secrets.token_urlsafe(24), user)
        now = self._clock()
        self._logins[_hash(session.id)] = (user, now, now)
        while len(self._logins) > _MOST_LOGINS:
            self._logins.popitem(last=False)
        self._save()
        return session

    def log_out(self, session: Session) -> Session:
        """End a session, and every copy of its cookie; returns a new one of nobody."""
        if self._logins.pop(_hash(session.id), None):
            self._note_end(_hash(session.id))
        return self._make(secrets.token_urlsafe(24), None)

    def is_valid(self, session: Session) -> bool:
        """Whether the session still is what it was when its request came: for answers that take long."""
        return session.user is None or self._user(session.id) == session.user

    def _open(self, given: str, scope: Scope) -> Session:
        """The session of a cookie's value; the audit log hears of one that is forged, or of a login that has ended."""
        session_id, _, signature = given.partition(".")
        if not session_id or not hmac.compare_digest(signature.encode(), self._sign("cookie", session_id).encode()):
            if given:
                scope["audit_note"] = "forged cookie"
            return self._make(secrets.token_urlsafe(24), None)
        user = self._user(session_id)
        if user is None and _hash(session_id) in self._ended:
            scope["audit_note"] = "cookie of an ended login"
        if user is not None and not scope["path"].endswith(POLLED):
            name, begun, _ = self._logins[_hash(session_id)]
            self._logins[_hash(session_id)] = (name, begun, self._clock())
        return self._make(session_id, user)

    def _user(self, session_id: str) -> str | None:
        found = self._logins.get(_hash(session_id))
        if found is None:
            return None
        user, begun, used = found
        now = self._clock()
        if now - begun > SESSION_SECONDS or now - used > IDLE_SECONDS:
            del self._logins[_hash(session_id)]
            self._note_end(_hash(session_id))
            return None
        return user

    def _note_end(self, hashed: str) -> None:
        self._ended[hashed] = None
        while len(self._ended) > _MOST_LOGINS:
            self._ended.popitem(last=False)
        self._save()

    def _make(self, session_id: str, user: str | None) -> Session:
        return Session(session_id, user, self._sign("form", session_id))

    def _spell(self, session_id: str) -> str:
        return f"{session_id}.{self._sign('cookie', session_id)}"

    def _sign(self, purpose: str, session_id: str) -> str:
        return hmac.new(self._key, f"{purpose}:{session_id}".encode(), hashlib.sha256).hexdigest()[:40]

    def _set(self, headers: MutableHeaders, session_id: str, *, is_secure: bool) -> None:
        words = [f"{self._cookie}={self._spell(session_id)}", "path=/", f"Max-Age={SESSION_SECONDS:.0f}"]
        words += ["httponly", "samesite=strict", *(["secure"] if is_secure else [])]
        headers.append("set-cookie", "; ".join(words))

    def _load(self) -> OrderedDict[str, tuple[str, float, float]]:
        try:
            found = orjson.loads(self._file.read_bytes())
            return OrderedDict((key, (str(u), float(b), float(s))) for key, (u, b, s) in found.items())
        except (OSError, orjson.JSONDecodeError, AttributeError, TypeError, ValueError):
            return OrderedDict()

    def _save(self) -> None:
        write_private(self._file, orjson.dumps(self._logins))


def _hash(session_id: str) -> str:
    return hashlib.sha256(session_id.encode()).hexdigest()


@dataclass(slots=True)
class Passwords:
    """Checks the one password.

    Hashes are computed one at a time, so that a flood of guesses takes neither memory nor all processors. After a few
    wrong ones, an address and name get one look every two seconds, in turns among their browsers. So guesses are slow
    however many come at once, and whoever has the right password gets in within seconds.
    """

    name: str
    _salt: bytes
    _digest: bytes
    _hashing: asyncio.Lock = field(default_factory=asyncio.Lock)
    _waiting: int = 0
    _lanes: OrderedDict[tuple[str, str], _Lane] = field(default_factory=OrderedDict)
    """By address and name."""

    @classmethod
    def of(cls, auth: str) -> Passwords:
        """Of ``user:password``; the password itself is not kept."""
        name, _, password = auth.partition(":")
        salt = secrets.token_bytes(16)
        return cls(name, salt, _digest(password, salt))

    async def check(self, address: str, name: str, password: str, browser: str) -> bool | float:
        """Whether name and password are right; or how many seconds to wait, where they were not looked at.

        Args:
            address: Where the attempt comes from.
            browser: The session's id; attempts of several take turns.
        """
        lane = self._lane(address, name)
        if lane.wrong >= _MOST_GUESSES:
            if sum(lane.waiting.values()) >= _MOST_WAITING or lane.waiting[browser] >= 2:
                return _LONGEST_PAUSE
            await lane.take_turn(browser)
        if self._waiting >= _MOST_HASHES:
            return _LONGEST_PAUSE
        self._waiting += 1
        try:
            async with self._hashing:
                digest = await asyncio.to_thread(_digest, password[:1024], self._salt)
        finally:
            self._waiting -= 1
        is_name = hmac.compare_digest(name.encode(), self.name.encode())
        is_right = hmac.compare_digest(digest, self._digest) and is_name
        lane.wrong = 0 if is_right else lane.wrong + 1
        return is_right

    def _lane(self, address: str, name: str) -> _Lane:
        lane = self._lanes.setdefault((address, name[:64]), _Lane())
        self._lanes.move_to_end((address, name[:64]))
        while len(self._lanes) > _MOST_NAMES:
            self._lanes.popitem(last=False)
        return lane


@dataclass(slots=True)
class _Lane:
    """Attempts of one address and name after too many wrong ones."""

    wrong: int = 0
    waiting: Counter[str] = field(default_factory=Counter)
    """Attempts that wait, by browser."""
    served: Counter[str] = field(default_factory=Counter)
    """Looks that each waiting browser has had."""
    next_look: float = 0.0

    async def take_turn(self, browser: str) -> None:
        """Wait for a look; the browser that has had the fewest goes first."""
        self.waiting[browser] += 1
        try:
            while True:
                pause = self.next_look - time.monotonic()
                first = min(self.waiting, key=lambda b: self.served[b])
                if pause <= 0 and self.served[browser] <= self.served[first]:
                    self.next_look = time.monotonic() + min(_LONGEST_PAUSE, 0.25 * 2 ** min(self.wrong, 8) / 8)
                    self.served[browser] += 1
                    return
                await asyncio.sleep(max(0.02, pause))
        finally:
            self.waiting[browser] -= 1
            if not self.waiting[browser]:
                del self.waiting[browser]
            if not self.waiting:
                self.served.clear()


def _digest(password: str, salt: bytes) -> bytes:
    return hashlib.scrypt(password.encode(), salt=salt, **_SCRYPT)
