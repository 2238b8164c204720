"""The command table; each command's module is imported when it is called, and no framework before that."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from importlib.metadata import version

from cyclopts import App, CycloptsError

from backpropagate.cli.failing import report_bug, report_error
from backpropagate.errors import CommandLineError
from bp_runs.errors import CodedError

# name, module:function, one line for the overview; lazy commands need their help here.
COMMANDS = (
    ("quickstart", "quickstart:quickstart", "Train, export and talk to a small model with the example data."),
    ("train", "train:train", "Train an adapter on your data."),
    ("export", "export:export", "Export an adapter as GGUF, merged model or adapter; register it with Ollama."),
    ("validate", "validate:validate", "Check a data file the way training reads it, and show what is trained."),
    ("list-runs", "list_runs:list_runs", "List the runs of an output folder."),
    ("show-run", "show_run:show_run", "Show one run in full."),
    ("info", "info:info", "Show versions, rails, paths and settings, for bug reports."),
    ("errors", "errors:errors", "Explain the error codes."),
)

_EPILOGUE = """Three things to do next:
  backprop quickstart                                    see it work on a small model
  backprop train --data my_data.jsonl --model OWNER/NAME  train on your own rows
  backprop export ./output/lora --format gguf            make a GGUF of the result
"""


def build_app() -> App:
    """The whole command line, without any command's imports."""
    app = App(
        name="backprop",
        help="Fine-tune a language model on one GPU and have it running in Ollama.",
        help_epilogue=_EPILOGUE,
        help_format="plaintext",
        version=lambda: version("backpropagate"),
        version_flags=["--version", "-V"],
    )
    for name, target, line in COMMANDS:
        app.command(f"backpropagate.cli.{target}", name=name, help=line)
    return app


def run(argv: Sequence[str]) -> int:
    """Carry out one command line and return its exit status; every error has been told."""
    argv = list(argv)
    as_json = "--json" in argv
    try:
        result = build_app()(
            argv, exit_on_error=False, print_error=False, result_action="return_value", help_on_error=False
        )
    except CycloptsError as error:
        return report_error(_command_line_error(error, argv), as_json=as_json)
    except CodedError as error:
        return report_error(error, as_json=as_json)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)  # noqa: T201
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:  # noqa: BLE001  # an edge: whatever is left is a bug, and the user gets a report to send
        return report_bug(error, as_json=as_json)
    return result if isinstance(result, int) else 0


def _command_line_error(error: CycloptsError, argv: Sequence[str]) -> CommandLineError:
    known = {name for name, _, _ in COMMANDS}
    command = next((word for word in argv if word in known), None)
    message = " ".join(str(error).split()).rstrip(".")
    flag = getattr(getattr(error, "token", None), "keyword", None)
    hint = _nearest_flag(flag, command) if flag and command else ""
    help_line = f"backprop {command} --help" if command else "backprop --help"
    return CommandLineError(f"{message}{hint}", way_out=f"See what it takes: {help_line}")


def _nearest_flag(flag: str, command: str) -> str:
    from backpropagate.settings import nearest

    arguments = build_app()[command].assemble_argument_collection()
    hint = nearest(flag.split("=", maxsplit=1)[0], [name for argument in arguments for name in argument.names])
    return "" if "ean" in hint and hint in flag else hint


def main() -> None:
    """Entry point of the console scripts."""
    from backpropagate.cli.failing import prepare_process

    prepare_process()
    sys.exit(run(sys.argv[1:]))
