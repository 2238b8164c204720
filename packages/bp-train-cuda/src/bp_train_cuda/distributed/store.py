"""The key-value store where ranks meet: JSON values that are signed, in a store bound to one address.

torch's TCPStore lets anyone who reaches its port read and write every key. So no value is trusted: each carries an
HMAC-SHA256 (RFC 2104) over its key, its writer's rank and itself, keyed by a token that only the ranks of this launch
share. A value that was written by a stranger, changed, or copied from another key is rejected, and nothing that is
read can run code. Values are not encrypted: they hold settings, counts and losses, no weights and no secrets.

What the signatures can't prevent: whoever reaches the port can delete keys and so end the training.
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import json
import socket
import time
from collections.abc import Iterator, Sequence
from typing import Any

import psutil
import torch.distributed as dist

from bp_runs.errors import CodedError, InterruptedRunError, first_line
from bp_runs.rail import Stop
from bp_runs.serialize import to_json
from bp_runs.spec import Ranks
from bp_train_cuda.errors import RankLostError, RankMessageError, RanksError

_CONNECT_SECONDS = 0.2  # between two attempts to reach a store that isn't there yet
_CONNECT_LIMIT = 1800.0  # seconds; rank 0 may download a model before it opens the store
_SIGNATURE_LENGTH = 64  # hexadecimal digits of SHA-256


class SignedStore:
    """A store whose values are signed JSON.

    Args:
        store: Any torch store; of one launch.
        token: The launch's secret, at least 16 characters.
        rank: Who writes through this object.
        prefix: Set before every key, and signed with it.
    """

    def __init__(self, store: dist.Store, token: str, rank: int, prefix: str) -> None:
        if len(token) < 16:
            raise RanksError(
                "the ranks share no token that signs their messages", fix="Give all ranks one random token."
            )
        self._store, self._token, self._rank, self._prefix = store, token, rank, prefix
        self._key = hashlib.sha256(b"backpropagate ranks:" + token.encode()).digest()

    def nested(self, name: str) -> SignedStore:
        """The same store under another prefix: values of one can't be passed off as the other's."""
        return SignedStore(self._store, self._token, self._rank, f"{self._prefix}/{name}")

    def for_torch(self, name: str) -> dist.Store:
        """A plain torch store under this prefix, for `torch.distributed.init_process_group`."""
        return dist.PrefixStore(f"{self._prefix}/{name}", self._store)

    def set(self, key: str, value: Any) -> None:
        """Write ``value``, anything that `bp_runs.serialize.to_json` takes.

        Raises:
            RankLostError: The store is gone.
            ContractError: The value has no JSON form.
        """
        with coded_store_errors():
            self._store.set(self._full(key), self._sign(key, value))

    def set_if_absent(self, key: str, value: Any) -> None:
        """As `set`, unless the key has a value: the first one stays."""
        with coded_store_errors():
            self._store.compare_set(self._full(key), "", self._sign(key, value))

    def get(self, key: str, writer: int | None) -> Any:
        """The value that rank ``writer`` wrote; None: any rank may have written it. The key must be there.

        Raises:
            RankMessageError: It isn't signed with our token, or is another key's or another rank's.
            RankLostError: The store is gone.
        """
        with coded_store_errors():
            message = self._store.get(self._full(key))
        return self._verify(key, writer, message)

    def get_all(self, keys: Sequence[str]) -> list[Any]:
        """The values of ``keys``, the first written by rank 0, the second by rank 1, and so on; raises as `get`."""
        with coded_store_errors():
            messages = self._store.multi_get([self._full(key) for key in keys])
        signed = zip(keys, messages, strict=True)
        return [self._verify(key, rank, message) for rank, (key, message) in enumerate(signed)]

    def has(self, *keys: str) -> bool:
        """Whether all of ``keys`` have values; says nothing about who wrote them.

        Raises:
            RankLostError: The store is gone.
        """
        with coded_store_errors():
            return bool(self._store.check([self._full(key) for key in keys]))

    def delete(self, key: str) -> None:
        """Remove a key.

        Raises:
            RankLostError: The store is gone.
        """
        with coded_store_errors():
            self._store.delete_key(self._full(key))

    def _full(self, key: str) -> str:
        return f"{self._prefix}/{key}"

    def _sign(self, key: str, value: Any) -> str:
        # json, not orjson: a diverged loss must stay NaN or Infinity, which orjson would turn into null
        body = json.dumps({"key": self._full(key), "rank": self._rank, "value": to_json(value)})
        return self._signature(body.encode()) + body

    def _signature(self, body: bytes) -> str:
        return hmac.digest(self._key, body, "sha256").hex()

    def _verify(self, key: str, writer: int | None, message: bytes) -> Any:
        signature, body = message[:_SIGNATURE_LENGTH], message[_SIGNATURE_LENGTH:]
        if not hmac.compare_digest(signature, self._signature(body).encode()):
            raise self._rejected(key, "its signature is wrong: it was not written by a rank of this launch")
        found = json.loads(body)
        if found["key"] != self._full(key):
            raise self._rejected(key, f"it was written for the key {found['key']}")
        if writer is not None and found["rank"] != writer:
            raise self._rejected(key, f"rank {found['rank']} wrote it, and only rank {writer} may")
        return found["value"]

    def _rejected(self, key: str, cause: str) -> CodedError:
        return RankMessageError(
            f"the message under {self._full(key)!r} is rejected", cause=cause, details={"key": self._full(key)}
        )


_connected: dict[tuple[str, int, int], dist.Store] = {}
"""This process's store by address, port and attempt: the server lives as long as the process that hosts it."""

