"""Log handlers: console or JSON lines, the run id on every line, secrets masked."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import UTC, datetime
from types import MappingProxyType
from typing import Any, Literal

import orjson

from backpropagate.system import to_path
from bp_runs.errors import CodedError, OutputNotWritableError
from bp_runs.events import Event, StepDone
from bp_runs.redact import redact, redact_data

NO_RUN = "-"
_run_here: ContextVar[str] = ContextVar("run", default=NO_RUN)
_runs_going_on: list[str] = []  # of this process; a library's thread knows no context

LogFormat = Literal["console", "json"]
OUR_LOGGERS = ("backpropagate", "bp_runs", "bp_data", "bp_merge", "bp_export", "bp_train_cuda", "bp_train_mlx")
_log = logging.getLogger("backpropagate")


def current_run() -> str:
    """The run that a log line belongs to now; in a thread that no run has started, the newest one of the process."""
    return _run_here.get() if _run_here.get() != NO_RUN or not _runs_going_on else _runs_going_on[-1]


@contextmanager
def follow_run(run_id: str) -> Iterator[None]:
    """Put the run's id on every log line while the context lasts, and log how it ends.

    A coded error that ends it gets the id among its details.
    """
    token = _run_here.set(run_id)
    _runs_going_on.append(run_id)
    _log.info("the run begins")
    try:
        yield
        _log.info("the run ends")
    except CodedError as error:
        error.details = MappingProxyType({"run_id": run_id, **error.details})
        _log.error("the run fails: %s", error, extra={"told": True, "data": {"error": error.to_dict()}})
        raise
    except BaseException as error:
        trace = error if isinstance(error, Exception) else None  # of a bug; Ctrl-C needs none
        _log.error("the run is cut off: %s", type(error).__name__, exc_info=trace, extra={"told": True})
        raise
    finally:
        _runs_going_on.remove(run_id)
        _run_here.reset(token)


def log_event(event: Event) -> None:
    """One line for an event of a run; steps for those who ask for DEBUG."""
    level = logging.DEBUG if isinstance(event, StepDone) else logging.INFO
    if not _log.isEnabledFor(level):
        return
    data = event.to_dict()
    facts = " ".join(f"{name}={_short(value)}" for name, value in data.items() if name != "event")
    _log.log(level, "%s: %s", event.kind, facts, extra={"data": data})


def _short(value: Any) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)


class ConsoleFormatter(logging.Formatter):
    """``12:00:01 WARNING bp_data [run] message``."""

    def format(self, record: logging.LogRecord) -> str:
        """The redacted message, and a traceback where there is one; each of its lines is a line of the run."""
        when = f"{datetime.fromtimestamp(record.created).astimezone():%H:%M:%S}"
        head = f"{when} {record.levelname} {record.name} [{_run_of(record)}] "
        text = record.getMessage() + (f"\n{self.formatException(record.exc_info)}" if record.exc_info else "")
        return "\n".join(head + line for line in redact(text).splitlines() or [""])


def _run_of(record: logging.LogRecord) -> str:
    return getattr(record, "run_id", None) or current_run()


def _is_news(record: logging.LogRecord) -> bool:
    """Whether the command line does not tell it by itself."""
    return not getattr(record, "told", False)


class JsonFormatter(logging.Formatter):
    """One JSON object a line: at, level, logger, run_id, message, and the fields of an event or an error."""

    def format(self, record: logging.LogRecord) -> str:
        """The line, redacted."""
        line: dict[str, Any] = {
            "at": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname,
            "logger": record.name,
            "run_id": _run_of(record),
            "message": redact(record.getMessage()),
        }
        data = redact_data(getattr(record, "data", {}))
        line |= {name: value for name, value in data.items() if name not in line}
        if record.exc_info:
            line["traceback"] = redact(self.formatException(record.exc_info))
        return orjson.dumps(line, default=str).decode()


def error_line(error: CodedError) -> str:
    """What ends the program, as a JSON line of the run that it ended."""
    facts = {"run_id": error.details.get("run_id", NO_RUN), "data": {"error": error.to_dict()}}
    return JsonFormatter().format(_log.makeRecord(_log.name, logging.ERROR, "", 0, "%s", (error,), None, extra=facts))


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
    stream.addFilter(_is_news)
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
            f"the log file {file} cannot be written", cause=error.strerror, fix="Name another: {set:log_file=PATH}"
        ) from error
    handler.setFormatter(JsonFormatter())
    return handler
