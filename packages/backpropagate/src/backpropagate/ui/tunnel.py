"""A public https address for the page, by `cloudflared`, which the user has installed: no account, no open port."""

from __future__ import annotations

import re
import shutil
import subprocess
import threading
from collections import deque
from dataclasses import dataclass
from typing import IO, Self
from urllib.parse import urlsplit

from backpropagate.errors import UiTunnelError
from bp_runs.redact import redact

PROGRAM = "cloudflared"
_ADDRESS = re.compile(r"https://[a-z0-9-]+(?:\.[a-z0-9-]+)*\.trycloudflare\.com")
_WAIT_SECONDS = 40.0  # until the address is known
_END_SECONDS = 5.0


@dataclass(slots=True)
class Tunnel:
    """A running `cloudflared`."""

    address: str
    """What people open, as https://….trycloudflare.com."""
    _process: subprocess.Popen[str]

    @property
    def host(self) -> str:
        """The host name of the address."""
        return urlsplit(self.address).hostname or ""

    @classmethod
    def open(cls, local: str) -> Self:
        """Start `cloudflared` for a local address, and wait for the public one.

        Raises:
            UiTunnelError: It ends, or names no address in time.
        """
        command = [shutil.which(PROGRAM) or PROGRAM, "tunnel", "--no-autoupdate", "--url", local]
        try:
            process = subprocess.Popen(  # noqa: S603  # the user installed it
                command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
            )
        except OSError as error:
            raise UiTunnelError(f"{PROGRAM} can't be started", cause=error.strerror) from error
        assert process.stderr is not None  # noqa: S101  # opened as a pipe
        reader = _Reader(process.stderr)
        if not reader.address:
            process.kill()
            process.wait()
            raise UiTunnelError(f"{PROGRAM} named no public address", cause=redact(" / ".join(reader.last)) or None)
        return cls(reader.address, process)

    def close(self) -> None:
        """End it."""
        self._process.terminate()
        try:
            self._process.wait(_END_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


class _Reader:
    """Reads what `cloudflared` prints, to its end, so that the pipe never fills; the address is in one of the lines."""

    def __init__(self, lines: IO[str]) -> None:
        self.address = ""
        self.last: deque[str] = deque(maxlen=3)
        self._known = threading.Event()
        threading.Thread(target=self._read, args=(lines,), daemon=True).start()
        self._known.wait(_WAIT_SECONDS)

    def _read(self, lines: IO[str]) -> None:
        with lines:
            for line in lines:
                self.last.append(line.strip()[:200])
                found = _ADDRESS.search(line)
                if found and not self.address:
                    self.address = found[0]
                    self._known.set()
        self._known.set()


def find_tunnel() -> str | None:
    """The path of `cloudflared`; None where it is not installed."""
    return shutil.which(PROGRAM)
