"""The promise of ``--offline``, kept by the interpreter: no connection leaves this machine.

CPython tells of every look-up and connection before it happens (PEP 578, audit events ``socket.*``). While offline, one
that does not stay on this machine raises instead. Loopback and Unix sockets are free: Ollama and the page of
`backprop ui` live there. A proxy may live there too and lead out, so the environment names none meanwhile. Code that
makes system calls without Python's sockets is not seen; nothing of ours does.
"""

from __future__ import annotations

import ipaddress
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

from backpropagate.errors import OfflineError

_EVENTS = frozenset({"socket.connect", "socket.sendto", "socket.sendmsg", "socket.getaddrinfo", "socket.gethostbyname"})
_LOCAL_NAMES = frozenset({"", "localhost", "localhost.localdomain", "ip6-localhost", "ip6-loopback"})
_PROXIES = frozenset({"http_proxy", "https_proxy", "all_proxy", "ftp_proxy"})
_forbidding: list[bool] = []


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
    proxies = {name: os.environ.pop(name) for name in list(os.environ) if name.lower() in _PROXIES}
    _forbidding.append(True)
    try:
        yield
    finally:
        _forbidding.pop()
        os.environ.update(proxies)


@cache
def _install_hook() -> None:
    """Once a process, since an audit hook cannot be taken away."""
    sys.addaudithook(_refuse)


def _refuse(event: str, args: tuple[Any, ...]) -> None:
    if not _forbidding or event not in _EVENTS:
        return
    host = _HOSTS.get(event, _host_of_address)(args)
    if host is not None and not is_local(host):
        raise OfflineError(f"offline, and something wanted to reach {host}")


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
