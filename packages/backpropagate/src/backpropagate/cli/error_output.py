"""How the program fails in front of people: code, cause, the next command, and where to read on."""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import stat
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from types import FrameType
from typing import NoReturn, TextIO, TypeVar

from backpropagate import system
from backpropagate.cli.global_flags import FORMATS, LEVELS
from backpropagate.cli.process import set_environment
from backpropagate.interrupts import stop_signals
from bp_runs.errors import CodedError, InvalidSettingError, RunFailedError
from bp_runs.redact import redact

_Word = TypeVar("_Word", bound=str)


def prepare_process() -> None:
    """UTF-8 on every console, telemetry off, log handlers from the environment.

    Raises:
        InvalidSettingError: A variable for logs has a value that it cannot take.
        OutputNotWritableError: The log file cannot be written.
    """
    for number in stop_signals():
        if number is not signal.SIGINT:  # Python's own handler raises KeyboardInterrupt
            signal.signal(number, _raise_interrupt)  # so that half-written files are cleared as on Ctrl-C
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(encoding="utf-8", errors="replace")
    set_environment(os.environ)
    set_up_logs(os.environ)


def set_up_logs(environ: Mapping[str, str]) -> None:
    """Log handlers as ``BACKPROPAGATE_LOG_LEVEL``, ``_FORMAT`` and ``_FILE`` say."""
    from backpropagate.logs import install_handlers

    install_handlers(
        _one_of(environ, "BACKPROPAGATE_LOG_LEVEL", "WARNING", LEVELS),
        _one_of(environ, "BACKPROPAGATE_LOG_FORMAT", "console", FORMATS),
        environ.get("BACKPROPAGATE_LOG_FILE"),
    )


def _one_of(environ: Mapping[str, str], name: str, default: str, words: tuple[_Word, ...]) -> _Word:
    """A variable's word, in any case; another word is an error, since nothing else would say that it is ignored."""
    value = environ.get(name) or default
    found = next((word for word in words if word.lower() == value.lower()), None)
    if found is None:
        raise InvalidSettingError(
            f"invalid value for {name}: {value!r}",
            cause=f"it must be one of: {', '.join(words)}",
            fix=f"Set {name}={default}",
        )
    return found


def _raise_interrupt(_number: int, _frame: FrameType | None) -> NoReturn:
    raise KeyboardInterrupt


def is_terminal_lost(error: OSError) -> bool:
    """Whether ``error`` comes from writing to a terminal that was closed: nobody reads what is printed any more."""
    return error.errno == errno.EIO and error.filename is None and any(_is_closed_terminal(fd) for fd in (1, 2))


def _is_closed_terminal(fd: int) -> bool:
    """A closed terminal stays a character device, but ``isatty`` denies it."""
    try:
        device = os.fstat(fd)
        is_null = device.st_rdev == Path(os.devnull).stat().st_rdev
    except OSError:
        return False
    return stat.S_ISCHR(device.st_mode) and not is_null and not os.isatty(fd)


def report_error(error: CodedError, *, as_json: bool) -> int:
    """Tell a coded error, on stdout as JSON where the user requested JSON; returns its exit status.

    Where logs are JSON lines, it is one of them.
    """
    if as_json:
        from backpropagate.cli.output import print_json

        with contextlib.suppress(OSError, ValueError, AttributeError):  # a stdout that nobody reads any more
            print_json("error", {"error": error.to_dict()})
        return error.exit_status
    if os.environ.get("BACKPROPAGATE_LOG_FORMAT", "").lower() == "json":
        from backpropagate.logs import error_line

        _tell(sys.stderr, error_line(error))
        return error.exit_status
    _tell(sys.stderr, redact(describe_error(error, color=_has_color(sys.stderr))))
    return error.exit_status


def describe_error(error: CodedError, *, color: bool = False) -> str:
    """Code and message, cause, fix, the command that explains the code, and its page; a line each."""
    red, bold, plain = ("\x1b[31m", "\x1b[1m", "\x1b[0m") if color else ("", "", "")
    lines = [f"{red}[{error.code}]{plain}: {bold}{error.message}{plain}"]
    if error.cause:
        lines.append(f"  Cause: {error.cause}")
    lines.append(f"  Fix:   {error.fix}")
    lines.append(f"  More:  backprop errors {error.code}")
    lines.append(f"  Page:  {error.page()}")
    return "\n".join(lines)


def _has_color(stream: TextIO | None) -> bool:
    """Whether a stream is a terminal that shows colors; NO_COLOR forbids them."""
    wanted = not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
    return wanted and stream is not None and stream.isatty()


class _BugError(RunFailedError):
    """Something that nobody foresaw."""

    code = "RUNTIME_BUG"
    when = "The program itself made a mistake; the traceback is kept in a file."
    default_fix = "Report it with that file, or with the zip of {do:report RUN}."


def report_bug(error: Exception, *, as_json: bool) -> int:
    """Keep the traceback in a file and name it; ``BACKPROPAGATE_DEBUG=1`` shows it at once."""
    import traceback

    text = redact("".join(traceback.format_exception(error)))
    if os.environ.get("BACKPROPAGATE_DEBUG"):
        _tell(sys.stderr, text)
    first = next(iter(str(error).strip().splitlines()), "")
    bug = _BugError(f"{type(error).__name__}: {first}", cause=f"a mistake in backpropagate; {_keep(text)}")
    return report_error(bug, as_json=as_json)


def _keep(text: str) -> str:
    """Where the traceback is now."""
    try:
        file = system.program_home(os.environ) / "crashes" / f"{datetime.now(UTC):%Y%m%d-%H%M%S}.txt"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text, encoding="utf-8")
    except (OSError, CodedError):
        return "set BACKPROPAGATE_DEBUG=1 to see the traceback"
    return f"the traceback is in {file}"


def _tell(stream: TextIO | None, text: str) -> None:
    """Print where anybody can still read it; a closed or full stream changes no exit status."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        print(text, file=stream, flush=True)
