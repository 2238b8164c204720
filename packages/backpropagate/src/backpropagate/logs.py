"""Log handlers: console or JSON lines, the run id on every line, secrets masked."""

from __future__ import annotations

import logging
import warnings
from contextvars import ContextVar
from datetime import UTC, datetime
from typing import Any, Literal

import orjson

from bp_runs.redact import redact

current_run: ContextVar[str] = ContextVar("current_run", default="-")
"""The run that log lines belong to."""

LogFormat = Literal["console", "json"]


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


def install_handlers(level: str = "WARNING", form: LogFormat = "console") -> None:
    """Log to stderr; libraries' own lines are let through from ERROR on, ours from ``level``."""
    handler = logging.StreamHandler()
    handler.setFormatter(JsonFormatter() if form == "json" else ConsoleFormatter())
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.ERROR)
    logging.captureWarnings(capture=True)
    warnings.simplefilter("default")
    for name in ("backpropagate", "bp_runs", "bp_data", "bp_merge", "bp_export", "bp_train_cuda", "bp_train_mlx"):
        logging.getLogger(name).setLevel(level)
