"""The promise of ``--offline``, kept by the interpreter: no connection leaves this machine.

CPython tells of every look-up and connection before it happens (PEP 578, audit events ``socket.*``). While offline, one
that does not stay on this machine raises instead. Loopback and Unix sockets are free: Ollama and the page of
`backprop ui` live there. A proxy may live there too and lead out: connections to those that the environment names are
rejected. Code that makes system calls without Python's sockets is not seen; nothing of ours does.
"""

from __future__ import annotations

import ipaddress
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import cache
from typing import Any
from urllib.parse import urlsplit

from backpropagate.errors import OfflineError

_EVENTS = frozenset({"socket.connect", "socket.sendto", "socket.sendmsg", "socket.getaddrinfo", "socket.gethostbyname"})
_LOCAL_NAMES = frozenset({"", "localhost", "localhost.localdomain", "ip6-localhost", "ip6-loopback"})
_PROXIES = frozenset({"http_proxy", "https_proxy", "all_proxy", "ftp_proxy"})
_USUAL_PORTS = {"http": 80, "https": 443, "socks4": 1080, "socks5": 1080, "socks5h": 1080}
_forbidding: list[frozenset[int]] = []
"""Of each context that is open: ports of the proxies on this machine."""


@contextmanager
def forbid_network(*, wanted: bool = True) -> Iterator[None]:
    """Let every connection beyond this machine fail with `OfflineError` while the context lasts.

    Args:
        wanted: False: change nothing.
    """
    if not wanted:
        yield
        return
    _install_hook()
    _forbidding.append(_local_proxies(os.environ))
    try:
        yield
    finally:
        _forbidding.pop()


@cache
def _install_hook() -> None:
    """Once a process, since an audit hook cannot be taken away."""
    sys.addaudithook(_refuse)


def _refuse(event: str, args: tuple[Any, ...]) -> None:
    if not _forbidding or event not in _EVENTS:
        return
    host = _HOSTS.get(event, _host_of_address)(args)
    if host is None:
        return
    if not is_local(host):
        raise OfflineError(f"offline, and something wanted to reach {host}")
    port = _port(event, args)
    if any(port in ports for ports in _forbidding):
        raise OfflineError(f"offline, and something wanted to reach the proxy {host}:{port}")


def _port(event: str, args: tuple[Any, ...]) -> int | None:
    """The port that is looked up or connected to; None where the event names none."""
    if event == "socket.gethostbyname":
        return None
    port = args[1] if event == "socket.getaddrinfo" else args[1][1]
    return int(port) if str(port).isdigit() else None


def _local_proxies(environ: Mapping[str, str]) -> frozenset[int]:
    found = set()
    for name, value in environ.items():
        if name.lower() in _PROXIES and value:
            parts = urlsplit(value if "://" in value else f"http://{value}")
            with suppress(ValueError):  # a port that is no number: no client connects to it
                if is_local(parts.hostname or ""):
                    found.add(parts.port or _USUAL_PORTS.get(parts.scheme, 80))
    return frozenset(found)


def _host_of_name(args: tuple[Any, ...]) -> str | None:
    return _text(args[0])


def _host_of_address(args: tuple[Any, ...]) -> str | None:
    """The host of an Internet address; None for Unix and kernel sockets."""
    address = args[1]
    return _text(address[0]) if isinstance(address, tuple) and isinstance(address[0], str | bytes) else None


_HOSTS: dict[str, Callable[[tuple[Any, ...]], str | None]] = {
    "socket.getaddrinfo": _host_of_name,
    "socket.gethostbyname": _host_of_name,
}


def _text(host: Any) -> str | None:
    return host.decode(errors="replace") if isinstance(host, bytes) else host


def is_local(host: str) -> bool:
    """Whether a host name or address is this machine itself."""
    name = host.partition("%")[0].lower().rstrip(".")
    try:
        address = ipaddress.ip_address(name)
    except ValueError:
        return name in _LOCAL_NAMES
    return address.is_loopback or address.is_unspecified
