"""The audit log of the web page: who tried what, from where, and how it was answered.

    <own>/audit.jsonl    {"at", "address", "user", "method", "path", "status", "note"}, one line each

It has every request that changes something, every login, every rejection, and every cookie that is forged or whose
login has ended. Queries and forms are left out, since they can hold secrets.
"""

from __future__ import annotations

import os
import threading
from contextlib import suppress
from pathlib import Path
from typing import Any

import orjson

from bp_runs.record import utc_now
from bp_runs.redact import redact

AUDIT_FILE = "audit.jsonl"
_MOST_BYTES = 4 * 2**20  # then the log moves to audit.1.jsonl, in the place of the one there
_LONGEST = 200  # characters of a path


class Audit:
    """Appends to the log; a disk that has no room costs the line, never the answer."""

    def __init__(self, folder: Path) -> None:
        self.file = folder / AUDIT_FILE
        self._lock = threading.Lock()

    def write(self, scope: Any, status: int, note: str | None = None) -> None:
        """Note one request.

        Args:
            scope: The request's ASGI scope.
            status: HTTP status of the answer.
            note: Why it was rejected, if the status does not say it.
        """
        session = scope.get("session")
        line = {
            "at": utc_now(),
            "address": (scope.get("client") or ("",))[0],
            "user": session.user if session else None,
            "method": scope["method"],
            "path": redact(scope["path"][:_LONGEST]),
            "status": status,
            "note": note or scope.get("audit_note"),
        }
        data = orjson.dumps(line, option=orjson.OPT_APPEND_NEWLINE)
        with self._lock, suppress(OSError):
            if self.file.exists() and self.file.stat().st_size > _MOST_BYTES:
                self.file.replace(self.file.with_name("audit.1.jsonl"))
            with os.fdopen(os.open(self.file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), "wb") as out:
                out.write(data)
