"""How the program fails in front of people: code, cause, the next command, and where to read on."""

from __future__ import annotations

import os
import sys
from datetime import UTC, datetime

from backpropagate import system
from bp_runs.errors import CodedError
from bp_runs.redact import redact, redact_data


def prepare_process() -> None:
    """UTF-8 on every console, telemetry off, log handlers from the environment."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(encoding="utf-8", errors="replace")
    system.silence_telemetry(os.environ)
    from backpropagate.logs import install_handlers

    form = os.environ.get("BACKPROPAGATE_LOG_FORMAT", "console")
    level = os.environ.get("BACKPROPAGATE_LOG_LEVEL", "WARNING").upper()
    install_handlers(
        level if level in {"DEBUG", "INFO", "WARNING", "ERROR"} else "WARNING", "json" if form == "json" else "console"
    )


def report_error(error: CodedError, *, as_json: bool) -> int:
    """Tell a coded error, on stdout as JSON where the user asked for JSON; returns its exit status."""
    if as_json:
        import orjson

        document = {"schema": "backpropagate.error/1", "error": redact_data(error.to_dict())}
        sys.stdout.write(orjson.dumps(document, option=orjson.OPT_INDENT_2).decode() + "\n")
        return error.exit_status
    lines = [str(error)]
    if error.cause:
        lines.append(f"  cause: {error.cause}")
    lines.append(f"  do:    {error.way_out}")
    lines.append(f"  more:  backprop errors {error.code}")
    sys.stderr.write(redact("\n".join(lines)) + "\n")
    return error.exit_status


def report_bug(error: Exception, *, as_json: bool) -> int:
    """Keep the traceback in a file and name it; ``BACKPROPAGATE_DEBUG=1`` shows it at once."""
    import traceback

    import orjson

    text = redact("".join(traceback.format_exception(error)))
    folder = system.program_home(os.environ) / "crashes"
    file = folder / f"{datetime.now(UTC):%Y%m%d-%H%M%S}.txt"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file.write_text(text, encoding="utf-8")
        where = f"the traceback is in {file}"
    except OSError:
        where = "set BACKPROPAGATE_DEBUG=1 to see the traceback"
    if os.environ.get("BACKPROPAGATE_DEBUG"):
        sys.stderr.write(text)
    message = f"{type(error).__name__}: {redact(str(error)).strip().splitlines()[0] if str(error).strip() else ''}"
    if as_json:
        body = {"code": "RUNTIME_BUG", "message": message, "cause": where, "way_out": "Report it.", "exit_status": 2}
        sys.stdout.write(orjson.dumps({"schema": "backpropagate.error/1", "error": body}).decode() + "\n")
    else:
        sys.stderr.write(f"[RUNTIME_BUG]: {message}\n  cause: a mistake in backpropagate; {where}\n")
        sys.stderr.write("  do:    Report it with that file and the output of `backprop info`\n")
    return 2
