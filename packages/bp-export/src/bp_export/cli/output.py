"""What the commands print: errors, answers as JSON, and progress on a terminal."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from typing import Any

from bp_export.cli.options import Option
from bp_runs.errors import CodedError
from bp_runs.redact import redact, redact_data


def add_options(parser: argparse.ArgumentParser, options: Sequence[Option], *, has_json: bool = True) -> None:
    """Mount declared options, and ``--json``."""
    for option in options:
        has_default = option.default is not None and not option.is_switch
        help = f"{option.help} (default: {option.default})" if has_default else option.help
        if option.is_switch:
            action = argparse.BooleanOptionalAction if option.has_negative else "store_true"
            parser.add_argument(*option.words, dest=option.name, action=action, help=help)
        else:
            parser.add_argument(
                *option.words,
                dest=option.name,
                type=option.kind,
                default=option.default,
                metavar=None if option.choices else option.long.removeprefix("--").replace("-", "_").upper(),
                choices=option.choices or None,
                required=option.is_required,
                help=help,
            )
    if has_json:
        add_json_flag(parser)


def add_json_flag(parser: argparse.ArgumentParser) -> None:
    """``--json``, which every command has."""
    parser.add_argument("--json", action="store_true", help="print the outcome, or the error, as one JSON document")


def tell_json(body: Any) -> None:
    """One JSON document, without secrets."""
    print(json.dumps(redact_data(body), default=str))  # noqa: T201


def tell(text: str) -> None:
    """One or more lines."""
    print(redact(text))  # noqa: T201


def tell_error(error: CodedError, *, as_json: bool) -> None:
    """Code, message, cause and fix: on stderr, or on stdout as JSON."""
    if as_json:
        tell_json(error.to_dict())
        return
    lines = [str(error), *([f"  because: {error.cause}"] if error.cause else []), f"  {error.fix}", f"  {error.page()}"]
    print(redact("\n".join(lines)), file=sys.stderr)  # noqa: T201


def find_progress(*, as_json: bool) -> Callable[[int, int], None] | None:
    """A line that counts bytes, where a person looks at a terminal."""
    return None if as_json or not sys.stderr.isatty() else _tell_progress


def _tell_progress(done: int, total: int) -> None:
    end = "\n" if done == total else ""
    print(f"\r{done / total:4.0%} of {total / 2**20:,.0f} MiB", end=end, file=sys.stderr, flush=True)  # noqa: T201
