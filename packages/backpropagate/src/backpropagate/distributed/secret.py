"""How the processes of one launch share a secret that strangers lack: the token that signs what ranks tell each other.

`BACKPROPAGATE_RANKS_TOKEN`, where it is set for all ranks, is the token. Else rank 0 makes one and writes it, with its
process id, into a file that only this user can read; the other ranks, on the same machine, read it there. What
launchers themselves give all ranks (addresses, ports, job ids) can be guessed, so it only names the file.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import secrets
import stat
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import orjson
import psutil

from backpropagate.errors import RanksTokenError

_PATIENCE = 120.0  # seconds in which rank 0 must have started
_POLL_SECONDS = 0.05
_SHORTEST = 16  # characters


@dataclass(frozen=True, slots=True)
class Secret:
    """What the ranks of one launch share."""

    token: str = field(repr=False)
    main_process: tuple[int, float] | None
    """Process id and start time (seconds since the epoch) of rank 0; None where the user gave the token."""


def given_secret(token: str) -> Secret:
    """The user's token.

    Raises:
        RanksTokenError: It is shorter than 16 characters.
    """
    if len(token) < _SHORTEST:
        raise RanksTokenError(f"BACKPROPAGATE_RANKS_TOKEN has {len(token)} characters; it needs at least {_SHORTEST}")
    return Secret(token, None)


def publish_secret(launch: str, environ: Mapping[str, str]) -> Secret:
    """For rank 0: make a token and let the other ranks of ``launch`` read it.

    Args:
        launch: What all ranks know of this launch and another launch on this machine doesn't share: address and port.

    Raises:
        RanksTokenError: The folder isn't private, or a rank 0 that still runs has published a token for ``launch``.
    """
    file = _file(launch, environ)
    before = _read(file)
    if before is not None and before.main_process is not None and before.main_process[0] != os.getpid():
        raise RanksTokenError(
            f"process {before.main_process[0]} trains at the same address and port ({launch})",
            fix="Choose another port for all ranks: export MASTER_PORT=29501",
        )
    secret = Secret(secrets.token_hex(32), (os.getpid(), psutil.Process().create_time()))
    partial = file.with_suffix(f".{os.getpid()}")
    partial.unlink(missing_ok=True)
    with os.fdopen(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as out:
        out.write(orjson.dumps(secret))
    partial.replace(file)
    return secret


def read_secret(launch: str, environ: Mapping[str, str]) -> Secret:
    """For the other ranks: wait for what rank 0 publishes, and read it.

    Raises:
        RanksTokenError: The folder isn't private, or there is no token within two minutes.
    """
    file, end = _file(launch, environ), time.monotonic() + _PATIENCE
    while (secret := _read(file)) is None:
        if time.monotonic() > end:
            raise RanksTokenError(
                f"rank 0 left no token in {file} within {_PATIENCE:.0f} seconds",
                cause="it didn't start, or runs as another user, in another container or on another machine",
            )
        time.sleep(_POLL_SECONDS)
    return secret


def remove_secret(launch: str, environ: Mapping[str, str]) -> None:
    """For rank 0, at its end."""
    with contextlib.suppress(OSError):
        _file(launch, environ).unlink()


def _file(launch: str, environ: Mapping[str, str]) -> Path:
    return _private_folder(environ) / f"ranks-{hashlib.sha256(launch.encode()).hexdigest()[:16]}.json"


def _private_folder(environ: Mapping[str, str]) -> Path:
    """A folder of this user's that no other user can enter; the same one for all of the user's processes."""
    runtime = environ.get("XDG_RUNTIME_DIR", "")
    if runtime and Path(runtime).is_dir():
        folder = Path(runtime) / "backpropagate"
    else:
        folder = Path(tempfile.gettempdir()) / (
            f"backpropagate-{os.getuid()}" if os.name == "posix" else "backpropagate"
        )
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        found = folder.lstat()
    except OSError as error:
        raise RanksTokenError(
            f"the folder {folder}, where ranks share a token, can't be used", cause=str(error)
        ) from error
    if not stat.S_ISDIR(found.st_mode) or (
        os.name == "posix" and (found.st_uid != os.getuid() or found.st_mode & 0o077)
    ):
        raise RanksTokenError(
            f"{folder}, where ranks share a token, isn't private: another user owns it or can enter it",
            details={"folder": str(folder)},
        )
    return folder


def _read(file: Path) -> Secret | None:
    """What a rank 0 that still runs has published; what earlier launches left behind is passed over."""
    try:
        found = orjson.loads(file.read_bytes())
        pid, start = found["main_process"]
        process = psutil.Process(pid)
        runs = process.status() != psutil.STATUS_ZOMBIE and abs(process.create_time() - start) < 1
        return Secret(found["token"], (pid, start)) if runs else None
    except (OSError, ValueError, KeyError, TypeError, psutil.Error):  # gone, damaged, or another version's
        return None
