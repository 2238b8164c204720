"""Where a command's output goes: one JSON document, plain lines, or a live view on a terminal."""

from __future__ import annotations

import sys
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
