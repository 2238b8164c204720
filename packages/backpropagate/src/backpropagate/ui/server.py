"""Listens, tells the address, and serves until Ctrl-C."""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import uvicorn

from backpropagate.errors import UiPortError
from backpropagate.ui.app import build_app
from backpropagate.ui.folders import Places, find_places
from backpropagate.ui.security import is_loopback, require_guarded
from backpropagate.ui_spec import UiSpec
from bp_runs.files import require_folder

_EVERYWHERE = "0.0.0.0"  # noqa: S104  # only with a password, see security.require_guarded
_WAIT_SECONDS = 2  # for open pages, when the server is closed


@dataclass(frozen=True, slots=True)
class Server:
    """A page that is listened for; a context manager that closes it."""

    spec: UiSpec
    places: Places
    socket: socket.socket

    @classmethod
    def open(cls, spec: UiSpec, environ: Mapping[str, str], *, shown: Path) -> Self:
        """Check the settings and listen.

        Args:
            spec: The page's settings.
            environ: The environment.
            shown: Output folder to show where the settings name none.

        Raises:
            UiAuthError: Others would see the page without a password; nothing listens then.
            UiFolderError: The page would write where nothing of ours belongs.
            UiPortError: The address cannot be listened on.
            OutputNotWritableError: Nothing can be written where the page writes.
        """
        require_guarded(spec)
        places = find_places(spec, environ, shown=shown)
        require_folder(places.own)
        return cls(spec, places, _listen(spec))

    @property
    def address(self) -> str:
        """What to open on this machine."""
        host, port = self.socket.getsockname()[:2]
        host = "127.0.0.1" if host in (_EVERYWHERE, "::") else host
        return f"http://{f'[{host}]' if ':' in host else host}:{port}"

    def lines(self) -> list[str]:
        """What a person is told."""
        shown = ", ".join(map(str, self.places.shown))
        told = [f"  open      {self.address}", f"  shows     {shown}", f"  writes    {self.places.own}"]
        if self.spec.share or not is_loopback(self.spec.host):
            told.append(f"  shared    as http://{socket.gethostname()}:{self.socket.getsockname()[1]}, unencrypted")
        return [*told, "  close     Ctrl-C; runs that are going on go on"]

    def to_dict(self) -> dict[str, Any]:
        """What a program is told."""
        return {
            "address": self.address,
            "pid": os.getpid(),
            "output_dir": str(self.places.own),
            "output": [str(path) for path in self.places.shown],
            "auth": self.spec.auth is not None,
        }

    def run(self) -> None:
        """Serve until Ctrl-C or SIGTERM."""
        config = uvicorn.Config(
            build_app(self.spec, self.places),
            log_config=None,
            access_log=False,
            lifespan="off",
            ws="none",
            http="h11",
            proxy_headers=False,
            server_header=False,
            timeout_graceful_shutdown=_WAIT_SECONDS,
        )
        try:
            uvicorn.Server(config).run([self.socket])
        except KeyboardInterrupt:
            return  # uvicorn hands on what closed it

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.socket.close()


def _listen(spec: UiSpec) -> socket.socket:
    host = _EVERYWHERE if spec.share and is_loopback(spec.host) else spec.host
    host = "127.0.0.1" if host == "localhost" else host
    try:
        family, _, _, _, address = socket.getaddrinfo(host, spec.port, type=socket.SOCK_STREAM)[0]
        found = socket.socket(family, socket.SOCK_STREAM)
    except OSError as error:
        raise UiPortError(f"{host} is no address of this machine", cause=error.strerror or str(error)) from error
    try:
        if os.name != "nt":  # there the option lets two programs have one port
            found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        found.bind(address)
        found.listen()
    except OSError as error:
        found.close()
        raise UiPortError(f"{host}:{spec.port} cannot be listened on", cause=error.strerror or str(error)) from error
    return found