_opened: dict[tuple[str, int, int, int], SignedStore] = {}
"""The store as each call of a script sees it: by address, port, attempt and call."""


def open_store(ranks: Ranks, stop: Stop) -> SignedStore:
    """The launcher's store, or rank 0's own, which listens on ``ranks.address`` alone; one in a process.

    What one call of a script writes there, another does not see.

    Raises:
        RanksError: There is no token, or the address can't be bound.
        RankLostError: Rank 0 is gone, or doesn't open the store within half an hour.
        InterruptedRunError: ``stop`` turned true before the store was there.
    """
    place = (ranks.address, ranks.port, ranks.attempt)
    if place not in _connected:
        _connected[place] = _connect(ranks, stop)
    if (*place, ranks.call) not in _opened:
        prefix = f"backpropagate/{ranks.attempt}/{ranks.call}"
        _opened[*place, ranks.call] = SignedStore(_connected[place], ranks.token, ranks.rank, prefix)
    return _opened[*place, ranks.call]


def _connect(ranks: Ranks, stop: Stop) -> dist.Store:
    hosts = ranks.rank == 0 and not ranks.is_hosted
    listener = _listen(ranks) if hosts else None
    if not hosts:
        _wait_for_store(ranks, stop)
    with coded_store_errors():
        return dist.TCPStore(
            ranks.address,
            ranks.port,
            ranks.count,
            is_master=hosts,
            wait_for_workers=False,
            master_listen_fd=None if listener is None else listener.detach(),  # torch closes it
        )


def _listen(ranks: Ranks) -> socket.socket:
    """A socket bound to the address given; left to itself, TCPStore listens on all of the machine's addresses."""
    try:
        family, kind, protocol, _, place = socket.getaddrinfo(ranks.address, ranks.port, type=socket.SOCK_STREAM)[0]
        with contextlib.ExitStack() as on_error:
            listener = on_error.enter_context(socket.socket(family, kind, protocol))
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # a port of a run that has just ended
            listener.bind(place)
            on_error.pop_all()
    except OSError as error:
        raise RanksError(
            f"rank 0 can't listen on {ranks.address}:{ranks.port}",
            cause=first_line(error),
            fix="Choose an address of this machine and a free port, for all ranks: "
            f"export MASTER_ADDR=127.0.0.1 MASTER_PORT={ranks.port + 1}",
        ) from error
    return listener


def _wait_for_store(ranks: Ranks, stop: Stop) -> None:
    """Wait until the store's port answers: torch's own wait can't be stopped, and ends after five minutes."""
    end = time.monotonic() + _CONNECT_LIMIT
    while not _answers(ranks):
        if stop():
            raise InterruptedRunError("stopped before rank 0 had opened the store where the processes meet")
        if ranks.main_process is not None and not is_alive(*ranks.main_process):
            raise RankLostError(f"rank 0 (pid {ranks.main_process[0]}) ended before training began")
        if time.monotonic() > end:
            raise RankLostError(f"rank 0 opened no store at {ranks.address}:{ranks.port} within 30 minutes")
        time.sleep(_CONNECT_SECONDS)


def _answers(ranks: Ranks) -> bool:
    try:
        with socket.create_connection((ranks.address, ranks.port), timeout=5):
            return True
    except OSError:
        return False


def is_alive(pid: int, start: float) -> bool:
    """Whether the process ``pid`` that started at ``start`` (seconds since the epoch) still runs on this machine."""
    try:
        process = psutil.Process(pid)
        return process.status() != psutil.STATUS_ZOMBIE and abs(process.create_time() - start) < 1
    except psutil.Error:
        return False


@contextlib.contextmanager
def coded_store_errors() -> Iterator[None]:
    """Torch raises a RuntimeError where the store can't be reached.

    Raises:
        RankLostError: In its place.
    """
    try:
        yield
    except RuntimeError as error:
        raise RankLostError("the store where the processes meet cannot be reached", cause=first_line(error)) from error
