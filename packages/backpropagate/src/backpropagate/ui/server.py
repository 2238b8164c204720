"""Listens, tells the address, and serves until Ctrl-C."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from backpropagate.errors import UiPortError, UiTunnelError
from backpropagate.ui.app import build_app
from backpropagate.ui.folders import Places, find_places
from backpropagate.ui.security import SHORT_PASSWORD, is_loopback, read_auth, require_guarded
from backpropagate.ui.tunnel import Tunnel, find_tunnel
from backpropagate.ui_spec import UiSpec
from bp_runs.files import require_folder

_EVERYWHERE = "0.0.0.0"  # noqa: S104  # only with a password, see security.require_guarded
_WAIT_SECONDS = 2  # for open pages, when the server is closed
_REQUEST_SECONDS = 15.0  # in which a request's headers must have arrived
_MOST_CONNECTIONS = 256


class _PatientProtocol(H11Protocol):
    """HTTP/1.1 whose requests must have arrived in time, so that half-open ones don't use up the connections."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Start the time of the first request."""
        super().connection_made(transport)
        self.loop.call_later(_REQUEST_SECONDS, self._require_request, self.cycle)

    def data_received(self, data: bytes) -> None:
        """Start the time of a further request at its first bytes."""
        before = self.cycle
        super().data_received(data)
        if before is not None and self.cycle is before and before.response_complete:
            self.loop.call_later(_REQUEST_SECONDS, self._require_request, before)

    def _require_request(self, before: object) -> None:
        if self.cycle is before and not self.transport.is_closing():
            self.transport.close()


@dataclass(slots=True)
class Server:
    """A page that is listened for; a context manager that closes it."""

    spec: UiSpec
    places: Places
    socket: socket.socket
    tunnel: Tunnel | None = None
    _running: uvicorn.Server | None = None

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
            UiTunnelError: `cloudflared` is installed and opens no public address.
            OutputNotWritableError: Nothing can be written where the page writes.
        """
        spec = read_auth(spec)
        require_guarded(spec)
        places = find_places(spec, environ, shown=shown)
        require_folder(places.own)
        if not spec.share or find_tunnel() is None:
            return cls(spec, places, _listen(spec))
        return cls._open_tunnel(replace(spec, share=False), places)

    @classmethod
    def _open_tunnel(cls, spec: UiSpec, places: Places) -> Self:
        """Listen on this machine alone; `cloudflared` leads others here, encrypted, and says who they are."""
        server = cls(spec, places, _listen(spec))
        try:
            server.tunnel = Tunnel.open(server.address)
        except UiTunnelError:
            server.socket.close()
            raise
        hosts = (*spec.allowed_hosts, server.tunnel.host)
        server.spec = replace(spec, allowed_hosts=hosts, trusted_proxies=(*spec.trusted_proxies, "127.0.0.1", "::1"))
        return server

    @property
    def address(self) -> str:
        """What to open on this machine."""
        host, port = self.socket.getsockname()[:2]
        host = "127.0.0.1" if host in (_EVERYWHERE, "::") else host
        return f"http://{f'[{host}]' if ':' in host else host}:{port}"

    def lines(self) -> list[str]:
        """What the command prints."""
        shown = ", ".join(map(str, self.places.shown))
        lines = [f"  open      {self.address}", f"  shows     {shown}", f"  writes    {self.places.own}"]
        port = self.socket.getsockname()[1]
        if self.tunnel is not None:
            lines.append(
                f"  shared    {self.tunnel.address}, by cloudflared, for whoever has the address and the password"
            )
        if self.spec.share or not is_loopback(self.spec.host):
            name = socket.gethostname()
            lines.append(f"  shared    as http://{name}:{port}, unencrypted")
            lines.append(f"  safer     ssh -L {port}:127.0.0.1:{port} {name}, without --share; or install cloudflared")
        if self.spec.auth and len(self.spec.auth.partition(":")[2]) < SHORT_PASSWORD:
            lines.append(f"  warning   the password has fewer than {SHORT_PASSWORD} characters and is easy to guess")
        return [*lines, "  close     Ctrl-C; running jobs continue"]

    def to_dict(self) -> dict[str, Any]:
        """As `lines`, for programs."""
        return {
            "address": self.address,
            "pid": os.getpid(),
            "output_dir": str(self.places.own),
            "output": [str(path) for path in self.places.shown],
            "auth": self.spec.auth is not None,
            "public": self.tunnel.address if self.tunnel is not None else None,
        }

    def run(self) -> None:
        """Serve until Ctrl-C or SIGTERM."""
        config = uvicorn.Config(
            build_app(self.spec, self.places),
            log_config=None,
            access_log=False,
            lifespan="on",
            ws="none",
            http=_PatientProtocol,
            limit_concurrency=_MOST_CONNECTIONS,
            proxy_headers=False,
            server_header=False,
            timeout_graceful_shutdown=_WAIT_SECONDS,
        )
        self._running = uvicorn.Server(config)
        try:
            self._running.run([self.socket])
        except KeyboardInterrupt:
            return  # uvicorn hands on what closed it

    def stop(self) -> None:
        """Let `run` return, from another thread."""
        if self._running is not None:
            self._running.should_exit = True

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self.tunnel is not None:
            self.tunnel.close()
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
