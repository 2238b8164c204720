"""What other commands say, each asked in a process of its own: frameworks and GPUs stay out of the server."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Sequence
from typing import Any

import orjson

_AT_ONCE = threading.BoundedSemaphore(2)
"""Whoever clicks ten times must not start ten processes at once."""

_PATIENCE = 30.0  # seconds


class AnswerError(Exception):
    """The command did not answer; ``told`` is its own error document, or empty."""

    def __init__(self, message: str, told: dict[str, Any] | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.told = told or {}


def ask(words: Sequence[str], *, seconds: float) -> dict[str, Any]:
    """The document that ``backprop … --json`` prints.

    Args:
        words: The command, without ``backprop`` and ``--json``.
        seconds: How long it may take.

    Raises:
        AnswerError: It failed, or took longer.
    """
    command = [sys.executable, "-m", "backpropagate", *words, "--json"]
    if not _AT_ONCE.acquire(timeout=_PATIENCE):
        raise AnswerError("Other questions are still being answered; ask again in a moment")
    try:
        done = subprocess.run(  # noqa: S603  # our own program
            command, capture_output=True, check=False, timeout=seconds, stdin=subprocess.DEVNULL
        )
        found: dict[str, Any] = orjson.loads(done.stdout)
    except subprocess.TimeoutExpired as error:
        raise AnswerError(f"It took longer than {seconds:.0f} s; ask in a terminal: backprop {words[0]}") from error
    except (OSError, orjson.JSONDecodeError) as error:
        raise AnswerError(f"backprop {words[0]} gave no answer") from error
    finally:
        _AT_ONCE.release()
    if "error" in found and found.get("schema") == "backpropagate.error/1":
        raise AnswerError(found["error"]["message"], found["error"])
    return found
