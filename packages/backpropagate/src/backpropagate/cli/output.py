"""Where a command's output goes: one JSON document, plain lines, or a live view on a terminal."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import orjson

from bp_runs.redact import redact_data

if TYPE_CHECKING:
    from backpropagate.cli.progress import Screen


def print_json(kind: str, body: Mapping[str, Any]) -> None:
    """Print the one JSON document of a command; its keys are in `backpropagate.cli.documents`."""
    option = orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE
    sys.stdout.write(orjson.dumps(build_document(kind, body), option=option, default=str).decode())


def build_document(kind: str, body: Mapping[str, Any]) -> dict[str, Any]:
    """``{"schema": "backpropagate.<kind>/1", …}``, redacted."""
    document: dict[str, Any] = redact_data({"schema": f"backpropagate.{kind}/1", **body})
    return document


def open_screen(*, as_json: bool) -> Screen:
    """The screen that fits where stdout goes."""
    from backpropagate.cli.progress import PlainScreen, SilentScreen

    if as_json:
        return SilentScreen()
    if sys.stdout.isatty():
        from backpropagate.cli.live_progress import LiveScreen, can_draw

        if can_draw():
            return LiveScreen()
    return PlainScreen()


class ByteLines:
    """Progress over bytes as lines on standard error, one every two seconds: for logs, which no bar can be drawn in."""

    every = 2.0  # seconds

    def __init__(self, *, end: str = "") -> None:
        self._end = end
        self._next = time.monotonic() + self.every

    def __call__(self, done: int, total: int | None) -> None:
        """Print a line if it is time; at the end, print what comes next."""
        is_done = total is not None and done >= total
        if time.monotonic() < self._next and not (is_done and self._end):
            return
        self._next = time.monotonic() + self.every
        share = f"{100 * min(done, total) // total}%  " if total else ""
        of = f" of {spell_bytes(total)}" if total else ""
        end = f"; {self._end}" if is_done and self._end else ""
        self._end = "" if is_done else self._end
        print(f"  {share}{spell_bytes(done)}{of}{end}", file=sys.stderr, flush=True)  # noqa: T201


def spell_bytes(count: int) -> str:
    """``1.2 GiB`` or ``34.5 MiB``."""
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"
