"""Commands that the page starts: each in a process of its own, which goes on without the page and without the server.

What was started is kept in ``<own>/.launches``: a small file and a log for each, so that a new server finds them again.
"""

from __future__ import annotations

import os
import platform
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import msgspec

from backpropagate.errors import UiPathError
from bp_runs.errors import PathUnusableError, RunActiveError
from bp_runs.files import coded_disk_errors, publish_json
from bp_runs.paths import new_run_id
from bp_runs.process import process_birth
from bp_runs.record import RunRecord, utc_now
from bp_runs.redact import redact
from bp_runs.store import RunStore

FOLDER = ".launches"
_TAIL = 16 * 2**10  # bytes of a log that are shown
_LOOKED_AT = 20  # newest runs among which a launch's own is looked for
CAN_STOP = os.name != "nt"
"""Whether another process can be asked to finish its step; Windows can only end it."""

# A session of its own: closing the terminal or the server does not reach it.
_APART: dict[str, Any] = (
    {"start_new_session": True}
    if CAN_STOP
    else {
        "creationflags": getattr(subprocess, "CREATE_NEW_PROCESS_GROUP", 0) | getattr(subprocess, "DETACHED_PROCESS", 0)
    }
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Launch:
    """One command that the page started."""

    id: str
    argv: tuple[str, ...]
    """Without ``backprop``."""
    output: str | None
    """The output folder that its run is recorded in; None for commands without a run."""
    pid: int
    process_started: str | None
    """With the pid: the process, see `bp_runs.process.process_birth`."""
    at: str

    @property
    def is_alive(self) -> bool:
        """Whether its process still works."""
        return self.process_started is not None and process_birth(self.pid) == self.process_started


@dataclass(slots=True)
class Launches:
    """All commands that pages of one folder have started."""

    own: Path
    """The folder that the page writes in."""
    _children: list[subprocess.Popen[bytes]] = field(default_factory=list)
    _asked: set[str] = field(default_factory=set)
    """Runs that were asked to stop."""

    def start(self, argv: Sequence[str], *, output: Path | None = None) -> Launch:
        """Start ``backprop`` with these words, in the server's folder and with its settings.

        Raises:
            PathUnusableError: It cannot be started.
            DiskFullError, OutputNotWritableError: There is no room for its log.
        """
        folder, name = self.own / FOLDER, new_run_id()
        environ = {k: v for k, v in os.environ.items() if not k.startswith("BACKPROPAGATE_UI__")}
        with coded_disk_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
            log = (folder / f"{name}.log").open("ab")
        with log:
            try:
                child = subprocess.Popen(  # noqa: S603  # our own program, with flags that were checked
                    [sys.executable, "-m", "backpropagate", *argv],
                    env=environ,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    **_APART,
                )
            except OSError as error:
                raise PathUnusableError("the command cannot be started", cause=error.strerror) from error
        self._children.append(child)
        launch = Launch(
            id=name,
            argv=tuple(argv),
            output=None if output is None else str(output),
            pid=child.pid,
            process_started=process_birth(child.pid),
            at=utc_now(),
        )
        publish_json(folder / f"{name}.json", asdict(launch))
        return launch

    def newest(self, count: int = 10) -> list[Launch]:
        """The newest ones first."""
        self._reap()
        files = sorted((self.own / FOLDER).glob("*.json"), reverse=True)[:count]
        return [launch for file in files if (launch := _read(file)) is not None]

    def find(self, name: str) -> Launch:
        """The launch of an address.

        Raises:
            UiPathError: There is none.
        """
        self._reap()
        files = {file.stem: file for file in (self.own / FOLDER).glob("*.json")}
        found = _read(files[name]) if name in files else None
        if found is None:
            raise UiPathError(f"nothing was started as {name!r}")
        return found

    def log_of(self, launch: Launch) -> str:
        """The end of what it printed, redacted."""
        try:
            with (self.own / FOLDER / f"{launch.id}.log").open("rb") as file:
                file.seek(max(0, file.seek(0, os.SEEK_END) - _TAIL))
                return redact(file.read().decode(errors="replace"))
        except OSError:
            return ""

    def run_of(self, launch: Launch) -> str | None:
        """The id of the run that its process records; None before it is there."""
        if launch.output is None:
            return None
        store = RunStore(Path(launch.output))
        rows = store.list_runs()
        for row in rows[:_LOOKED_AT] + [row for row in rows[_LOOKED_AT:] if row["status"] == "running"]:
            sessions = store.load(row["run_id"]).sessions
            if any(s["pid"] == launch.pid and s["at"] >= launch.at for s in sessions):
                return str(row["run_id"])
        return None

    def is_asked(self, run_id: str) -> bool:
        """Whether this server has asked the run to stop."""
        return run_id in self._asked

    def stop(self, record: RunRecord) -> None:
        """Ask a run's process to finish its step and save; asked again, it ends at once, as Ctrl-C twice.

        Raises:
            RunActiveError: It runs elsewhere, or cannot be asked on this system.
        """
        if record.host != platform.node():
            raise RunActiveError(f"the run {record.run_id} is going on on {record.host}")
        if not CAN_STOP:
            raise RunActiveError("Windows cannot ask another process to save", fix="Press Ctrl-C where it runs.")
        if record.status == "running" and process_birth(record.pid) == record.process_started:
            os.kill(record.pid, signal.SIGTERM)
            self._asked.add(record.run_id)

    def _reap(self) -> None:
        """Let go of children that have ended."""
        self._children = [child for child in self._children if child.poll() is None]


def _read(file: Path) -> Launch | None:
    try:
        return msgspec.json.decode(file.read_bytes(), type=Launch)
    except (OSError, msgspec.DecodeError):
        return None
