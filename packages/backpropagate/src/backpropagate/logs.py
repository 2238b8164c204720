"""Log handlers: console or JSON lines, the run id on every line, secrets masked."""

from __future__ import annotations

import logging
import warnings
from contextvars import ContextVar
from datetime import UTC, datetime
from typing import Any, Literal

import orjson

from backpropagate.system import to_path
from bp_runs.errors import OutputNotWritableError
from bp_runs.redact import redact

current_run: ContextVar[str] = ContextVar("current_run", default="-")
"""The run that log lines belong to."""

LogFormat = Literal["console", "json"]
OUR_LOGGERS = ("backpropagate", "bp_runs", "bp_data", "bp_merge", "bp_export", "bp_train_cuda", "bp_train_mlx")


class ConsoleFormatter(logging.Formatter):
    """``12:00:01 WARNING bp_data [run] message``."""

    def format(self, record: logging.LogRecord) -> str:
        """One redacted line, and a redacted traceback where there is one."""
        when = f"{datetime.fromtimestamp(record.created).astimezone():%H:%M:%S}"
        text = f"{when} {record.levelname} {record.name} [{current_run.get()}] {record.getMessage()}"
        return redact(text + (f"\n{self.formatException(record.exc_info)}" if record.exc_info else ""))


class JsonFormatter(logging.Formatter):
    """One JSON object a line: at, level, logger, run_id, message, and error where there is one."""

    def format(self, record: logging.LogRecord) -> str:
        """The line, redacted."""
        line: dict[str, Any] = {
            "at": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname,
            "logger": record.name,
            "run_id": current_run.get(),
            "message": redact(record.getMessage()),
        }
        if record.exc_info:
            line["error"] = redact(self.formatException(record.exc_info))
        return orjson.dumps(line).decode()


def install_handlers(level: str = "WARNING", form: LogFormat = "console", file: str | None = None) -> None:
    """Log to stderr; libraries' own lines are let through from ERROR on, ours from ``level``.

    Args:
        level: DEBUG, INFO, WARNING or ERROR.
        form: How lines look on stderr.
        file: Append JSON lines to this file as well.

    Raises:
        OutputNotWritableError: The file cannot be written.
    """
    stream = logging.StreamHandler()
    stream.setFormatter(JsonFormatter() if form == "json" else ConsoleFormatter())
    root = logging.getLogger()
    for old in root.handlers:
        old.close()
    root.handlers[:] = [stream, *([_open_file(file)] if file else [])]
    root.setLevel(logging.ERROR)
    logging.captureWarnings(capture=True)
    warnings.simplefilter("default")
    for name in OUR_LOGGERS:
        logging.getLogger(name).setLevel(level)


def _open_file(file: str) -> logging.Handler:
    try:
        handler = logging.FileHandler(to_path(file), encoding="utf-8")
    except OSError as error:
        raise OutputNotWritableError(
            f"the log file {file} cannot be written", cause=error.strerror, way_out="Name another: --log-file PATH"
        ) from error
    handler.setFormatter(JsonFormatter())
    return handler
